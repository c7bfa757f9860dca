"""Rows of data files: which formats there are, and what is wrong with a line.

A file is cut into blocks that other processes can parse: the process that reads hands them on as bytes, so a format
that must be read from its beginning (gzip) is parsed by all cores too. A row's place is its line counted from 1 (of a
Parquet file its row) and the column where a field stands.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK_BYTES = 1 << 22
"""A block of lines ends at the first line end behind so many bytes."""
BLOCK_ROWS = 8192
"""Rows of a block of a Parquet file."""
_SHOWN = 10

Row = tuple[int, dict[str, Any], Callable[[str], int]]
"""A row of a file: its line, its fields, and the column where a field stands."""


class DataError(ValueError):
    """A data file cannot be used; the message names the file, the lines and what is wrong with them."""


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of a file, not yet parsed.

    Attributes:
        path: the file, as messages name it.
        kind: what `content` is: `lines` of JSON, or an `arrow` stream with one batch.
        first: number of its first line or row, from 1.
        offset: place of its first byte in the (uncompressed) file; 0 for `arrow`.
        content: whole lines, or the stream.
    """

    path: str
    kind: str
    first: int
    offset: int
    content: bytes


@dataclass(slots=True)
class Problems:
    """Bad lines of one file: all counted, the first few kept.

    Attributes:
        path: the file.
        allowed: so many bad lines are no error.
    """

    path: Path | str
    allowed: int = 0
    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, line: int, column: int, reason: str) -> None:
        self.count += 1
        if len(self.shown) < _SHOWN:
            self.shown.append(f"  {self.path}:{line}:{column}: {reason}")

    @property
    def too_many(self) -> bool:
        return self.count > self.allowed

    def raise_if_too_many(self) -> None:
        if self.too_many:
            raise DataError(self.message())

    def message(self) -> str:
        """What is wrong, one line for each of the first few."""
        head = f"{self.path} has {self.count} bad line{'s' if self.count > 1 else ''}"
        if self.allowed:
            head += f", {self.allowed} allowed"
        if self.count > len(self.shown):
            head += f", the first {len(self.shown)}"
        return "\n".join([f"{head}:", *self.shown])


def blocks(path: str | Path) -> Iterator[Block]:
    """The rows of a JSON Lines (`.jsonl`, `.jsonl.gz`) or Parquet file as blocks, in order.

    Raises:
        DataError: the file is missing, cannot be read, or is of an unknown kind.
    """
    path = Path(path)
    return _arrow_blocks(path) if path.name.endswith(".parquet") else _line_blocks(path)


def rows(block: Block, add_problem: Callable[[int, int, str], None]) -> Iterator[Row]:
    """The rows of a block; `add_problem(line, column, reason)` is called for lines that hold none."""
    return _json_rows(block, add_problem) if block.kind == "lines" else _arrow_rows(block, add_problem)


def numbered_lines(block: Block) -> Iterator[tuple[int, int, bytes]]:
    """Number (from 1), byte offset and bytes of each line, without line end and byte order mark."""
    offset = block.offset
    for number, raw in enumerate(io.BytesIO(block.content), start=block.first):
        mark = 3 if number == 1 and raw.startswith(b"\xef\xbb\xbf") else 0
        yield number, offset + mark, raw[mark:].rstrip(b"\r\n")
        offset += len(raw)


def _line_blocks(path: Path) -> Iterator[Block]:
    if not path.name.endswith((".jsonl", ".json", ".jsonl.gz", ".tsv")):
        raise DataError(f"{path}: a data file ends in .jsonl, .jsonl.gz or .parquet")
    opener = gzip.open if path.name.endswith(".gz") else open
    first, offset = 1, 0
    try:
        with opener(path, "rb") as stream:
            while content := stream.read(BLOCK_BYTES):
                content += stream.readline()
                yield Block(str(path), "lines", first, offset, content)
                first += content.count(b"\n")
                offset += len(content)
    except FileNotFoundError as error:
        raise DataError(f"no data file at {path}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _arrow_blocks(path: Path) -> Iterator[Block]:
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise DataError(f"no data file at {path}")
    first = 1
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BLOCK_ROWS):
                sink = io.BytesIO()
                with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
                    writer.write_batch(batch)
                yield Block(str(path), "arrow", first, 0, sink.getvalue())
                first += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path} as Parquet: {error}") from error


def _arrow_rows(block: Block, add_problem: Callable[[int, int, str], None]) -> Iterator[Row]:
    import pyarrow

    with pyarrow.ipc.open_stream(block.content) as stream:
        batch = stream.read_next_batch()
    columns = batch.schema.names
    for index in range(batch.num_rows):
        number = block.first + index
        try:
            row = {name: batch.column(name)[index].as_py() for name in columns}
        except UnicodeDecodeError as error:
            add_problem(number, 1, f"not UTF-8: byte {error.start} of a value ({error.reason})")
            continue
        yield number, row, lambda name: columns.index(name) + 1 if name in columns else 1


def _json_rows(block: Block, add_problem: Callable[[int, int, str], None]) -> Iterator[Row]:
    """The JSON objects of a block."""
    for number, offset, raw in numbered_lines(block):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"byte {offset + error.start} of the file is 0x{raw[error.start]:02x}"
            add_problem(number, error.start + 1, f"not UTF-8: {where} ({error.reason})")
            continue
        if not line.strip():
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
            else:
                add_problem(number, 1, f"not a JSON object but {kind_of(row)}")


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


def kind_of(value: Any) -> str:
    """A value's type in JSON's words."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    names = {int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
