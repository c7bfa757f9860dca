"""Training records and BEIR test sets: reading, and saying exactly what is wrong with a file.

A record is `{"query": str, "pos": [str, ...], "neg": [str, ...]}` with optional `query_id`, `pos_ids` and `neg_ids`;
other fields are ignored. All bad lines of a file are counted and the first ten shown before one `DataError` is raised,
so that a file is repaired in one go.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LOG = logging.getLogger(__name__)
_SHOWN = 10
_FIELDS = ("query", "pos", "neg", "query_id", "pos_ids", "neg_ids")


class DataError(ValueError):
    """A data file cannot be used; the message names the file, the lines and what is wrong with them."""


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


@dataclass(frozen=True)
class BeirSet:
    """A test set in BEIR's format.

    Attributes:
        corpus: document id -> title, a space, and text (or what there is of them).
        queries: query id -> text, for the queries that have judgements.
        qrels: query id -> document id -> relevance.
    """

    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


def content_id(text: str) -> str:
    """The id of a text that was given none: 16 hex digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_records(path: str | Path, tally: Tally | None = None) -> Iterator[Record]:
    """The records of a JSON Lines (`.jsonl`, `.jsonl.gz`) or Parquet file, in order.

    Records are yielded until the first bad line; from there on bad lines are only counted, and the end of the file
    raises. Blank lines and a byte order mark are skipped, blank negatives left out.

    Args:
        path: the file.
        tally: is filled with what was read.

    Raises:
        DataError: the file is missing or of an unknown kind, holds no record, or has bad lines.
    """
    path = Path(path)
    tally = Tally() if tally is None else tally
    problems = _Problems(path)
    rows = _parquet_rows(path, problems) if path.name.endswith(".parquet") else _json_rows(path, problems)
    for where, row, column_of in rows:
        try:
            record = _record(row, tally)
        except _Fault as fault:
            problems.add(where, column_of(fault.field), fault.reason)
            continue
        if not problems.count:
            tally.records += 1
            tally.positives += len(record.pos)
            tally.negatives += len(record.neg)
            yield record
    problems.raise_if_any()
    if not tally.records:
        raise DataError(f"{path} holds no records")
    if tally.blank_negatives:
        _LOG.warning("%s: %d blank negatives were left out", path, tally.blank_negatives)


def validate(path: str | Path) -> Tally:
    """Read a whole file of records and count what is in it.

    Raises:
        DataError: as `read_records`.
    """
    tally = Tally()
    for _ in read_records(path, tally):
        pass
    return tally


