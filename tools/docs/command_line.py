"""The page of the command line: what every command's own `--help` prints."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from unittest import mock

from nvembed_mcore import cli

_HEAD = """\
# Command line

What `--help` prints of each command, made at each build of this site. Commands end with the statuses of
[Operations](../operations.md#exit-statuses). With several processes, `torchrun --nproc-per-node N -m nvembed_mcore`
stands for `nvembed` in `train`, `encode`, `mine` and `preflight`.

"""
_TRAIN = "The fields of `nvembed train` are those of the [configuration](configuration.md).\n"


def page() -> str:
    """The page, as Markdown."""
    with mock.patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"}):
        parser = cli.parser()
        return _HEAD + "\n".join(_walk(parser, parser.prog))


def _walk(parser: argparse.ArgumentParser, name: str) -> Iterator[str]:
    """A section of each command, in the order of the parsers."""
    # `train` declares its fields elsewhere, and its parser here knows nothing of them.
    yield f"## {name}\n\n" + (_TRAIN if name == "nvembed train" else f"```text\n{parser.format_help().strip()}\n```\n")
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, below in action.choices.items():
                yield from _walk(below, f"{name} {command}")
