"""Rows of one data file: which formats there are, and how a file is cut into blocks.

Text is UTF-8 with or without a byte order mark, plain or compressed (`.gz`, `.bz2`, `.xz`, `.zst`):

    .jsonl, .json     one JSON object, or one list of strings, a line
    .csv              a header, commas, quotes as in RFC 4180: a quoted cell may hold commas, quotes, line ends
    .tsv              a header, tabs, no quotes: what stands between two tabs is the cell
    .parquet          columns

A file is cut into blocks that other processes can parse: the process that reads hands them on as bytes, so a format
that must be read from its beginning (gzip) is parsed by all cores too. A row's place is its line counted from 1 (of a
Parquet file its row) and the column where a field stands.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from nvembed_mcore.data import cells
from nvembed_mcore.data.faults import DataError, kind_of
from nvembed_mcore.progress import progress

if TYPE_CHECKING:
    import pyarrow

    from nvembed_mcore.data.layouts import Layout

BLOCK_BYTES = 1 << 22
"""A block of lines ends at the first line end (of CSV: the last row's end) behind so many bytes."""
BLOCK_ROWS = 8192
"""Rows of a block of a Parquet file, if they are not larger than `BLOCK_BYTES`."""
# Bytes: neither a line that does not end nor a quote that nobody closes may read a large file into memory.
_LONGEST_LINE, _LONGEST_ROW = 1 << 28, 1 << 26

_READ_BYTES = 1 << 20  # of each column of a Parquet file at a time

_KINDS = {".jsonl": "lines", ".json": "lines", ".csv": "csv", ".tsv": "tsv", ".parquet": "arrow"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
"""Endings that a text file may have behind its own."""
_NAMES = (
    "a data file ends in .jsonl, .json, .csv, .tsv or .parquet; of text also in .gz, .bz2, .xz or .zst behind that"
)

Row = tuple[int, dict[str, Any], Callable[[str], int]]
"""A row of a file: its line, its fields, and the column where a field stands."""
AddProblem = Callable[[int, int, str], None]
"""Is called with line, column and reason of what holds no row."""
Select = Callable[[Sequence[str]], Sequence[str]]
"""Of the columns of a table those to read."""


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of a file, not yet parsed.

    Attributes:
        path: the file, as messages name it.
        kind: what `content` is: `lines` of JSON, rows of `csv` or `tsv` without the header, or an `arrow` stream.
        first: number of its first line or row, from 1.
        offset: place of its first byte in the (uncompressed) file; 0 for `arrow`.
        content: whole rows, or the stream.
        columns: names of all columns of a table, in the file's order.
        layout: how the rows hold records; None: not looked at.
        documents: texts of documents that the rows name by id, where the layout says that they do.
    """

    path: str
    kind: str
    first: int
    offset: int
    content: bytes
    columns: tuple[str, ...] = ()
    layout: Layout | None = None
    documents: dict[str, str] | None = None


def kind_of_file(path: Path) -> str | None:
    """The kind of a file's blocks by its name; None: no data file."""
    name = path.name
    for compression in COMPRESSIONS:
        if name.endswith(compression):
            kind = _KINDS.get(Path(name.removesuffix(compression)).suffix)
            return None if kind == "arrow" else kind
    return _KINDS.get(path.suffix)


def blocks(path: str | Path, select: Select | None = None) -> Iterator[Block]:
    """The rows of one file as blocks, in order.

    Args:
        path: a file of a kind that this module's head lists.
        select: of the columns of a Parquet file those to read; None: all.

    Raises:
        DataError: the file is missing, cannot be read, is of an unknown kind, or has a header that cannot be used.
    """
    path = Path(path)
    kind = kind_of_file(path)
    if kind is None:
        raise DataError(f"{path}: {_NAMES}")
    if kind == "arrow":
        return _parquet_blocks(path, select)
    return _json_blocks(path) if kind == "lines" else _table_blocks(path, kind)


def line_blocks(path: str | Path) -> Iterator[Block]:
    """The lines of a text file, whatever they hold, without the byte order mark.

    Raises:
        DataError: the file is missing or cannot be read, or a line is too long to be one of a record.
    """
    path = Path(path)
    first, offset = 1, 0
    try:
        with opened(path) as (stream, file), progress(f"read {path.name}", _megabytes(path), "MB") as shown:
            while content := stream.read(BLOCK_BYTES):
                shown.update(file.tell() / 1e6)
                rest = stream.readline(_LONGEST_LINE)
                content += rest
                if len(rest) == _LONGEST_LINE and not rest.endswith(b"\n"):
                    line = first + content.count(b"\n")
                    raise DataError(f"{path}:{line}:1: a line of more than {_LONGEST_LINE} bytes")
                mark = 3 if offset == 0 and content.startswith(b"\xef\xbb\xbf") else 0
                yield Block(str(path), "lines", first, offset + mark, content[mark:])
                first += content.count(b"\n")
                offset += len(content)
    except FileNotFoundError as error:
        raise DataError(f"no data file at {path}") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def rows(block: Block, add_problem: AddProblem) -> Iterator[Row]:
    """The rows of a block; `add_problem(line, column, reason)` is called for lines that hold none."""
    if block.kind == "lines":
        return _json_rows(block, add_problem)
    return _arrow_rows(block, add_problem) if block.kind == "arrow" else cells.rows(block, add_problem)


def numbered_lines(block: Block) -> Iterator[tuple[int, int, bytes]]:
    """Number (from 1), byte offset and bytes of each line, without line end."""
    offset = block.offset
    for number, raw in enumerate(io.BytesIO(block.content), start=block.first):
        yield number, offset, raw.rstrip(b"\r\n")
        offset += len(raw)


@contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """A file's bytes, uncompressed, and the file itself, whose `tell` says how far it is read."""
    with path.open("rb") as file, _uncompressed(file, path.suffix) as stream:
        yield stream, file


def _uncompressed(file: IO[bytes], suffix: str) -> IO[bytes]:
    if suffix == ".zst":
        import pyarrow

        # Not the zstandard package: its reader takes a file that was cut off for a whole one.
        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers[suffix](file) if suffix in openers else file


def _megabytes(path: Path) -> float:
    return path.stat().st_size / 1e6


def _json_blocks(path: Path) -> Iterator[Block]:
    for block in line_blocks(path):
        if block.first == 1 and ".json" in path.suffixes and re.match(rb"\s*\[\s*\{", block.content):
            raise DataError(f"{path} holds one JSON list, not JSON Lines: write each item of it in a line of its own")
        yield block


def _table_blocks(path: Path, kind: str) -> Iterator[Block]:
    """Blocks of a file with a header, which goes with each of them."""
    columns: tuple[str, ...] | None = None
    for block in line_blocks(path) if kind == "tsv" else _whole_rows(path):
        block = replace(block, kind=kind)
        if columns is None:
            columns, block = cells.without_header(block)
        if block.content:
            yield replace(block, columns=columns)


def _whole_rows(path: Path) -> Iterator[Block]:
    """Blocks of a CSV file, which end where a row ends, not within a quoted cell."""
    pending: Block | None = None
    for block in line_blocks(path):
        if pending:
            block = replace(pending, content=pending.content + block.content)
        end = cells.last_row_end(block.content)
        if end:
            yield replace(block, content=block.content[:end])
        first = block.first + block.content.count(b"\n", 0, end)
        pending = replace(block, first=first, offset=block.offset + end, content=block.content[end:])
        if len(pending.content) > _LONGEST_ROW:
            raise DataError(f"{path}:{first}:1: a row of more than {_LONGEST_ROW} bytes: a quote in it is not closed")
    if pending and pending.content:
        yield pending


def _parquet_blocks(path: Path, select: Select | None) -> Iterator[Block]:
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise DataError(f"no data file at {path}")
    try:
        # Through a buffer: else each column of a row group, which may be most of the file, is in memory as a whole.
        with pyarrow.parquet.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False) as file:
            columns = tuple(file.schema_arrow.names)
            wanted = list(select(columns)) if select else None
            first = 1
            with progress(f"read {path.name}", file.metadata.num_rows, "rows") as shown:
                for batch in file.iter_batches(batch_size=BLOCK_ROWS, columns=wanted):
                    yield from arrow_blocks(str(path), first, columns, batch)
                    first += batch.num_rows
                    shown.update(first - 1)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path} as Parquet: {error}") from error


