"""`nvembed report RUN...`: a page that compares runs, from their folders alone."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from nvembed_mcore.cli.results import add_json, give, print_tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nvembed_mcore.reporting.folder import RunFolder


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "report",
        help="compare runs on one HTML page",
        description="Compare runs on one HTML page: results, curves, what differs in their configurations, "
        "throughput, padding, hardware, time and attempts. Reads config.yaml, metrics.jsonl, run.json and status.json "
        "of each run folder, while a run goes on too; what is missing or damaged is said on the page. The page loads "
        "nothing.",
    )
    command.add_argument("folders", nargs="+", metavar="RUN", help="run folder")
    command.add_argument("--output", default="report.html", metavar="FILE.html", help="the page (default %(default)s)")
    add_json(command, "all figures of the tables")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from nvembed_mcore import redact
    from nvembed_mcore import report as pages
    from nvembed_mcore.reporting.folder import read_runs
    from nvembed_mcore.reporting.page import html_page
    from nvembed_mcore.reporting.summary import summary

    runs = read_runs(arguments.folders)
    pages.save(arguments.output, html_page(runs))
    give(redact.tree(summary(runs)), arguments.json, lambda: _print(runs, arguments.output))


def _print(runs: Sequence[RunFolder], output: str) -> None:
    from datetime import datetime, timezone

    from rich.markup import escape
    from rich.table import Table

    from nvembed_mcore.reporting.summary import results, throughput, warnings

    table = Table("run", "state", "step", "loss", "tokens/s", "best of each metric")
    for run in runs:
        found, speed = results(run), throughput(run).get("tokens_per_second")
        best = [f"{name} {one['best']:.4f} at {one['best_step']}" for name, one in found["evaluations"].items()]
        table.add_row(
            escape(run.name),
            escape(run.status.state if run.status else "not known"),
            f"{found['step']} of {found['steps']}",
            "" if found["loss_mean_of_end"] is None else f"{found['loss_mean_of_end']:.4f}",
            "" if speed is None else f"{speed:,.0f}",
            escape(", ".join(best)),
        )
    print_tables([table])
    for run in runs:
        for note in warnings(run, datetime.now(timezone.utc)):
            print(f"{run.name}: {note}")
    print(f"written: {output}")
