"""Training records: what a row must hold, and saying exactly what is wrong with a data set.

A record is `{"query": str, "pos": [str, ...], "neg": [str, ...]}` with optional `query_id`, `pos_ids`, `neg_ids`,
`instruction`, and a teacher's `pos_scores` and `neg_scores`; other fields are ignored. Rows of other layouts become
such rows first (`layouts`). All bad lines of a data set are counted and the first ten shown before one `DataError` is
raised, so that it is repaired in one go.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvembed_mcore.data.faults import DataError, Fault, Problems, check_string, kind_of, required_text
from nvembed_mcore.data.files import Block, rows
from nvembed_mcore.data.sources import blocks

_LOG = logging.getLogger(__name__)
LARGEST_SCORE = 3e38
"""Scores are kept in float32."""
_NO_SCORES = (
    "pos_scores is missing, and loss.distillation needs a teacher's scores: `nvembed data score` writes them, and "
    "data.datasets.distill: false trains on this data set without"
)


@dataclass(frozen=True, slots=True)
class Record:
    """One query with its positives (at least one) and hard negatives, none of them blank.

    `pos_ids` and `neg_ids` name the documents, one id each; documents that are the same text share an id. What the
    file does not name gets `content_id` of the text. `instruction` is the query's own, where the data set's is not
    meant: of synthetic data each task has one. `pos_scores` and `neg_scores` are finite numbers, what a teacher scores
    each document; both or none.
    """

    query: str
    pos: tuple[str, ...]
    neg: tuple[str, ...]
    query_id: str
    pos_ids: tuple[str, ...]
    neg_ids: tuple[str, ...]
    instruction: str | None = None
    pos_scores: tuple[float, ...] | None = None
    neg_scores: tuple[float, ...] | None = None

    @property
    def scores(self) -> dict[str, tuple[float, ...]]:
        """The two fields by name, where there are any."""
        if self.pos_scores is None or self.neg_scores is None:
            return {}
        return {"pos_scores": self.pos_scores, "neg_scores": self.neg_scores}


@dataclass(slots=True)
class Tally:
    """What a file held: records, their documents, and blank negatives that were left out."""

    records: int = 0
    positives: int = 0
    negatives: int = 0
    blank_negatives: int = 0


@dataclass(slots=True)
class Parsed:
    """What a block held.

    Attributes:
        path: the file that it is of.
        records: its good records.
        lines: where each of them stands, counted from 1.
        problems: line, column and reason of each bad line.
        blank_negatives: negatives without text, which are left out.
    """

    path: str
    records: list[Record] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    problems: list[tuple[int, int, str]] = field(default_factory=list)
    blank_negatives: int = 0


def content_id(text: str) -> str:
    """The id of a text that was given none: 16 hex digits of its SHA-256."""
    return hashlib.sha256(text.encode()).digest()[:8].hex()


def read_records(path: str | Path, tally: Tally | None = None, *, max_bad_records: int = 0) -> Iterator[Record]:
    """The records of a data set in any of the known layouts and formats, in order.

    Blocks are yielded until there are more bad lines than allowed; from that block on bad lines are only counted, and
    the end of the file raises. Blank lines and a byte order mark are skipped, blank negatives left out.

    Args:
        path: a file, a folder, or `hf:NAME[:CONFIG[:SPLIT]]` (`sources.blocks`).
        tally: is filled with what was read.
        max_bad_records: so many bad lines are left out with a warning.

    Raises:
        DataError: the data set is missing or of an unknown kind or layout, holds no record, or has too many bad
            lines.
    """
    tally = Tally() if tally is None else tally
    problems = Problems(path, allowed=max_bad_records)
    for block in blocks(path):
        parsed = parse_block(block)
        for problem in parsed.problems:
            problems.add(*problem, path=parsed.path)
        tally.blank_negatives += parsed.blank_negatives
        for record in () if problems.too_many else parsed.records:
            tally.records += 1
            tally.positives += len(record.pos)
            tally.negatives += len(record.neg)
            yield record
    problems.raise_if_too_many()
    if not tally.records:
        raise DataError(f"{path} holds no records")
    if problems.count:
        _LOG.warning("%s", problems.message())
    if tally.blank_negatives:
        _LOG.warning("%s: %d blank negatives were left out", path, tally.blank_negatives)


def parse_block(block: Block, *, needs_scores: bool = False) -> Parsed:
    """The records of a block of `sources.blocks`, and what is wrong with its other lines.

    Args:
        needs_scores: a record without a teacher's scores is a bad line.
    """
    parsed, layout = Parsed(block.path), block.layout
    assert layout, "sources.blocks says of each block how it holds records; files.blocks does not"

    def add_problem(line: int, column: int, reason: str) -> None:
        parsed.problems.append((line, column, reason))

    for line, row, column_of in rows(block, add_problem):
        try:
            record, blank = _record(layout.record_row(row, block.documents), needs_scores)
        except Fault as fault:
            fault = layout.fault_of(fault, row)
            add_problem(line, column_of(fault.field), fault.reason)
            continue
        parsed.blank_negatives += blank
        parsed.records.append(record)
        parsed.lines.append(line)
    return parsed


def write_records(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows as JSON Lines, aside first, so that nobody sees half a file; returns how many there were."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    count = 0
    try:
        with aside.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return count


def _record(row: Mapping[str, Any], needs_scores: bool) -> tuple[Record, int]:
    """Check one row; the record in it, and how many blank negatives were left out."""
    query = required_text(row, "query")
    pos, pos_ids = _documents(row, "pos")
    for index, text in enumerate(pos):
        if not text or text.isspace():
            raise Fault(f"pos[{index}] is blank", "pos")
    if not pos:
        raise Fault("pos is empty: a record needs at least one positive", "pos")
    neg, neg_ids = _documents(row, "neg") if row.get("neg") is not None else ((), ())
    scores = scores_of(row, {"pos": len(pos), "neg": len(neg)})
    if needs_scores and not scores:
        raise Fault(_NO_SCORES, "pos_scores")
    blank = sum(not text or text.isspace() for text in neg)
    if blank:
        kept = [index for index, text in enumerate(neg) if text.strip()]
        neg, neg_ids = tuple(neg[index] for index in kept), tuple(neg_ids[index] for index in kept)
        scores = scores and scores | {"neg_scores": tuple(scores["neg_scores"][index] for index in kept)}
    query_id = required_text(row, "query_id") if row.get("query_id") is not None else content_id(query)
    instruction = row.get("instruction")
    if instruction is not None:
        check_string(instruction, "instruction", "instruction")
    return Record(query, pos, neg, query_id, pos_ids, neg_ids, instruction, **scores), blank


def scores_of(row: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, tuple[float, ...]]:
    """`pos_scores` and `neg_scores` of a row, one for each document; nothing where there are none.

    Args:
        counts: `pos` and `neg` -> documents of the row.

    Raises:
        Fault: there is no score, or no usable one, for some document.
    """
    given = [f"{name}_scores" for name in counts if row.get(f"{name}_scores") is not None]
    found = {}
    for name, count in counts.items() if given else ():
        field = f"{name}_scores"
        values = row.get(field)
        if values is None and count:
            raise Fault(f"{field} is missing beside {given[0]}", given[0])
        values = [] if values is None else values
        if not isinstance(values, list):
            raise Fault(f"{field} must be a list of numbers, got {kind_of(values)}", field)
        if len(values) != count:
            raise Fault(f"{field} has {len(values)} scores for the {count} texts of {name}", field)
        for index, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise Fault(f"{field}[{index}] must be a number, got {kind_of(value)}", field)
            if not -LARGEST_SCORE <= value <= LARGEST_SCORE:  # nor NaN
                raise Fault(f"{field}[{index}] must be a finite number of float32, got {value:.6g}", field)
        found[field] = tuple(map(float, values))
    return found


def _documents(row: Mapping[str, Any], name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Texts and ids of one list of documents; an id may be null, as if there were none."""
    texts = _strings(row, name)
    ids_name = f"{name}_ids"
    ids = row.get(ids_name)
    if ids is None:
        return texts, tuple(map(content_id, texts))
    if isinstance(ids, list) and None in ids and len(ids) == len(texts):
        named = zip(texts, ids, strict=True)
        row = {ids_name: [content_id(text) if value is None else value for text, value in named]}
    ids = _strings(row, ids_name)
    if len(ids) != len(texts):
        raise Fault(f"{ids_name} has {len(ids)} ids for the {len(texts)} texts of {name}", ids_name)
    for index, value in enumerate(ids):
        if not value.strip():
            raise Fault(f"{ids_name}[{index}] is blank", ids_name)
    return texts, ids


def _strings(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    if name not in row:
        raise Fault(f"{name} is missing", name)
    values = row[name]
    if not isinstance(values, list):
        raise Fault(f"{name} must be a list of strings, got {kind_of(values)}", name)
    for index, value in enumerate(values):
        if not isinstance(value, str) or not value.isascii() or "\0" in value:  # the label costs more than the check
            check_string(value, f"{name}[{index}]", name)
    return tuple(values)