def arrow_blocks(path: str, first: int, columns: tuple[str, ...], batch: pyarrow.RecordBatch) -> Iterator[Block]:
    """A batch of rows as blocks of about `BLOCK_BYTES` at most.

    Args:
        path: what messages name.
        first: number of the batch's first row.
        columns: all columns of the table, of which the batch has some.
    """
    import pyarrow

    step = max(1, batch.num_rows * BLOCK_BYTES // max(batch.nbytes, BLOCK_BYTES))
    for start in range(0, batch.num_rows, step):
        sink = io.BytesIO()
        with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch.slice(start, step))
        yield Block(path, "arrow", first + start, 0, sink.getvalue(), columns)


def _arrow_rows(block: Block, add_problem: AddProblem) -> Iterator[Row]:
    import pyarrow

    with pyarrow.ipc.open_stream(block.content) as stream:
        batch = stream.read_next_batch()
    names = batch.schema.names

    def column_of(name: str) -> int:
        return block.columns.index(name) + 1 if name in block.columns else 1

    try:
        values = [column.to_pylist() for column in batch.columns]
    except UnicodeDecodeError:  # somewhere: look for the rows
        for index in range(batch.num_rows):
            try:
                row = {name: batch.column(name)[index].as_py() for name in names}
            except UnicodeDecodeError as error:
                reason = f"not UTF-8: byte {error.start} of a value ({error.reason})"
                add_problem(block.first + index, 1, reason)
            else:
                yield block.first + index, row, column_of
        return
    for number, row in enumerate(zip(*values, strict=True), start=block.first):
        yield number, dict(zip(names, row, strict=True)), column_of


