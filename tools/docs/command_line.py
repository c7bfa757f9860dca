"""The page of the command line: what every command's own `--help` prints."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from collections.abc import Callable, Iterator
from unittest import mock

from nvembed_mcore import cli
from nvembed_mcore.cli.doctor import doctor
from nvembed_mcore.cli.plan import plan
from nvembed_mcore.cli.preflight import preflight

_OWN: dict[str, Callable[[list[str]], object]] = {"preflight": preflight, "doctor": doctor, "plan": plan}
"""Commands that parse their arguments themselves, because they take the fields of a configuration as well."""
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
    parser = cli._parser()
    yield from _walk(parser, parser.prog)


def _walk(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, str]]:
    word = name.rpartition(" ")[2]
    yield name, _TRAIN if word == "train" else _said(_OWN[word]) if word in _OWN else parser.format_help()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, below in action.choices.items():
                yield from _walk(below, f"{name} {command}")


def _said(command: Callable[[list[str]], object]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        command(["--help"])
    return out.getvalue()
