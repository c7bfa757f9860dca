"""Rows of tables in text: CSV with quotes as in RFC 4180, and TSV without any.

Cells are found by one expression, in the process that cuts a file into blocks and in those that parse them, so both
agree where a row ends even where quotes are out of order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nvembed_mcore.data.faults import DataError, Fault
from nvembed_mcore.data.layouts import parse_cell

if TYPE_CHECKING:
    from nvembed_mcore.data.files import AddProblem, Block, Row

_CSV = re.compile(rb'(?:"(?P<quoted>[^"]*(?:""[^"]*)*)(?P<close>"|\Z))?(?P<plain>[^,\n]*)(?P<end>,|\n|\Z)')
# Of the same parts, though nothing is quoted.
_TSV = re.compile(rb"(?P<quoted>(?!))?(?P<plain>[^\t\n]*)(?P<end>\t|\n|\Z)")
_ROW_ENDS = (b"\n", b"")

Cells = list[re.Match[bytes]]


class _BadCell(Exception):
    """What is wrong with a cell, and the place of it in the block."""

    def __init__(self, reason: str, place: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.place = place


def last_row_end(content: bytes) -> int:
    """The place behind the last line end of CSV that is not within a quoted cell; `content` begins with a row."""
    if b'"' not in content:
        return content.rfind(b"\n") + 1
    end = 0
    for cell in _CSV.finditer(content):
        if cell["end"] == b"\n":
            end = cell.end()
    return end


def without_header(block: Block) -> tuple[tuple[str, ...], Block]:
    """The names of the columns, and the block behind them.

    Raises:
        DataError: the header is not UTF-8, has quotes out of order, or a column without a name or two of one name.
    """
    header = next(_rows_of_cells(block), [])
    names: list[str] = []
    for cell in header:
        try:
            name = _text(block, cell)
            if not name or name in names:
                reason = f"two columns are named {name!r}" if name else "a column has no name"
                raise _BadCell(reason, cell.start())
        except _BadCell as bad:
            line, column = _line_and_column(block, block.first, header, bad.place)
            raise DataError(f"{block.path}:{line}:{column}: the header: {bad.reason}") from bad
        names.append(name)
    end = header[-1].end() if header else 0
    first = block.first + block.content.count(b"\n", 0, end)
    return tuple(names), replace(block, first=first, offset=block.offset + end, content=block.content[end:])


def rows(block: Block, add_problem: AddProblem) -> Iterator[Row]:
    """The rows of a block; `add_problem(line, column, reason)` is called for lines that hold none."""
    line = block.first
    for cells in _rows_of_cells(block):
        number, line = line, line + block.content.count(b"\n", cells[0].start(), cells[-1].end())
        if len(cells) == 1 and not cells[0][0].strip():
            continue
        if len(cells) != len(block.columns):
            reason = f"{len(cells)} cells, where the header has {len(block.columns)} columns"
            if block.kind == "csv" and cells[-1]["close"] == b"":
                reason += "; the quote that opens the last one is not closed"
            add_problem(number, 1, reason)
            continue
        row: dict[str, Any] = {}
        for name, cell in zip(block.columns, cells, strict=True):
            try:
                row[name] = parse_cell(name, _text(block, cell))
            except _BadCell as bad:
                add_problem(*_line_and_column(block, number, cells, bad.place), f"{name}: {bad.reason}")
                break
            except Fault as fault:
                add_problem(*_line_and_column(block, number, cells, cell.start()), f"{name}: {fault.reason}")
                break
        else:
            yield number, row, lambda name, cells=cells: _column_named(block, cells, name)


def _rows_of_cells(block: Block) -> Iterator[Cells]:
    expression = _CSV if block.kind == "csv" else _TSV
    cells: Cells = []
    for cell in expression.finditer(block.content):
        if not cells and cell.start() == len(block.content):
            return
        cells.append(cell)
        if cell["end"] in _ROW_ENDS:
            yield cells
            cells = []


def _text(block: Block, cell: re.Match[bytes]) -> str:
    """The text of a cell, without its quotes."""
    quoted, plain = cell["quoted"], cell["plain"]
    if cell["end"] in _ROW_ENDS and plain.endswith(b"\r"):
        plain = plain[:-1]
    if quoted is not None:
        if cell["close"] == b"":
            raise _BadCell("the quote that opens this cell is not closed", cell.start())
        if plain:
            raise _BadCell("there is text behind the quote that closes this cell", cell.start("plain"))
    name = "plain" if quoted is None else "quoted"
    try:
        text = (plain if quoted is None else quoted).decode()
    except UnicodeDecodeError as error:
        place = cell.start(name) + error.start
        where = f"byte {block.offset + place} of the file is 0x{block.content[place]:02x}"
        raise _BadCell(f"not UTF-8: {where} ({error.reason})", place) from error
    return text if quoted is None else text.replace('""', '"')


def _line_and_column(block: Block, first: int, cells: Cells, place: int) -> tuple[int, int]:
    """Line and column (in characters, from 1) of a place in a row that begins in line `first`."""
    before = block.content[cells[0].start() : place]
    return first + before.count(b"\n"), len(before[before.rfind(b"\n") + 1 :].decode(errors="replace")) + 1


def _column_named(block: Block, cells: Cells, name: str) -> int:
    """The column of a named cell if it begins in the first line of its row, else 1."""
    if name not in block.columns:
        return 1
    line, column = _line_and_column(block, 0, cells, cells[block.columns.index(name)].start())
    return 1 if line else column