def _json_rows(block: Block, add_problem: AddProblem) -> Iterator[Row]:
    """The JSON objects of a block; of a list of strings the items, named [0], [1], ..."""
    for number, line in _text_lines(block, add_problem):
        if not line or line.isspace():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            add_problem(number, error.colno, f"not JSON: {error.msg}")
        except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
            add_problem(number, 1, f"not usable JSON: {error}")
        else:
            if isinstance(row, dict):
                yield number, row, lambda name, line=line: column_of(line, name)
            elif isinstance(row, list) and len(row) > 1 and all(isinstance(item, str) for item in row):
                yield number, {f"[{index}]": item for index, item in enumerate(row)}, lambda name: 1
            else:
                add_problem(number, 1, f"not a JSON object but {kind_of(row)}")


def _text_lines(block: Block, add_problem: AddProblem) -> Iterator[tuple[int, str]]:
    """Number and text of each line."""
    try:
        lines = block.content.decode().split("\n")
    except UnicodeDecodeError:  # somewhere: look for the lines
        for number, offset, raw in numbered_lines(block):
            try:
                yield number, raw.decode()
            except UnicodeDecodeError as error:
                where = f"byte {offset + error.start} of the file is 0x{raw[error.start]:02x}"
                add_problem(number, error.start + 1, f"not UTF-8: {where} ({error.reason})")
    else:
        yield from enumerate(lines, start=block.first)


def column_of(line: str, name: str) -> int:
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


def hash_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file, progress(f"hash {path.name}", _megabytes(path), "MB") as shown:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                shown.update(file.tell() / 1e6)
    except FileNotFoundError as error:
        raise DataError(f"no data file at {path}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return digest.hexdigest()
