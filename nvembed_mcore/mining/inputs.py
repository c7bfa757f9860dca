"""What is mined from: the corpus, the queries, and of each record its positives and what it must not get.

Everything is written once into a folder, by one process, and read through memory maps by all. Letters: `R` records,
`N` documents of the corpus, `M` documents of records (positives, and negatives that are kept).
"""

from __future__ import annotations

import hashlib
import os
import shutil
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nvembed_mcore.data.faults import DataError
from nvembed_mcore.data.records import Record, read_records, write_records
from nvembed_mcore.evaluation.corpus import Corpus, source_file

_ARRAYS = ("text_keys", "id_keys", "first_copies", "query_keys", "own_starts", "own_documents", "num_positives")
_BARRED = ("text", "id")


def text_key(text: str) -> int:
    """64 bits of a text; texts that differ in white space and capitals only have the same."""
    return _hash(" ".join(text.split()).casefold(), b"text")


def id_key(name: str) -> int:
    """64 bits of an id."""
    return _hash(name, b"id")


def _content(text: str) -> int:
    """64 bits of a text as a corpus holds it, without white space around it."""
    return _hash(text.strip(), b"content")


def _hash(text: str, kind: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=kind).digest(), "little")


@dataclass(frozen=True)
class Barred:
    """Values that belong to keys: what the records of a query bar, by keys of the query.

    Attributes:
        keys: uint64, rising.
        values: uint64 of the same length.
    """

    keys: np.ndarray
    values: np.ndarray

    def of(self, keys: np.ndarray) -> np.ndarray:
        """The values of several keys together."""
        begins, ends = np.searchsorted(self.keys, keys), np.searchsorted(self.keys, keys, side="right")
        return np.concatenate([self.values[begin:end] for begin, end in zip(begins, ends, strict=True)])


