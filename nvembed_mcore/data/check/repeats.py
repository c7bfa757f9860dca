"""What stands twice in a data set, found among hashes of 64 bits.

Everything is sorted in parts: the hashes whose first bits are the same. So the memory beside the hashes themselves
stays small, and what is found does not depend on the parts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from nvembed_mcore.data.check.scan import Facts, look_up

EXAMPLES = 5
PART_ROWS = 1 << 21
"""Hashes that are sorted at once, about."""

_FACTOR = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True, order=True)
class Example:
    """Where something was found: numbers of records in their set, and the hashes of the texts to show."""

    records: tuple[int, ...]
    texts: tuple[int, ...]


@dataclass(slots=True)
class Found:
    """How often something was found, and the examples of the earliest records."""

    count: int = 0
    examples: list[Example] = field(default_factory=list)

    def add(self, records: np.ndarray, others: np.ndarray, *texts: np.ndarray) -> None:
        """Count rows: each is a record, the earlier or other one that it meets, and texts to show, all [rows]."""
        self.count += len(records)
        for row in np.lexsort((*texts, others, records))[:EXAMPLES]:
            records_of = (int(records[row]), int(others[row]))
            self.examples.append(Example(records_of, tuple(int(hashes[row]) for hashes in texts)))
        self.examples = sorted(self.examples)[:EXAMPLES]


@dataclass(slots=True)
class Queries:
    """Distinct hashes of a set's queries, sorted uint64, the first record of each, int64, and records whose query
    stood before."""

    distinct: np.ndarray
    first: np.ndarray
    repeated: Found


@dataclass(slots=True)
class Documents:
    """Distinct hashes of a set's documents, sorted uint64, texts under several ids, and ids of several texts.

    Where the set names ids: each of them once, sorted uint64, its first text, uint64, and record, int64.
    """

    distinct: np.ndarray
    several_ids: Found
    several_texts: Found
    ids: np.ndarray
    id_texts: np.ndarray
    id_records: np.ndarray


@dataclass(slots=True)
class _Rows:
    """Documents with the key by which they are sorted: its hashes, those of query and text, ids and records."""

    keys: np.ndarray
    queries: np.ndarray
    texts: np.ndarray
    ids: np.ndarray
    records: np.ndarray

    def take(self, rows: np.ndarray) -> _Rows:
        return _Rows(self.keys[rows], self.queries[rows], self.texts[rows], self.ids[rows], self.records[rows])


_NO_ROWS = _Rows(*(np.empty(0, np.uint64) for _ in range(4)), np.empty(0, np.int64))


def find_queries(chunks: Sequence[Facts]) -> Queries:
    """Which queries stand twice."""
    distinct, first, repeated = [], [], Found()
    for part in _parts(sum(len(chunk.queries) for chunk in chunks)):
        places = [part.places(chunk.queries) for chunk in chunks]
        keys = np.concatenate([chunk.queries[at] for chunk, at in zip(chunks, places, strict=True)])
        records = np.concatenate([start + at for start, at in zip(_starts(chunks), places, strict=True)])
        order = np.argsort(keys, kind="stable")
        keys, records = keys[order], records[order]
        is_first, firsts = _firsts(keys)
        distinct.append(keys[is_first])
        first.append(records[is_first])
        repeated.add(records[~is_first], records[firsts][~is_first], keys[~is_first])
    return Queries(np.concatenate(distinct), np.concatenate(first), repeated)


def find_pairs(chunks: Sequence[Facts]) -> tuple[Found, Found]:
    """Pairs of query and positive that stood before; negatives that are a positive of the same query elsewhere.

    A negative that is a positive of its own record is not counted here.
    """
    repeated, false_negatives = Found(), Found()
    for part in _parts(_num_documents(chunks)):
        positives = _pairs(chunks, part, "pos")
        positives = positives.take(np.argsort(positives.keys, kind="stable"))
        is_first, firsts = _firsts(positives.keys)
        later = positives.take(~is_first)
        repeated.add(later.records, positives.records[firsts][~is_first], later.queries, later.texts)
        distinct = positives.take(is_first)
        negatives = _pairs(chunks, part, "neg")
        at, is_positive = look_up(distinct.keys, negatives.keys)
        false = negatives.take(is_positive)
        false_negatives.add(false.records, distinct.records[at[is_positive]], false.queries, false.texts)
    return repeated, false_negatives


def find_documents(chunks: Sequence[Facts]) -> Documents:
    """How many documents there are, and whether their texts and ids belong together."""
    distinct, several_ids, several_texts = [], Found(), Found()
    named = [(_NO_ROWS.ids, _NO_ROWS.texts, _NO_ROWS.records)]
    has_ids = any(ids is not None for chunk in chunks for ids in chunk.ids.values())
    for part in _parts(_num_documents(chunks)):
        rows = _documents(chunks, part, by_id=False)
        distinct.append(np.unique(rows.texts))
        if has_ids:
            first, second = _several(rows, rows.ids)
            several_ids.add(second.records, first.records, first.texts)
            rows = _documents(chunks, part, by_id=True)
            first, second = _several(rows, rows.texts)
            several_texts.add(second.records, first.records, first.texts, second.texts)
            order = np.lexsort((rows.texts, rows.records, rows.ids))
            order = order[_firsts(rows.ids[order])[0]]
            named.append((rows.ids[order], rows.texts[order], rows.records[order]))
    columns = [np.concatenate(column) for column in zip(*named, strict=True)]
    return Documents(np.concatenate(distinct), several_ids, several_texts, *columns)


def own_positives(chunks: Sequence[Facts]) -> Found:
    """Negatives that are a positive of their own record, by text or id."""
    found = Found()
    for start, chunk in zip(_starts(chunks), chunks, strict=True):
        owners = np.repeat(np.arange(len(chunk.queries)), chunk.counts["neg"])[chunk.own]
        found.add(start + owners, start + owners, chunk.queries[owners], chunk.texts["neg"][chunk.own])
    return found


def count_distinct(sets: Sequence[np.ndarray]) -> int:
    """Distinct hashes of several sorted arrays together."""
    count = 0
    for part in _parts(sum(map(len, sets))):
        low, high = part.number << (64 - part.bits), ((part.number + 1) << (64 - part.bits)) - 1
        bounds = np.array([low, high], np.uint64)
        slices = []
        for hashes in sets:
            begin, end = np.searchsorted(hashes, bounds[0], "left"), np.searchsorted(hashes, bounds[1], "right")
            slices.append(hashes[begin:end])
        count += len(np.unique(np.concatenate(slices))) if slices else 0
    return count


def shared_queries(one: Queries, other: Queries) -> Found:
    """Queries of one set that stand in another: a record of the first, and one of the other."""
    found = Found()
    at, is_shared = look_up(other.distinct, one.distinct)
    found.add(one.first[is_shared], other.first[at[is_shared]], one.distinct[is_shared])
    return found


def clashing_ids(one: Documents, other: Documents) -> Found:
    """Ids that name one text in one set and another in the other: a record of each."""
    found = Found()
    at, is_shared = look_up(other.ids, one.ids)
    rows = np.flatnonzero(is_shared)
    rows = rows[one.id_texts[rows] != other.id_texts[at[rows]]]
    at = at[rows]
    found.add(one.id_records[rows], other.id_records[at], one.id_texts[rows], other.id_texts[at])
    return found


@dataclass(frozen=True, slots=True)
class _Part:
    """The hashes that begin with `number` in `bits` bits."""

    bits: int
    number: int

    def places(self, hashes: np.ndarray) -> np.ndarray:
        """Where they stand in an array, int64."""
        if not self.bits:
            return np.arange(len(hashes))
        return np.flatnonzero(hashes >> np.uint64(64 - self.bits) == self.number)


def _parts(rows: int) -> Iterator[_Part]:
    bits = max(0, (rows // PART_ROWS).bit_length())
    return (_Part(bits, number) for number in range(1 << bits))


def _num_documents(chunks: Sequence[Facts]) -> int:
    return sum(len(texts) for chunk in chunks for texts in chunk.texts.values())


def _starts(chunks: Sequence[Facts]) -> np.ndarray:
    """Number of each chunk's first record in the set."""
    return np.cumsum([0, *(len(chunk.queries) for chunk in chunks)])[:-1]


