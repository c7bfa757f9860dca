"""`nvembed data split RECORDS OUTPUT --held-out N`: training records, and a test set of what is held out."""

from __future__ import annotations

import argparse

from nvembed_mcore.cli.data_convert import at_least_one, count, show_counts
from nvembed_mcore.cli.results import add_json


def add(kinds: argparse._SubParsersAction) -> None:
    parser = kinds.add_parser("split", help="hold out some of your pairs as a test set")
    parser.add_argument("records", help="pairs or records, in any layout and format that training reads")
    parser.add_argument("output", help="folder for train.jsonl and heldout/ (a BEIR-format test set)")
    parser.add_argument("--held-out", type=at_least_one, required=True, metavar="N", help="records to hold out")
    parser.add_argument("--seed", type=int, default=0, help="decides which (default 0)")
    parser.add_argument("--max-bad-records", type=count, default=0, help="leave out so many bad rows (default 0)")
    add_json(parser, "the counts")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from nvembed_mcore.data.split import split

    counts = split(
        arguments.records,
        arguments.output,
        held_out=arguments.held_out,
        seed=arguments.seed,
        max_bad_records=arguments.max_bad_records,
    )
    show_counts(f"{arguments.output}/train.jsonl and {arguments.output}/heldout", counts.by_name(), arguments.json)
