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
_TSV = re.compile(rb"(?P<quoted>(?!))?(?P<plain>[^\t\n]*)(?P<end>\t|\n|\Z)")
_ROW_ENDS = (b"\n", b"")

Cells = list[re.Match[bytes]]


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
        DataError: the header is not UTF-8, or has a column without a name or two of one name.
    """
    header = next(_rows_of_cells(block), [])
    names: list[str] = []
    for cell in header:
        column = _column(block, header, cell)
        try:
            name = _text(block, cell)
        except Fault as fault:
            raise DataError(f"{block.path}:{block.first}:{column}: the header: {fault.reason}") from fault
        if not name or name in names:
            what = f"two columns are named {name!r}" if name else "a column has no name"
            raise DataError(f"{block.path}:{block.first}:{column}: the header: {what}")
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
            add_problem(number, 1, f"{len(cells)} cells under the {len(block.columns)} of the header")
            continue
        row: dict[str, Any] = {}
        for name, cell in zip(block.columns, cells, strict=True):
            try:
                row[name] = parse_cell(name, _text(block, cell))
            except Fault as fault:
                add_problem(number, _column(block, cells, cell), f"{name}: {fault.reason}")
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
            raise Fault("the quote that opens this cell is not closed")
        if plain:
            raise Fault("there is text behind the quote that closes this cell")
    name = "plain" if quoted is None else "quoted"
    try:
        text = (plain if quoted is None else quoted).decode()
    except UnicodeDecodeError as error:
        where = cell.start(name) + error.start
        offset, byte = block.offset + where, block.content[where]
        raise Fault(f"not UTF-8: byte {offset} of the file is 0x{byte:02x} ({error.reason})") from error
    return text if quoted is None else text.replace('""', '"')


def _column(block: Block, cells: Cells, cell: re.Match[bytes]) -> int:
    """The column where a cell begins in its line, in characters from 1; in its row's first line, or 1."""
    before = block.content[cells[0].start() : cell.start()]
    return 1 if b"\n" in before else len(before.decode(errors="replace")) + 1


def _column_named(block: Block, cells: Cells, name: str) -> int:
    return _column(block, cells, cells[block.columns.index(name)]) if name in block.columns else 1