def read_beir(folder: str | Path, split: str = "test") -> BeirSet:
    """Read `corpus.jsonl`, `queries.jsonl` and `qrels/{split}.tsv` of a folder.

    Queries without judgements are left out. Documents without any text are left out, and judgements of documents that
    the corpus lacks are kept (such a document cannot be found, and counts as missed); both are counted and logged.

    Raises:
        DataError: a file is missing or empty, a line is bad, a query is blank, an id is used twice, or no judged
            document is in the corpus.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no BEIR folder at {folder}")
    corpus = {key: text for key, text in _read_id_text(folder / "corpus.jsonl", _document_text).items() if text}
    all_queries = _read_id_text(folder / "queries.jsonl", _query_text)
    qrels = _read_qrels(folder / "qrels" / f"{split}.tsv", all_queries)
    judged = [document for judgements in qrels.values() for document in judgements]
    unknown = sum(document not in corpus for document in judged)
    if unknown == len(judged):
        raise DataError(f"none of the {len(judged)} documents that {folder}/qrels judges is in {folder}/corpus.jsonl")
    if unknown:
        _LOG.warning("%s: %d of %d judged documents are missing or have no text", folder, unknown, len(judged))
    return BeirSet(corpus, {key: all_queries[key] for key in qrels}, qrels)


class _Fault(Exception):
    """What is wrong with one row, and the field to point at."""

    def __init__(self, reason: str, field: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.field = field


@dataclass
class _Problems:
    """Bad lines of one file: all counted, the first few kept."""

    path: Path
    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, line: int, column: int, reason: str) -> None:
        self.count += 1
        if len(self.shown) < _SHOWN:
            self.shown.append(f"  {self.path}:{line}:{column}: {reason}")

    def raise_if_any(self) -> None:
        if not self.count:
            return
        head = f"{self.path} has {self.count} bad line{'s' if self.count > 1 else ''}"
        if self.count > len(self.shown):
            head += f", the first {len(self.shown)}"
        raise DataError("\n".join([f"{head}:", *self.shown]))


# A row of a file: its line (or Parquet row) counted from 1, its fields, and the column where a field stands.
_Row = tuple[int, dict[str, Any], Callable[[str], int]]


def _json_rows(path: Path, problems: _Problems) -> Iterator[_Row]:
    """The JSON objects of a file; lines that hold none go to `problems`."""
    for number, offset, raw in _lines(path):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"byte {offset + error.start} of the file is 0x{raw[error.start]:02x}"
            problems.add(number, error.start + 1, f"not UTF-8: {where} ({error.reason})")
            continue
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problems.add(number, error.colno, f"not JSON: {error.msg}")
        except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
            problems.add(number, 1, f"not usable JSON: {error}")
        else:
            if isinstance(row, dict):
                yield number, row, lambda name, line=line: _column(line, name)
            else:
                problems.add(number, 1, f"not a JSON object but {_kind(row)}")


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number (from 1), byte offset and bytes of each line, without line end and byte order mark."""
    if not path.name.endswith((".jsonl", ".json", ".jsonl.gz", ".tsv")):
        raise DataError(f"{path}: a data file ends in .jsonl, .jsonl.gz or .parquet")
    opener = gzip.open if path.name.endswith(".gz") else open
    offset = 0
    try:
        with opener(path, "rb") as stream:
            for number, raw in enumerate(stream, start=1):
                mark = 3 if number == 1 and raw.startswith(b"\xef\xbb\xbf") else 0
                yield number, offset + mark, raw[mark:].rstrip(b"\r\n")
                offset += len(raw)
    except FileNotFoundError as error:
        raise DataError(f"no data file at {path}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _column(line: str, name: str) -> int:
    """The column (from 1) of the value of the last field `name` in a line that holds a JSON object, else 1."""
    decoder = json.JSONDecoder()
    column, position = 1, line.index("{") + 1
    while True:
        while line[position] in " \t\r\n,":
            position += 1
        if line[position] == "}":
            return column
        key, position = decoder.raw_decode(line, position)
        while line[position] in " \t\r\n:":
            position += 1
        if key == name:
            column = position + 1
        _, position = decoder.raw_decode(line, position)


def _parquet_rows(path: Path, problems: _Problems) -> Iterator[_Row]:
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise DataError(f"no data file at {path}")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in _FIELDS if name in file.schema_arrow.names]
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for index in range(batch.num_rows):
                    number += 1
                    try:
                        row = {name: batch.column(name)[index].as_py() for name in columns}
                    except UnicodeDecodeError as error:
                        problems.add(number, 1, f"not UTF-8: byte {error.start} of a value ({error.reason})")
                        continue
                    yield number, row, lambda name: columns.index(name) + 1 if name in columns else 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path} as Parquet: {error}") from error


def _record(row: dict[str, Any], tally: Tally) -> Record:
    """Check one row and make a record of it."""
    query = _text(row, "query")
    pos, pos_ids = _documents(row, "pos")
    for index, text in enumerate(pos):
        if not text.strip():
            raise _Fault(f"pos[{index}] is blank", "pos")
    if not pos:
        raise _Fault("pos is empty: a record needs at least one positive", "pos")
    neg, neg_ids = _documents(row, "neg") if row.get("neg") is not None else ((), ())
    kept = [index for index, text in enumerate(neg) if text.strip()]
    tally.blank_negatives += len(neg) - len(kept)
    neg, neg_ids = tuple(neg[index] for index in kept), tuple(neg_ids[index] for index in kept)
    query_id = _text(row, "query_id") if row.get("query_id") is not None else content_id(query)
    return Record(query, pos, neg, query_id, pos_ids, neg_ids)


def _documents(row: dict[str, Any], name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Texts and ids of one list of documents."""
    texts = _strings(row, name)
    ids_name = f"{name}_ids"
    if row.get(ids_name) is None:
        return texts, tuple(content_id(text) for text in texts)
    ids = _strings(row, ids_name)
    if len(ids) != len(texts):
        raise _Fault(f"{ids_name} has {len(ids)} ids for the {len(texts)} texts of {name}", ids_name)
    for index, value in enumerate(ids):
        if not value.strip():
            raise _Fault(f"{ids_name}[{index}] is blank", ids_name)
    return texts, ids


def _text(row: dict[str, Any], name: str) -> str:
    """A field that must hold a string with more than spaces."""
    if row.get(name) is None:
        raise _Fault(f"{name} is missing" if name not in row else f"{name} is null", name)
    _check_string(row[name], name, name)
    if not row[name].strip():
        raise _Fault(f"{name} is empty", name)
    return row[name]


def _strings(row: dict[str, Any], name: str) -> tuple[str, ...]:
    if name not in row:
        raise _Fault(f"{name} is missing", name)
    values = row[name]
    if not isinstance(values, list):
        raise _Fault(f"{name} must be a list of strings, got {_kind(values)}", name)
    for index, value in enumerate(values):
        _check_string(value, f"{name}[{index}]", name)
    return tuple(values)


def _check_string(value: Any, label: str, name: str) -> None:
    if not isinstance(value, str):
        raise _Fault(f"{label} must be a string, got {_kind(value)}", name)
    if "\0" in value:
        raise _Fault(f"{label} holds a NUL character (U+0000) at character {value.index(chr(0)) + 1}", name)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            code = f"U+{ord(value[error.start]):04X}"
            raise _Fault(f"{label} holds a lone surrogate ({code}) at character {error.start + 1}", name) from error


def _kind(value: Any) -> str:
    """A value's type in JSON's words."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    names = {int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _document_text(row: dict[str, Any]) -> str:
    for name in ("title", "text"):
        if row.get(name) is not None:
            _check_string(row[name], name, name)
    if row.get("text") is None:
        raise _Fault("text is missing", "text")
    return f"{row.get('title') or ''} {row['text']}".strip()


def _query_text(row: dict[str, Any]) -> str:
    return _text(row, "text")


def _read_id_text(path: Path, text_of: Callable[[dict[str, Any]], str]) -> dict[str, str]:
    """`_id` -> text of a JSON Lines file."""
    problems = _Problems(path)
    texts: dict[str, str] = {}
    for number, row, column_of in _json_rows(path, problems):
        try:
            key = _text(row, "_id")
            if key in texts:
                raise _Fault(f"_id {key!r} is used before", "_id")
            texts[key] = text_of(row)
        except _Fault as fault:
            problems.add(number, column_of(fault.field), fault.reason)
    problems.raise_if_any()
    if not texts:
        raise DataError(f"{path} holds no records")
    return texts


def _read_qrels(path: Path, queries: dict[str, str]) -> dict[str, dict[str, int]]:
    """Query id -> document id -> relevance, from lines `query-id TAB corpus-id TAB score` under a header."""
    problems = _Problems(path)
    qrels: dict[str, dict[str, int]] = {}
    for number, _, raw in _lines(path):
        cells = raw.decode("utf-8", errors="replace").split("\t")
        if number == 1 and cells[-1].strip() == "score" or not raw.strip():
            continue
        if len(cells) != 3:
            problems.add(number, 1, f"{len(cells)} columns, not query-id, corpus-id and score with tabs between")
        elif cells[0] not in queries:
            problems.add(number, 1, f"query {cells[0]!r} is not in queries.jsonl")
        else:
            column = len(cells[0]) + len(cells[1]) + 3
            try:
                qrels.setdefault(cells[0], {})[cells[1]] = int(cells[2])
            except ValueError:
                problems.add(number, column, f"the score must be a whole number, got {cells[2]!r}")
    problems.raise_if_any()
    if not qrels:
        raise DataError(f"{path} holds no records")
    return qrels
