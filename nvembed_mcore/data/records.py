"""Training records: what a row must hold, and saying exactly what is wrong with a file.

A record is `{"query": str, "pos": [str, ...], "neg": [str, ...]}` with optional `query_id`, `pos_ids` and `neg_ids`;
other fields are ignored. All bad lines of a file are counted and the first ten shown before one `DataError` is raised,
so that a file is repaired in one go.
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

from nvembed_mcore.data.files import Block, DataError, Problems, blocks, kind_of, rows

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Record:
    """One query with its positives (at least one) and hard negatives, none of them blank.

    `pos_ids` and `neg_ids` name the documents, one id each; documents that are the same text share an id. What the
    file does not name gets `content_id` of the text.
    """

    query: str
    pos: tuple[str, ...]
    neg: tuple[str, ...]
    query_id: str
    pos_ids: tuple[str, ...]
    neg_ids: tuple[str, ...]


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
        records: its good records.
        lines: where each of them stands, counted from 1.
        problems: line, column and reason of each bad line.
        blank_negatives: negatives without text, which are left out.
    """

    records: list[Record] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    problems: list[tuple[int, int, str]] = field(default_factory=list)
    blank_negatives: int = 0


def content_id(text: str) -> str:
    """The id of a text that was given none: 16 hex digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_records(path: str | Path, tally: Tally | None = None, *, max_bad_records: int = 0) -> Iterator[Record]:
    """The records of a JSON Lines (`.jsonl`, `.jsonl.gz`) or Parquet file, in order.

    Blocks are yielded until there are more bad lines than allowed; from that block on bad lines are only counted, and
    the end of the file raises. Blank lines and a byte order mark are skipped, blank negatives left out.

    Args:
        path: the file.
        tally: is filled with what was read.
        max_bad_records: so many bad lines are left out with a warning.

    Raises:
        DataError: the file is missing or of an unknown kind, holds no record, or has too many bad lines.
    """
    tally = Tally() if tally is None else tally
    problems = Problems(path, allowed=max_bad_records)
    for block in blocks(path):
        parsed = parse_block(block)
        for problem in parsed.problems:
            problems.add(*problem)
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


def parse_block(block: Block) -> Parsed:
    """The records of a block and what is wrong with its other lines."""
    parsed = Parsed()

    def add_problem(line: int, column: int, reason: str) -> None:
        parsed.problems.append((line, column, reason))

    for line, row, column_of in rows(block, add_problem):
        try:
            record, blank = _record(row)
        except Fault as fault:
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


def validate(path: str | Path) -> Tally:
    """Read a whole file of records and count what is in it.

    Raises:
        DataError: as `read_records`.
    """
    tally = Tally()
    for _ in read_records(path, tally):
        pass
    return tally


class Fault(Exception):
    """What is wrong with one row, and the field to point at."""

    def __init__(self, reason: str, field: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.field = field


def _record(row: dict[str, Any]) -> tuple[Record, int]:
    """Check one row; the record in it, and how many blank negatives were left out."""
    query = required_text(row, "query")
    pos, pos_ids = _documents(row, "pos")
    for index, text in enumerate(pos):
        if not text.strip():
            raise Fault(f"pos[{index}] is blank", "pos")
    if not pos:
        raise Fault("pos is empty: a record needs at least one positive", "pos")
    neg, neg_ids = _documents(row, "neg") if row.get("neg") is not None else ((), ())
    kept = [index for index, text in enumerate(neg) if text.strip()]
    blank = len(neg) - len(kept)
    neg, neg_ids = tuple(neg[index] for index in kept), tuple(neg_ids[index] for index in kept)
    query_id = required_text(row, "query_id") if row.get("query_id") is not None else content_id(query)
    return Record(query, pos, neg, query_id, pos_ids, neg_ids), blank


def _documents(row: dict[str, Any], name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Texts and ids of one list of documents."""
    texts = _strings(row, name)
    ids_name = f"{name}_ids"
    if row.get(ids_name) is None:
        return texts, tuple(content_id(text) for text in texts)
    ids = _strings(row, ids_name)
    if len(ids) != len(texts):
        raise Fault(f"{ids_name} has {len(ids)} ids for the {len(texts)} texts of {name}", ids_name)
    for index, value in enumerate(ids):
        if not value.strip():
            raise Fault(f"{ids_name}[{index}] is blank", ids_name)
    return texts, ids


def required_text(row: dict[str, Any], name: str) -> str:
    """A field that must hold a string with more than spaces."""
    if row.get(name) is None:
        raise Fault(f"{name} is missing" if name not in row else f"{name} is null", name)
    check_string(row[name], name, name)
    if not row[name].strip():
        raise Fault(f"{name} is empty", name)
    return row[name]


def _strings(row: dict[str, Any], name: str) -> tuple[str, ...]:
    if name not in row:
        raise Fault(f"{name} is missing", name)
    values = row[name]
    if not isinstance(values, list):
        raise Fault(f"{name} must be a list of strings, got {kind_of(values)}", name)
    for index, value in enumerate(values):
        check_string(value, f"{name}[{index}]", name)
    return tuple(values)


def check_string(value: Any, label: str, name: str) -> None:
    if not isinstance(value, str):
        raise Fault(f"{label} must be a string, got {kind_of(value)}", name)
    if "\0" in value:
        raise Fault(f"{label} holds a NUL character (U+0000) at character {value.index(chr(0)) + 1}", name)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            code = f"U+{ord(value[error.start]):04X}"
            raise Fault(f"{label} holds a lone surrogate ({code}) at character {error.start + 1}", name) from error
