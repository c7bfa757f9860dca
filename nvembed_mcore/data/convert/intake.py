"""What a conversion reads, leaves out and refuses, and how what a layout gives becomes a record."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from nvembed_mcore.data.convert.rows import Item, file_items
from nvembed_mcore.data.faults import DataError, Fault, check_string, kind_of
from nvembed_mcore.data.records import content_id

T = TypeVar("T")
_SHOWN = 10


class LeftOut(Exception):
    """A row that is as its layout says and still gives no record; the text is the reason."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text and its id, without which the text names itself; and what a teacher scores it, if that is known."""

    text: str
    given_id: str | None = None
    score: float | None = None

    @property
    def id(self) -> str:
        return content_id(self.text) if self.given_id is None else self.given_id


@dataclass(slots=True)
class Draft:
    """A record before it is looked over; texts may be blank, repeat or contradict each other.

    Attributes:
        query: the query.
        pos, neg: its documents.
        query_id: its id, where the layout has one.
        more: further fields of the record.
    """

    query: str
    pos: Sequence[Document]
    neg: Sequence[Document] = ()
    query_id: str | None = None
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Counts:
    """What a conversion did.

    Attributes:
        rows: rows read, good and bad.
        records: records written.
        positives, negatives: their documents.
        without_negatives: records that have none.
        bad: bad rows, which were left out (as many as were allowed).
        left_out: reason -> rows (or records) that are well formed and gave no record.
        notes: what else happened to records -> how often.
    """

    rows: int = 0
    records: int = 0
    positives: int = 0
    negatives: int = 0
    without_negatives: int = 0
    bad: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def by_name(self) -> dict[str, int]:
        """All of them, under the names that a user reads."""
        return {
            "rows read": self.rows,
            "records written": self.records,
            "positives": self.positives,
            "negatives": self.negatives,
            "records without negatives": self.without_negatives,
            "bad rows": self.bad,
            **{f"left out: {reason}": number for reason, number in self.left_out.most_common()},
            **dict(self.notes.most_common()),
        }


