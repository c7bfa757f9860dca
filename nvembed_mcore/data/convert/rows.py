"""Items of source files, each with its place: rows of a file of rows, or of a JSON list that is read as a stream."""

from __future__ import annotations

import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from nvembed_mcore.data.faults import DataError, kind_of
from nvembed_mcore.data.files import COMPRESSIONS, blocks, line_blocks, numbered_lines, opened, rows
from nvembed_mcore.progress import show_each

Item = tuple[Callable[[str], str], Any]
"""Something of a file: the place of a field of it (for messages), and its value."""
AddProblem = Callable[[str, str], None]
"""Is called with the place of what cannot be read, and the reason."""

_CHUNK = 1 << 20
_SPACES = re.compile(r"[ \t\r\n]*")
_LONGEST_ITEM = 1 << 28  # characters: a list that is broken in its middle must not be read into memory as one item


def file_items(path: Path, add_problem: AddProblem) -> Iterator[Item]:
    """The objects of a file: its rows, or the items of the list that a `.json` file holds.

    Raises:
        DataError: the file is missing, of an unknown kind, or cannot be read any further.
    """
    if _is_json(path) and _first_character(path) == "[":
        yield from _list_items(path, add_problem)
        return

    def add(line: int, column: int, reason: str) -> None:
        add_problem(f"{path}:{line}:{column}", reason)

    for block in blocks(path):
        for line, row, column_of in rows(block, add):
            yield lambda name, line=line, column_of=column_of: f"{path}:{line}:{column_of(name)}", row


def json_lines(path: Path, add_problem: AddProblem) -> Iterator[Item]:
    """The JSON values of a file's lines, of any kind.

    Raises:
        DataError: as `file_items`.
    """
    for block in line_blocks(path):
        for line, _, raw in numbered_lines(block):
            try:
                text = raw.decode()
                if text.strip():
                    yield lambda name, line=line: f"{path}:{line}", json.loads(text)
            except UnicodeDecodeError as error:
                add_problem(f"{path}:{line}", f"not UTF-8: byte {error.start} of the line ({error.reason})")
            except (RecursionError, ValueError) as error:
                add_problem(f"{path}:{line}", f"not JSON: {getattr(error, 'msg', error)}")


def json_document(path: Path) -> dict[str, Any]:
    """The one JSON object that a file holds.

    Raises:
        DataError: the file is missing, cannot be read, or holds anything else.
    """
    try:
        with _opened(path) as stream:
            document = json.load(stream)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path} is not usable JSON: {error}") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise _cannot_read(path, error) from error
    if not isinstance(document, dict):
        raise DataError(f"{path} does not hold one JSON object")
    return document


def is_document(path: Path) -> bool:
    """Whether a file is one JSON object: it is named `.json` and begins with one."""
    return _is_json(path) and _first_character(path) == "{"


def _is_json(path: Path) -> bool:
    return any(path.name.endswith(f".json{packed}") for packed in ("", *COMPRESSIONS))


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    with opened(path) as (stream, _):
        yield io.TextIOWrapper(stream, encoding="utf-8-sig")


def _cannot_read(path: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"no data file at {path}")
    return DataError(f"cannot read {path}: {error}")


def _first_character(path: Path) -> str:
    """The first character of a file that is no space; nothing of a file without one."""
    try:
        with _opened(path) as stream:
            while text := stream.read(_CHUNK):
                if text.strip():
                    return text.strip()[0]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 near its beginning ({error.reason})") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise _cannot_read(path, error) from error
    return ""


def _list_items(path: Path, add_problem: AddProblem) -> Iterator[Item]:
    """The objects of the list that a file holds; a few of them are in memory at a time."""
    number = 0
    try:
        with _opened(path) as stream:
            for value in show_each(_streamed(stream), f"read {path.name}", "items"):
                if isinstance(value, dict):
                    yield lambda name, number=number: f"{path}[{number}]", value
                else:
                    add_problem(f"{path}[{number}]", f"not a JSON object but {kind_of(value)}")
                number += 1
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 behind its item {number} ({error.reason})") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}[{number}]: not JSON: {getattr(error, 'msg', error)}") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise _cannot_read(path, error) from error


def _streamed(stream: IO[str]) -> Iterator[Any]:
    """The items of one JSON list. An item is parsed when what is read holds it and the comma or bracket behind it;
    until then as much again is read each time."""
    decoder = json.JSONDecoder()
    text = stream.read(_CHUNK)
    at = _SPACES.match(text, text.index("[") + 1).end()
    while not text.startswith("]", at):
        try:
            value, end = decoder.raw_decode(text, at)
            end = _SPACES.match(text, end).end()
            if not text.startswith((",", "]"), end):
                raise json.JSONDecodeError("a comma or ] must stand behind the item", text, end)
        except json.JSONDecodeError:
            more = stream.read(max(_CHUNK, len(text) - at))
            if not more or len(text) - at > _LONGEST_ITEM:
                raise
            text = text[at:] + more
            at = _SPACES.match(text).end()
            continue
        yield value
        at = end if text[end] == "]" else _SPACES.match(text, end + 1).end()
    behind = text[at + 1 :]
    while behind and not behind.strip():
        behind = stream.read(_CHUNK)
    if behind:
        raise ValueError("there is more behind the list")
