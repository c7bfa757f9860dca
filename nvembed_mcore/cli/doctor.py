"""`nvembed doctor [CONFIG.yaml [--field.of.the.tree value ...]]`: what a run is computed with here, and why."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nvembed_mcore.cli.results import Tables, add_json, give
from nvembed_mcore.cli.run_config import read_run_config
from nvembed_mcore.exits import Exit

if TYPE_CHECKING:
    from nvembed_mcore.doctor import Diagnosis

_DESCRIPTION = """\
Print what is installed on this machine, who will compute each part of a run and why, and what commonly goes wrong.
With a configuration, its choices count. Ends with 0 where a run can start, with 78 where the given one cannot."""


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "doctor",
        help="say what a run is computed with on this machine, and why",
        usage="nvembed doctor [CONFIG.yaml [--field value ...]] [--json [FILE.json]]",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    add_json(command)
    command.set_defaults(run=_run, takes_fields=True)


def _run(arguments: argparse.Namespace, fields: Sequence[str] = ()) -> int:
    # Not before: torch takes a second to import.
    from nvembed_mcore.doctor import examine

    found = examine((lambda: read_run_config([*fields])) if fields else None)
    give(found.as_json(), arguments.json, lambda: _print(found))
    return Exit.CONFIGURATION if found.refusal else Exit.DONE


def _print(found: Diagnosis) -> None:
    from rich.table import Column, Table

    console = Tables()
    installed = Table("found", Column("version", overflow="fold"))
    for name, value in found.found.items():
        installed.add_row(name, value)
    paths = Table("part", Column("computed by", overflow="fold"), Column("why", overflow="fold"))
    for one in found.paths:
        paths.add_row(one.part, one.choice, one.why)
    for table in (installed, paths) if found.paths else (installed,):
        console.print(table)
    for warning in found.warnings:
        print(f"doctor: warning: {warning}")
    print(f"doctor: cannot run: {found.refusal}" if found.refusal else "doctor: a run can start here")
