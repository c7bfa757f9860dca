"""What a command found: for people on stdout, as JSON in a file, or as JSON alone on stdout."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

STDOUT = "-"


def add_json(command: argparse.ArgumentParser, what: str = "everything") -> None:
    """The option `--json [FILE.json]`."""
    command.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        type=_target,
        metavar="FILE.json",
        help=f"{what} as JSON: into a file as well; without one, or with -, on stdout and nothing else there",
    )


def _target(text: str) -> str:
    # So that a word that follows by chance, a configuration for example, is not written over.
    if text != STDOUT and not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"names a file that ends in .json, or - for stdout, got {text!r}")
    return text


def give(found: Any, target: str | None, show: Callable[[], None]) -> None:
    """Write `found` where `--json` says, and `show` it unless that is stdout.

    Args:
        found: JSON values.
        target: what `--json` was given; None: no JSON.
    """
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    if target == STDOUT:
        sys.stdout.write(text)
        return
    if target is not None:
        Path(target).write_text(text, encoding="utf-8")
    show()


def print_tables(tables: Iterable[Table], width: int = 140) -> None:
    """Tables on stdout; `width` as of `Tables`."""
    console = Tables(width)
    for table in tables:
        console.print(table)


class Tables(Console):
    """Tables on stdout, as wide as the terminal; elsewhere of a width that needs no terminal.

    A reader that closes the pipe is told by BrokenPipeError, as `print` does, and ends nothing.
    """

    def __init__(self, width: int = 140) -> None:
        super().__init__(width=None if sys.stdout.isatty() else width)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError
