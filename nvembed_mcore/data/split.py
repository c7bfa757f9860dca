"""Pairs of one table as a training set and a test set that share no text that would give an answer away."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from nvembed_mcore.data.faults import DataError
from nvembed_mcore.data.records import Record, read_records, write_records


@dataclass(frozen=True, slots=True)
class Counts:
    """What was read and written."""

    records: int
    train: int
    held_out: int
    queries: int
    documents: int

    def by_name(self) -> dict[str, int]:
        """All of them, under the names that a user reads."""
        return {
            "records read": self.records,
            "to train.jsonl": self.train,
            "held out": self.held_out,
            "test queries": self.queries,
            "documents of the test's corpus": self.documents,
        }


def split(source: str | Path, folder: str | Path, *, held_out: int, seed: int = 0, max_bad_records: int = 0) -> Counts:
    """Write `folder`/train.jsonl and the test set `folder`/heldout in BEIR's format.

    Records that share a query or a positive stay together. The corpus of the test set has all documents of all
    records, so a query looks for its document among those of training too. A pure function of records and seed.

    Args:
        source: a data set in any layout and format that training reads.
        held_out: records to hold out; fewer by less than the size of a group that does not fit.
        seed: decides which.
        max_bad_records: so many bad rows are left out.

    Raises:
        DataError: `source` cannot be read, does not have more than `held_out` records, has one id for two texts, or
            groups so large that none fits.
    """
    records = list(read_records(source, max_bad_records=max_bad_records))
    if not 1 <= held_out < len(records):
        raise DataError(
            f"{source}: cannot hold out {held_out} of {len(records)} records: some must be left to train on"
        )
    tested = _held_out(records, held_out, seed)
    if not tested:
        raise DataError(
            f"{source}: records that share a query or a positive stay together, and the smallest such group has more "
            f"than the {held_out} to hold out"
        )
    folder = Path(folder)
    test = folder / "heldout"
    (test / "qrels").mkdir(parents=True, exist_ok=True)
    queries = _texts(((records[index].query_id, records[index].query) for index in sorted(tested)), source)
    corpus = _texts(((key, text) for record in records for key, text in _documents(record)), source)
    # In the order of the ids: a corpus in the order of the queries would let a broken search look right.
    write_records(test / "corpus.jsonl", ({"_id": key, "title": "", "text": corpus[key]} for key in sorted(corpus)))
    write_records(test / "queries.jsonl", ({"_id": key, "text": text} for key, text in queries.items()))
    relevant = dict.fromkeys(
        (records[index].query_id, key) for index in sorted(tested) for key in records[index].pos_ids
    )
    lines = ["query-id\tcorpus-id\tscore", *(f"{query}\t{document}\t1" for query, document in relevant)]
    (test / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rest = [_row(record) for index, record in enumerate(records) if index not in tested]
    write_records(folder / "train.jsonl", rest)
    return Counts(len(records), len(rest), len(tested), len(queries), len(corpus))


def _held_out(records: list[Record], number: int, seed: int) -> set[int]:
    """Indices of whole groups, in a random order, as long as they fit."""
    groups = _groups(records)
    random.Random(f"{seed}/split").shuffle(groups)
    chosen: set[int] = set()
    for group in groups:
        if len(chosen) + len(group) <= number:
            chosen.update(group)
    return chosen


def _groups(records: list[Record]) -> list[list[int]]:
    """Indices of records that hang together by a query or a positive, over any number of steps."""
    leader = list(range(len(records)))

    def first(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    seen: dict[tuple[str, str], int] = {}
    for index, record in enumerate(records):
        for key in (
            ("query", record.query),
            ("query id", record.query_id),
            *(("document", one) for one in record.pos_ids),
        ):
            leader[first(index)] = first(seen.setdefault(key, index))
    groups: dict[int, list[int]] = {}
    for index in range(len(records)):
        groups.setdefault(first(index), []).append(index)
    return list(groups.values())


def _documents(record: Record) -> Iterator[tuple[str, str]]:
    yield from zip((*record.pos_ids, *record.neg_ids), (*record.pos, *record.neg), strict=True)


def _texts(named: Iterable[tuple[str, str]], source: str | Path) -> dict[str, str]:
    """Id -> text."""
    texts: dict[str, str] = {}
    for key, text in named:
        if texts.setdefault(key, text) != text:
            raise DataError(f"{source}: the id {key!r} has two texts: {texts[key][:60]!r} and {text[:60]!r}")
    return texts


def _row(record: Record) -> dict[str, object]:
    return {name: value for name, value in asdict(record).items() if value is not None}
