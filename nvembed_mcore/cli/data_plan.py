"""`nvembed data plan CONFIG.yaml ...`: what each stage draws from each data set."""

from __future__ import annotations

import argparse

from nvembed_mcore.cli.results import add_json, give, print_tables


def add(kinds: argparse._SubParsersAction) -> None:
    command = kinds.add_parser(
        "plan",
        help="show how often each stage draws from each data set",
        description="Needs no tokenizer and no data: of a data set whose file is missing, max_records are expected.",
    )
    command.add_argument("configs", nargs="+", metavar="CONFIG.yaml", help="a configuration of each stage")
    add_json(command)
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from nvembed_mcore.cli.run_config import read_run_config
    from nvembed_mcore.data.plan import as_json, plan_stage, tables

    stages = [plan_stage(read_run_config([path]), path) for path in arguments.configs]
    give(as_json(stages), arguments.json, lambda: print_tables(tables(stages), width=160))