class Intake:
    """The sources of one conversion, and the counts of what became of them."""

    def __init__(self, sources: Sequence[str | Path], max_bad_records: int = 0, seed: int = 0) -> None:
        self.sources = [Path(source) for source in sources]
        self.max_bad_records = max_bad_records
        self.seed = seed
        self.counts = Counts()
        self._shown: list[str] = []

    def rows(self, parse: Callable[[dict[str, Any]], T]) -> Iterator[T]:
        """`parse(row)` of every row of every source; rows that it refuses (`Fault`) or leaves out are counted."""
        for path in self.sources:
            yield from self.each(file_items(path, self.bad), parse)

    def each(self, items: Iterable[Item], parse: Callable[[Any], T]) -> Iterator[T]:
        """Likewise of any items."""
        for place, value in items:
            self.counts.rows += 1
            try:
                parsed = parse(value)
            except Fault as fault:
                self.bad(place(fault.field), fault.reason, is_counted=True)
            except LeftOut as why:
                self.counts.left_out[str(why)] += 1
            else:
                yield parsed

    def bad(self, place: str, reason: str, *, is_counted: bool = False) -> None:
        """Note a bad row; `is_counted`: it is among the rows read already."""
        self.counts.rows += not is_counted
        self.counts.bad += 1
        if len(self._shown) < _SHOWN:
            self._shown.append(f"  {place}: {reason}")

    def records(self, drafts: Iterable[Draft], sample: int | None = None) -> Iterator[dict[str, Any]]:
        """The records of some drafts, as rows to write; or so many of them, drawn at random, in their order.

        Raises:
            DataError: at the end, when there were more bad rows than allowed, or no record.
        """
        counts = self.counts
        made = (row for draft in drafts if (row := self._record(draft)) is not None)
        for row in made if sample is None else self._drawn(made, sample):
            counts.records += 1
            counts.positives += len(row["pos"])
            counts.negatives += len(row["neg"])
            counts.without_negatives += not row["neg"]
            yield row
        self.stop_if_bad()
        if not counts.records:
            why = "".join(f"\n  {number}: {reason}" for reason, number in counts.left_out.most_common())
            raise DataError(f"{self.names()}: none of {counts.rows} rows gives a record{':' if why else ''}{why}")

    def stop_if_bad(self) -> None:
        """Call it when the rows of a set are read, before something is said or made of the whole set.

        Raises:
            DataError: there were more bad rows than allowed.
        """
        if self.counts.bad > self.max_bad_records:
            raise DataError(self.bad_rows())

    def names(self) -> str:
        """The sources, for a message."""
        return ", ".join(str(path) for path in self.sources)

    def bad_rows(self) -> str:
        """The first bad rows, a line each under a line with their number."""
        head = f"{self.counts.bad} bad row{'s' if self.counts.bad > 1 else ''} in {self.names()}"
        if self.max_bad_records:
            head += f", {self.max_bad_records} allowed"
        if self.counts.bad > len(self._shown):
            head += f", the first {len(self._shown)}"
        return "\n".join([f"{head}:", *self._shown])

    def _drawn(self, made: Iterable[dict[str, Any]], sample: int) -> Iterator[dict[str, Any]]:
        """Reservoir sampling: only the sample is in memory."""
        rng = random.Random(f"{self.seed}/sample")
        kept: list[tuple[int, dict[str, Any]]] = []
        for number, row in enumerate(made):
            if number < sample:
                kept.append((number, row))
                continue
            self.counts.notes["records that were not drawn"] += 1
            place = rng.randrange(number + 1)
            if place < sample:
                kept[place] = (number, row)
        for _, row in sorted(kept, key=lambda one: one[0]):
            yield row

    def _record(self, draft: Draft) -> dict[str, Any] | None:
        """Look a draft over: blank and repeated documents go, and negatives that are the query or a positive."""
        counts = self.counts
        if not draft.query.strip():
            counts.left_out["the query is blank"] += 1
            return None
        taken_texts, taken_ids = {draft.query}, set()
        kept: list[list[Document]] = []
        for documents in (draft.pos, draft.neg):
            kept.append([])
            for document in documents:
                if document.text in taken_texts or document.id in taken_ids or not document.text.strip():
                    continue
                taken_texts.add(document.text)
                taken_ids.add(document.id)
                kept[-1].append(document)
        pos, neg = kept
        if not pos:
            counts.left_out["no positive besides blank texts and the query itself"] += 1
            return None
        for kind, before, after in (("positives", draft.pos, pos), ("negatives", draft.neg, neg)):
            if len(after) < len(before):
                counts.notes[f"{kind} left out: blank, a repetition, the query or a positive"] += len(before) - len(
                    after
                )
        return {
            "query": draft.query,
            "pos": [document.text for document in pos],
            "neg": [document.text for document in neg],
            "query_id": content_id(draft.query) if draft.query_id is None else draft.query_id,
            "pos_ids": [document.id for document in pos],
            "neg_ids": [document.id for document in neg],
            **_scores(pos, neg),
            **draft.more,
        }


def _scores(pos: Sequence[Document], neg: Sequence[Document]) -> dict[str, list[float]]:
    """A teacher's scores; nothing where a document has none."""
    found = {"pos_scores": [one.score for one in pos], "neg_scores": [one.score for one in neg]}
    return {} if any(score is None for scores in found.values() for score in scores) else found


def check_output(path: str | Path, *, overwrite: bool = True) -> None:
    """Whether a file of records may be written under this name.

    Args:
        path: of the file.
        overwrite: replace a file that is there. One behind a list of sources may be the last of them.

    Raises:
        DataError: the name says another format than the one that is written, or the file is there.
    """
    if not str(path).endswith(".jsonl"):
        raise DataError(f"{path}: records are written as JSON Lines, so the name must end in .jsonl")
    if not overwrite and Path(path).exists():
        raise DataError(f"{path} exists; it is the file to write, and only --overwrite replaces it")


def text_of(row: dict[str, Any], name: str) -> str:
    """A field that must hold a string; spaces around it are cut off."""
    if row.get(name) is None:
        raise Fault(f"{name} is null" if name in row else f"{name} is missing", name)
    return clean(row[name], name, name)


def clean(value: Any, label: str, name: str) -> str:
    """A value that must be a string, without spaces around it; `name` is the field that it stands in."""
    check_string(value, label, name)
    return value.strip()


def list_of(row: dict[str, Any], name: str) -> list[Any]:
    """A field that must hold a list."""
    if row.get(name) is None:
        raise Fault(f"{name} is null" if name in row else f"{name} is missing", name)
    if not isinstance(row[name], list):
        raise Fault(f"{name} must be a list, got {kind_of(row[name])}", name)
    return row[name]


def optional_id(row: dict[str, Any], *names: str) -> str | None:
    """The first of some fields that holds an id (a string or a whole number), as a string."""
    for name in names:
        value = row.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str) and value.strip():
            check_string(value, name, name)
            return value
    return None
