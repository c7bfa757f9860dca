"""What one block of records says: lengths, hashes and what is wrong inside a record. The work of other processes.

Texts leave a block as 64 bits of their SHA-256, which `content_id` writes as 16 hex digits; so a text and the id that
it gets when the file names none are the same number. Of 100 million texts two are taken for one with a chance of
1 in 3,700.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from nvembed_mcore.config import DatasetConfig
from nvembed_mcore.data.bare_tokenizer import BareTokenizer
from nvembed_mcore.data.check.scores import Scores
from nvembed_mcore.data.files import Block
from nvembed_mcore.data.prompts import check_room
from nvembed_mcore.data.records import Parsed, Record, parse_block
from nvembed_mcore.data.token_build import Encoder

FIELDS = ("query", "pos", "neg")
KINDS = ("queries", "documents")
"""What leaks: a training query that is a test query, a training document that is one of the test corpus."""
SHOWN_PROBLEMS = 10
_UNCUT = 2**31 - 1

_CONTENT_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Known:
    """Evaluation texts to look for: sorted, distinct hashes of normalised texts, uint64, for each of `KINDS`."""

    queries: np.ndarray
    documents: np.ndarray


@dataclass(slots=True)
class Hits:
    """Evaluation texts of one kind in a block: the record that holds each, its text's hash, and its place in `Known`
    (int64, uint64 and int64 arrays of one length)."""

    records: np.ndarray
    texts: np.ndarray
    known: np.ndarray


@dataclass(slots=True)
class Facts:
    """What a block held. Documents of all records stand one behind the other.

    Attributes:
        dataset: number of the data set.
        path: file of the block.
        lines: uint32 [records], where each stands.
        queries: uint64 [records], hashes.
        counts: `pos` and `neg` -> uint32 [records], documents of each record.
        texts: likewise -> uint64 [documents], hashes.
        ids: likewise -> uint64 [documents]; None where every id is that of its text.
        own: int64, places in `texts["neg"]` of negatives that are a positive of their own record, by text or id.
        lengths: field -> distinct lengths and how often each was there.
        hits: for each evaluation set, its kind -> what was found.
        blank_negatives: negatives without text, which were left out.
        num_problems, problems: bad lines, and `file:line:column: reason` of the first few.
        error: why a run would refuse these records; empty if it would not.
        scores: what a teacher says of them.
    """

    dataset: int
    path: str
    lines: np.ndarray
    queries: np.ndarray
    counts: dict[str, np.ndarray]
    texts: dict[str, np.ndarray]
    ids: dict[str, np.ndarray | None]
    own: np.ndarray
    lengths: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    hits: list[dict[str, Hits]] = field(default_factory=list)
    blank_negatives: int = 0
    num_problems: int = 0
    problems: list[str] = field(default_factory=list)
    error: str = ""
    scores: Scores = field(default_factory=Scores)


class Scanner:
    """Scans blocks; each process has one (`start`)."""

    def __init__(
        self,
        datasets: Sequence[DatasetConfig],
        tokenizer: BareTokenizer | None,
        max_query_tokens: int,
        known: Sequence[Known],
        needs_scores: bool = False,
    ) -> None:
        """
        Args:
            datasets: instructions are theirs, where a record has none of its own.
            tokenizer: None: lengths are in characters, without prompts.
            max_query_tokens: limit under which a record's own instruction must leave room.
            known: the evaluation sets.
            needs_scores: whether the run distils, so that a record must have a teacher's scores.
        """
        self._datasets = datasets
        self._tokenizer = tokenizer
        self._max_query_tokens = max_query_tokens
        self._known = known
        self._needs_scores = needs_scores

    def scan(self, dataset: int, block: Block) -> Facts:
        parsed = parse_block(block, needs_scores=self._needs_scores and self._datasets[dataset].distill)
        records = parsed.records
        texts = {name: list(chain.from_iterable(getattr(one, name) for one in records)) for name in ("pos", "neg")}
        hashes = {name: hashes_of(some) for name, some in texts.items()}
        facts = Facts(
            dataset,
            block.path,
            np.array(parsed.lines, np.uint32),
            hashes_of([record.query for record in records]),
            {name: np.array([len(getattr(one, name)) for one in records], np.uint32) for name in texts},
            hashes,
            {name: _ids(records, name, hashes[name]) for name in texts},
            _own_positives(records),
            blank_negatives=parsed.blank_negatives,
            num_problems=len(parsed.problems),
            problems=[f"{block.path}:{a}:{b}: {why}" for a, b, why in parsed.problems[:SHOWN_PROBLEMS]],
            scores=Scores.of(records),
        )
        texts["query"] = [record.query for record in records]
        try:
            lengths = self._lengths(dataset, records, texts)
            facts.lengths = {name: np.unique(some, return_counts=True) for name, some in lengths.items()}
        except ValueError as error:  # the tokenizer cannot keep the prompt apart: the token store refuses too
            facts.error = f"{block.path}: {error}"
        facts.error = facts.error or self._instruction_without_room(parsed)
        if self._known and records:
            facts.hits = self._hits(facts, texts)
        return facts

    def _lengths(self, dataset: int, records: list[Record], texts: dict[str, list[str]]) -> dict[str, np.ndarray]:
        """Length of each text of each field before it is cut."""
        if self._tokenizer is None:
            return {name: np.fromiter(map(len, some), np.int64, len(some)) for name, some in texts.items()}
        config = self._datasets[dataset]
        of_documents = config.instruction if config.instructs_documents else ""
        encoder = Encoder(self._tokenizer, config.instruction, of_documents, _UNCUT, _UNCUT)
        queries = [some.lengths for some in encoder.queries(records)]
        lengths = {name: encoder.documents(texts[name]).lengths for name in ("pos", "neg")}
        return {"query": np.concatenate(queries or [np.empty(0, np.int32)]), **lengths}

    def _instruction_without_room(self, parsed: Parsed) -> str:
        """Why the token store would refuse the instruction that a record has of its own; empty if it would not."""
        own: dict[str, int] = {}
        for line, record in zip(parsed.lines, parsed.records, strict=True):
            if record.instruction:
                own.setdefault(record.instruction, line)
        for instruction, line in own.items() if self._tokenizer else ():
            try:
                check_room(self._tokenizer, instruction, self._max_query_tokens)
            except ValueError as error:
                return f"{parsed.path}:{line}: {error}"
        return ""

    def _hits(self, facts: Facts, texts: dict[str, list[str]]) -> list[dict[str, Hits]]:
        records = np.arange(len(facts.lines))
        owners = [np.repeat(records, facts.counts[name]) for name in ("pos", "neg")]
        sides = {
            "queries": (texts["query"], facts.queries, records),
            "documents": (
                texts["pos"] + texts["neg"],
                np.concatenate([facts.texts["pos"], facts.texts["neg"]]),
                np.concatenate(owners),
            ),
        }
        found: list[dict[str, Hits]] = [{} for _ in self._known]
        for kind, (some, hashes, owner) in sides.items():
            normal = hashes_of(map(normalised, some))
            for hits, known in zip(found, self._known, strict=True):
                at, is_known = look_up(getattr(known, kind), normal)
                order = np.argsort(owner[is_known], kind="stable")
                hits[kind] = Hits(owner[is_known][order], hashes[is_known][order], at[is_known][order])
        return found


_SCANNER: Scanner | None = None


def start(*arguments: Any) -> None:
    """Make this process's scanner; `arguments` are those of `Scanner`."""
    global _SCANNER
    _SCANNER = Scanner(*arguments)


