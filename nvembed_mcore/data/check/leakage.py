"""Evaluation sets as hashes, and which of their texts stand in training data.

Texts are the same when only case and white space differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nvembed_mcore.data import files
from nvembed_mcore.data.beir import beir_files
from nvembed_mcore.data.check.repeats import EXAMPLES, Example
from nvembed_mcore.data.check.scan import KINDS, Hits, Known, hashes_of, normalised
from nvembed_mcore.data.faults import DataError, Fault, document_text, required_text
from nvembed_mcore.data.files import Block, line_blocks, numbered_lines, rows
from nvembed_mcore.data.records import parse_block
from nvembed_mcore.data.sources import blocks
from nvembed_mcore.data.workers import ordered_map

Read = tuple[str, Block]
"""What a block of an evaluation set holds (`queries`, `documents` or `records`), and the block."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the distinct texts of one kind stand first: file names, and number of file and line of each text."""

    names: list[str]
    files: np.ndarray
    lines: np.ndarray

    def __getitem__(self, index: int) -> str:
        return f"{self.names[self.files[index]]}:{self.lines[index]}"


@dataclass(slots=True)
class EvaluationSet:
    """An evaluation set to look for.

    Attributes:
        path: as the user named it.
        known: hashes of its normalised texts.
        places: kind -> where they stand.
    """

    path: str
    known: Known
    places: dict[str, Places]


@dataclass(slots=True)
class Leak:
    """What a training set holds of one kind of texts of an evaluation set.

    Attributes:
        found: bool [texts of the evaluation set], which of them.
        records: training records that hold one.
        examples: the first records, with the places of the evaluation texts.
    """

    found: np.ndarray
    records: int = 0
    examples: list[tuple[Example, int]] = field(default_factory=list)

    def add(self, hits: Hits, start: int) -> None:
        """Count the hits of a block whose first record is number `start` of the set."""
        self.found[hits.known] = True
        self.records += len(np.unique(hits.records))
        for row in range(min(len(hits.records), EXAMPLES - len(self.examples))):
            example = Example((int(start + hits.records[row]),), (int(hits.texts[row]),))
            self.examples.append((example, int(hits.known[row])))


def read_evaluation(path: str, processes: int | None) -> EvaluationSet:
    """Hash an evaluation set: a BEIR folder (queries judged in `qrels/test.tsv`, or all without that file; documents
    of the corpus with their title and without), or records (positives and negatives are documents).

    Raises:
        DataError: a file is missing, has a bad line or no texts, or a worker was ended from outside.
    """
    judged = _judged_queries(Path(path))
    hashes: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    places: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    names: list[str] = []
    how = {"processes": processes, "start": _start, "start_arguments": (judged,), "what": path}
    for name, found in ordered_map(_scan, _reads(path), **how):
        if name not in names:
            names.append(name)
        for kind, (some, lines) in found.items():
            hashes[kind].append(some)
            places[kind].append(np.stack([np.full(len(lines), names.index(name), np.uint32), lines]))
    known, where = {}, {}
    for kind in KINDS:
        all_hashes = np.concatenate(hashes[kind] or [np.empty(0, np.uint64)])
        known[kind], first = np.unique(all_hashes, return_index=True)
        files, lines = np.concatenate(places[kind] or [np.empty((2, 0), np.uint32)], axis=1)[:, first]
        where[kind] = Places(names, files, lines)
    if not any(map(len, known.values())):
        raise DataError(f"{path} holds no records")
    return EvaluationSet(path, Known(**known), where)


def _reads(path: str) -> Iterator[Read]:
    corpus, queries, _ = beir_files(Path(path), "test")
    if corpus.is_file() and queries.is_file():
        for kind, file in (("queries", queries), ("documents", corpus)):
            yield from ((kind, block) for block in files.blocks(file))
    else:
        yield from (("records", block) for block in blocks(path))


def _judged_queries(folder: Path) -> np.ndarray | None:
    """Hashes of the ids of the test queries, sorted; None where nothing says which they are."""
    _, _, path = beir_files(folder, "test")
    if not path.is_file():
        return None
    lines = (raw for block in line_blocks(path) for _, _, raw in numbered_lines(block))
    return np.sort(hashes_of({raw.split(b"\t")[0].decode("utf-8", "replace") for raw in lines}))


_JUDGED: np.ndarray | None = None


def _start(judged: np.ndarray | None) -> None:
    global _JUDGED
    _JUDGED = judged


def _scan(item: Read) -> tuple[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """The file of a block, and for each kind hashes of normalised texts and their lines, uint64 and uint32."""
    kind, block = item
    found = _record_texts(block) if kind == "records" else {kind: _beir_texts(kind, block)}
    return block.path, {
        kind: (hashes_of(normalised(text) for _, text in texts), np.array([line for line, _ in texts], np.uint32))
        for kind, texts in found.items()
    }


def _record_texts(block: Block) -> dict[str, list[tuple[int, str]]]:
    parsed = parse_block(block)
    for line, column, reason in parsed.problems:
        raise DataError(f"{block.path}:{line}:{column}: {reason}")
    pairs = list(zip(parsed.lines, parsed.records, strict=True))
    return {
        "queries": [(line, record.query) for line, record in pairs],
        "documents": [(line, text) for line, record in pairs for text in (*record.pos, *record.neg)],
    }


def _beir_texts(kind: str, block: Block) -> list[tuple[int, str]]:
    texts = []

    def refuse(line: int, column: int, reason: str) -> None:
        raise DataError(f"{block.path}:{line}:{column}: {reason}")

    for line, row, column_of in rows(block, refuse):
        try:
            if kind == "documents":
                whole = document_text(row)
                texts += [(line, text) for text in dict.fromkeys((whole, row["text"].strip())) if text]
            elif _is_judged(required_text(row, "_id")):
                texts.append((line, required_text(row, "text")))
        except Fault as fault:
            refuse(line, column_of(fault.field), fault.reason)
    return texts


def _is_judged(name: str) -> bool:
    if _JUDGED is None:
        return True
    (number,) = hashes_of([name])
    at = np.searchsorted(_JUDGED, number)
    return bool(at < len(_JUDGED) and _JUDGED[at] == number)