def _pairs(chunks: Sequence[Facts], part: _Part, name: str) -> _Rows:
    """Query and document of the queries of a part; own positives among the negatives are left out."""
    rows = []
    for start, chunk in zip(_starts(chunks), chunks, strict=True):
        owners = np.repeat(np.arange(len(chunk.queries)), chunk.counts[name])
        is_taken = np.zeros(len(chunk.queries), bool)
        is_taken[part.places(chunk.queries)] = True
        is_taken = is_taken[owners]
        if name == "neg":
            is_taken[chunk.own] = False
        owners, texts = owners[is_taken], chunk.texts[name][is_taken]
        queries = chunk.queries[owners]
        rows.append(_Rows(queries * _FACTOR + texts, queries, texts, texts, start + owners))
    return _join(rows)


def _documents(chunks: Sequence[Facts], part: _Part, *, by_id: bool) -> _Rows:
    """The documents whose texts, or ids, belong to a part."""
    rows = []
    for start, chunk in zip(_starts(chunks), chunks, strict=True):
        for name, texts in chunk.texts.items():
            ids = texts if chunk.ids[name] is None else chunk.ids[name]
            places = part.places(ids if by_id else texts)
            owners = np.repeat(np.arange(len(chunk.queries)), chunk.counts[name])[places]
            texts, ids = texts[places], ids[places]
            rows.append(_Rows(ids if by_id else texts, chunk.queries[owners], texts, ids, start + owners))
    return _join(rows)


def _join(rows: list[_Rows]) -> _Rows:
    return _Rows(*(np.concatenate([getattr(one, name) for one in (_NO_ROWS, *rows)]) for name in _Rows.__slots__))


def _firsts(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of sorted keys: whether each is the first of its kind, bool, and the place of that one, int64."""
    is_first = np.ones(len(keys), bool)
    is_first[1:] = keys[1:] != keys[:-1]
    return is_first, np.flatnonzero(is_first)[np.cumsum(is_first) - 1]


def _several(rows: _Rows, values: np.ndarray) -> tuple[_Rows, _Rows]:
    """Keys with several values: the first two of each, by record."""
    order = np.lexsort((rows.records, values, rows.keys))
    is_new, _ = _firsts(rows.keys[order])
    is_new[1:] |= values[order][1:] != values[order][:-1]
    order = order[is_new]  # the earliest record of each value of a key
    order = order[np.lexsort((values[order], rows.records[order], rows.keys[order]))]
    is_first, _ = _firsts(rows.keys[order])
    firsts = np.flatnonzero(is_first)
    firsts = firsts[np.diff(firsts, append=len(order)) > 1]
    return rows.take(order[firsts]), rows.take(order[firsts + 1])