@dataclass(frozen=True)
class Inputs:
    """All that mining reads, by memory maps.

    Attributes:
        documents: the corpus: what negatives are taken from.
        others: documents of records that are not in it, which are numbered behind it; None when there are none.
        queries: the query of each record, in order.
        text_keys, id_keys: uint64 [N], of each document of the corpus.
        first_copies: int64 [N], of each document of the corpus the first one that is the same text.
        query_keys: uint64 [R, 2], of the query's text and of its id. Records that share one have the same query: what
            is a positive of one is a negative of none of them.
        own_starts, own_documents: int64 [R + 1] and [M]: numbers of each record's positives, then of negatives that
            are kept.
        num_positives: int64 [R].
        barred: `text` and `id`: keys of texts and ids that a query must not get, by its keys; its own text besides.
        fingerprint: SHA-256 of all of it.
    """

    documents: Corpus
    others: Corpus | None
    queries: Corpus
    text_keys: np.ndarray
    id_keys: np.ndarray
    first_copies: np.ndarray
    query_keys: np.ndarray
    own_starts: np.ndarray
    own_documents: np.ndarray
    num_positives: np.ndarray
    barred: dict[str, Barred]
    fingerprint: str

    def barred_of(self, records: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Of each record the keys of texts and of ids that it must not get."""
        keys = self.query_keys[records]
        texts = [np.append(self.barred["text"].of(of_query), of_query[0]) for of_query in keys]
        return texts, [self.barred["id"].of(of_query) for of_query in keys]

    def own(self, records: np.ndarray) -> list[np.ndarray]:
        """Of consecutive records the numbers of each one's documents: positives, then negatives that are kept."""
        starts = self.own_starts[records[0] : records[-1] + 2]
        return np.split(self.own_documents[starts[0] : starts[-1]], starts[1:-1] - starts[0])


def prepare(records: str, corpus: str | None, folder: Path, *, keep_negatives: bool) -> None:
    """Read records and corpus, and write into `folder` what `open_inputs` opens.

    Args:
        records: what `read_records` reads; it is read several times.
        corpus: a BEIR folder or a file of texts with ids; None takes all documents of the records, each id once.
        keep_negatives: whether the records' own negatives are scored and barred from being mined.

    Raises:
        DataError: something cannot be read, or an id names two texts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if corpus is None:
        build_corpus(_documents_of(records), _documents_folder(folder, corpus))
    else:
        Corpus.build(source_file(corpus, are_queries=False), _documents_folder(folder, corpus))
    documents = Corpus.open(_documents_folder(folder, corpus))
    places = {
        _content(text): -1 for record in read_records(records) for text, _ in own_documents(record, keep_negatives)
    }
    _write_document_keys(documents, places, folder)
    arrays = _RecordArrays(places, len(documents), keep_negatives)

    def queries() -> Iterator[dict[str, str]]:
        for number, record in enumerate(read_records(records)):
            arrays.add(record)
            yield {"id": str(number), "text": record.query}

    build_corpus(queries(), folder / "queries")
    build_corpus(_others(records, places, len(documents), keep_negatives), folder / "others")
    arrays.write(folder)


def _documents_folder(folder: Path, corpus: str | None) -> Path:
    """Not the same for both: a command without `--corpus`, which is refused because the embeddings are those of one,
    does not take the corpus away from the command that goes on with it."""
    return folder / ("documents_of_records" if corpus is None else "documents")


def open_inputs(folder: Path, corpus: str | None) -> Inputs:
    """What `prepare` wrote."""
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
    barred = {
        kind: Barred(np.load(folder / f"{kind}_barred_keys.npy"), np.load(folder / f"{kind}_barred.npy"))
        for kind in _BARRED
    }
    documents, queries = Corpus.open(_documents_folder(folder, corpus)), Corpus.open(folder / "queries")
    others = Corpus.open(folder / "others") if (folder / "others").is_dir() else None
    digest = hashlib.sha256("".join(one.fingerprint for one in (documents, queries, others) if one).encode())
    for rows in (*arrays.values(), *(rows for one in barred.values() for rows in (one.keys, one.values))):
        digest.update(np.ascontiguousarray(rows))
    return Inputs(documents, others, queries, **arrays, barred=barred, fingerprint=digest.hexdigest())


def build_corpus(rows: Iterator[dict[str, str]], folder: Path) -> None:
    """Make a corpus of rows in place of what was there; none of no rows.

    Whether it is the one whose embeddings are there, those say.
    """
    shutil.rmtree(folder, ignore_errors=True)
    source = folder.with_suffix(".jsonl")
    if write_records(source, rows):
        Corpus.build(source, folder)
    source.unlink()


def _documents_of(records: str) -> Iterator[dict[str, str]]:
    """All documents of the records, each id once."""
    seen: dict[int, int] = {}
    for record in read_records(records):
        named = zip(record.pos_ids + record.neg_ids, record.pos + record.neg, strict=True)
        for name, text in named:
            content = _content(text)
            key = id_key(name)
            if key not in seen:
                seen[key] = content
                yield {"id": name, "text": text}
            elif seen[key] != content:
                raise DataError(f"{records}: the id {name!r} names two texts; give the documents with --corpus")


def _others(
    records: str, places: dict[int, int], num_documents: int, keep_negatives: bool
) -> Iterator[dict[str, str]]:
    """The records' documents that the corpus lacks, each once, in the order of their numbers in `places`."""
    number = 0
    if num_documents not in places.values():
        return
    for record in read_records(records):
        for text, _ in own_documents(record, keep_negatives):
            if places[_content(text)] == num_documents + number:
                yield {"id": str(number), "text": text}
                number += 1


def own_documents(record: Record, keep_negatives: bool) -> list[tuple[str, str]]:
    """Text and id of a record's positives, then of the negatives that it keeps: those that are no positive of it."""
    positives = list(zip(record.pos, record.pos_ids, strict=True))
    if not keep_negatives:
        return positives
    texts, ids = set(map(text_key, record.pos)), set(record.pos_ids)
    negatives = zip(record.neg, record.neg_ids, strict=True)
    return positives + [(text, name) for text, name in negatives if name not in ids and text_key(text) not in texts]


def _write_document_keys(documents: Corpus, places: dict[int, int], folder: Path) -> None:
    """Write the keys of all documents and their first copies, and enter into `places` where a text stands first."""
    text_keys, id_keys, contents = array("Q"), array("Q"), array("Q")
    for number, (name, text) in enumerate(zip(documents.ids, documents.texts, strict=True)):
        text_keys.append(text_key(text))
        id_keys.append(id_key(name))
        contents.append(_content(text))
        if places.get(contents[-1]) == -1:
            places[contents[-1]] = number
    _, firsts, of_text = np.unique(np.frombuffer(contents, np.uint64), return_index=True, return_inverse=True)
    _save(folder, text_keys=text_keys, id_keys=id_keys, first_copies=firsts[of_text])


class _RecordArrays:
    """Collects what `Inputs` holds of records, one after the other."""

    def __init__(self, places: dict[int, int], num_documents: int, keep_negatives: bool) -> None:
        """`places`: contents of documents -> their numbers, -1 for those that the corpus lacks."""
        self._places, self._num_documents, self._keep_negatives = places, num_documents, keep_negatives
        self._num_others = 0
        self._starts, self._documents, self._num_positives = array("q", [0]), array("q"), array("q")
        self._query_keys = array("Q")
        self._barred = {kind: (array("Q"), array("Q")) for kind in _BARRED}

    def add(self, record: Record) -> None:
        own = own_documents(record, self._keep_negatives)
        for text, _ in own:
            content = _content(text)
            if self._places[content] == -1:
                self._places[content] = self._num_documents + self._num_others
                self._num_others += 1
            self._documents.append(self._places[content])
        self._starts.append(len(self._documents))
        self._num_positives.append(len(record.pos))
        of_query = text_key(record.query), id_key(record.query_id)
        self._query_keys.extend(of_query)
        values = {"text": [text_key(text) for text, _ in own], "id": [id_key(name) for _, name in own]}
        for kind, (keys, barred) in self._barred.items():
            for key in of_query:
                keys.extend([key] * len(values[kind]))
                barred.extend(values[kind])

    def write(self, folder: Path) -> None:
        _save(folder, own_starts=self._starts, own_documents=self._documents, num_positives=self._num_positives)
        _save(folder, query_keys=np.frombuffer(self._query_keys, np.uint64).reshape(-1, 2))
        for kind, (keys, barred) in self._barred.items():
            order = np.argsort(np.frombuffer(keys, np.uint64), kind="stable")
            _save(folder, **{f"{kind}_barred_keys": np.frombuffer(keys, np.uint64)[order]})
            _save(folder, **{f"{kind}_barred": np.frombuffer(barred, np.uint64)[order]})


def _save(folder: Path, **arrays: array | np.ndarray) -> None:
    for name, rows in arrays.items():
        aside = folder / f".writing-{name}.npy"
        np.save(aside, np.frombuffer(rows, rows.typecode) if isinstance(rows, array) else rows)
        os.replace(aside, folder / f"{name}.npy")
