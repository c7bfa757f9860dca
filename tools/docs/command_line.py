"""The page of the command line: what every command's own `--help` prints."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from unittest import mock

from nvembed_mcore import cli

_TRAIN = """\
usage: nvembed train CONFIG.yaml [--field value ...]

Train one stage. With several processes: torchrun --nproc-per-node N -m nvembed_mcore train ...
"""
_HEAD = """\
# Command line

What `--help` prints of each command. Commands end with the statuses of [Operations](../operations.md#exit-statuses).
With several processes, `torchrun --nproc-per-node N -m nvembed_mcore` stands for `nvembed` in `train`, `encode` and
`mine`.

"""


def page() -> str:
    """The page, as Markdown."""
    with mock.patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"}):
        return _HEAD + "\n".join(_section(name, text) for name, text in helps())


def _section(name: str, text: str) -> str:
    more = "\nThe fields are those of the [configuration](configuration.md).\n" if name == "nvembed train" else ""
    return f"## {name}\n\n```text\n{text.strip()}\n```\n{more}"


def helps() -> Iterator[tuple[str, str]]:
    """Every command, in the order of the parsers, and its help."""
    parser = cli.parser()
    yield from _walk(parser, parser.prog)


def _walk(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, str]]:
    word = name.rpartition(" ")[2]
    yield name, _TRAIN if word == "train" else parser.format_help()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, below in action.choices.items():
                yield from _walk(below, f"{name} {command}")