def scan(item: tuple[int, Block]) -> Facts:
    """Number of a data set and one of its blocks -> what the block held."""
    assert _SCANNER is not None, "start() makes it"
    return _SCANNER.scan(*item)


def hashes_of(texts: Iterable[str]) -> np.ndarray:
    """uint64 [texts]: the number that `content_id` writes in hex."""
    return np.array([int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") for text in texts], np.uint64)


def normalised(text: str) -> str:
    """A text without differences of case and white space."""
    return " ".join(text.casefold().split())


def look_up(known: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each number stands in a sorted array, int64, and whether it does, bool."""
    at = np.searchsorted(known, wanted)
    at[at == len(known)] = 0
    return at, known[at] == wanted if len(known) else np.zeros(len(wanted), bool)


def _ids(records: Sequence[Record], name: str, texts: np.ndarray) -> np.ndarray | None:
    names = chain.from_iterable(getattr(record, f"{name}_ids") for record in records)
    ids = np.array([_id_number(one) for one in names], np.uint64)
    return None if np.array_equal(ids, texts) else ids


def _id_number(name: str) -> int:
    """An id as a number of 64 bits; the id of a text that was given none is the text's, any other is no text's."""
    if _CONTENT_ID.fullmatch(name):
        return int(name, 16)
    return int.from_bytes(hashlib.sha256(b"\0" + name.encode()).digest()[:8], "big")


def _own_positives(records: Sequence[Record]) -> np.ndarray:
    """Places, among all negatives, of those with text or id of a positive of the same record."""
    places, start = [], 0
    for record in records:
        texts, ids = set(record.pos), set(record.pos_ids)
        pairs = zip(record.neg, record.neg_ids, strict=True)
        places += [start + number for number, (text, name) in enumerate(pairs) if text in texts or name in ids]
        start += len(record.neg)
    return np.array(places, np.int64)
