"""`nvembed data plan CONFIG.yaml ...`: what each stage draws from each data set."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add(kinds: argparse._SubParsersAction) -> None:
    command = kinds.add_parser(
        "plan",
        help="show how often each stage draws from each data set",
        description="Needs no tokenizer and no data: of a data set whose file is missing, max_records are expected.",
    )
    command.add_argument("configs", nargs="+", metavar="CONFIG.yaml", help="a configuration of each stage")
    command.add_argument("--json", metavar="PATH", help="write everything here as well")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from nvembed_mcore.cli.run_config import read_run_config
    from nvembed_mcore.data.plan import as_json, plan_stage, tables

    stages = [plan_stage(read_run_config([path]), path) for path in arguments.configs]
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(as_json(stages), indent=1) + "\n", encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables(stages):
        console.print(table)
