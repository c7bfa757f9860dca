"""`nvembed doctor [CONFIG.yaml [--field.of.the.tree value ...]]`: what a run is computed with here, and why."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nvembed_mcore.cli.run_config import read_run_config
from nvembed_mcore.exits import Exit

if TYPE_CHECKING:
    from nvembed_mcore.doctor import Diagnosis

_DESCRIPTION = """\
Print what is installed on this machine, who will compute each part of a run and why, and what commonly goes wrong.
With a configuration, its choices count. Ends with 0 where a run can start, with 78 where the given one cannot."""


def doctor(arguments: list[str]) -> int:
    """`nvembed doctor [CONFIG.yaml [--field value ...]] [--json PATH]`."""
    parser = argparse.ArgumentParser(
        prog="nvembed doctor",
        usage="nvembed doctor [CONFIG.yaml [--field value ...]] [--json PATH]",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("--json", metavar="PATH", help="write everything here as well")
    options, rest = parser.parse_known_args(arguments)
    # Not before: torch takes a second to import.
    from nvembed_mcore.doctor import examine

    found = examine((lambda: read_run_config(rest)) if rest else None)
    if options.json:
        Path(options.json).write_text(json.dumps(found.as_json(), indent=1) + "\n", encoding="utf-8")
    _print(found)
    return Exit.CONFIGURATION if found.refusal else Exit.DONE


def _print(found: Diagnosis) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(width=None if sys.stdout.isatty() else 140)
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
