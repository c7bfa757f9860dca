"""What is wrong with data, said with the place: errors of files, problems of lines, faults of rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SHOWN = 10


class DataError(ValueError):
    """A data file cannot be used; the message names the file, the lines and what is wrong with them."""


class Fault(Exception):
    """What is wrong with one row, and the field to point at."""

    def __init__(self, reason: str, field: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.field = field


@dataclass(slots=True)
class Problems:
    """Bad lines of one data set: all counted, the first few kept.

    Attributes:
        path: the file, or what its files are together.
        allowed: so many bad lines are no error.
    """

    path: Path | str
    allowed: int = 0
    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, line: int, column: int, reason: str, path: str | None = None) -> None:
        """Count a bad line; `path` names the file it stands in where the data set has several."""
        self.count += 1
        if len(self.shown) < _SHOWN:
            self.shown.append(f"  {path or self.path}:{line}:{column}: {reason}")

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


def required_text(row: Mapping[str, Any], name: str) -> str:
    """A field that must hold a string with more than spaces."""
    if row.get(name) is None:
        raise Fault(f"{name} is missing" if name not in row else f"{name} is null", name)
    check_string(row[name], name, name)
    if not row[name].strip():
        raise Fault(f"{name} is empty", name)
    return row[name]


def document_text(row: Mapping[str, Any]) -> str:
    """The text of a document with `title` and `text`: both with a space between, or what there is of them."""
    for name in ("title", "text"):
        if row.get(name) is not None:
            check_string(row[name], name, name)
    if row.get("text") is None:
        raise Fault("text is missing", "text")
    return f"{row.get('title') or ''} {row['text']}".strip()


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


def kind_of(value: Any) -> str:
    """A value's type in JSON's words."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    names = {int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
