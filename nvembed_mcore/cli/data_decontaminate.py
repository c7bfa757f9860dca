"""`nvembed data decontaminate RECORDS OUTPUT --against ...`: drop training texts that are evaluation texts."""

from __future__ import annotations

import argparse

from nvembed_mcore.cli.data_convert import count, show_counts
from nvembed_mcore.cli.results import add_json
from nvembed_mcore.data.decontaminate import FIELDS, THRESHOLD


def add(kinds: argparse._SubParsersAction) -> None:
    parser = kinds.add_parser("decontaminate", help="drop training records that match evaluation texts")
    parser.add_argument("records", help="training records")
    parser.add_argument("output", help="JSONL file to write; what was dropped goes to OUTPUT's name.dropped.jsonl")
    parser.add_argument(
        "--against",
        nargs="+",
        required=True,
        metavar="SET",
        help="evaluation sets: BEIR folders (their queries), or files of rows",
    )
    parser.add_argument(
        "--bm25-threshold",
        type=float,
        default=THRESHOLD,
        metavar="T",
        help=f"similarity from 0 to 1 from which texts match (default {THRESHOLD})",
    )
    parser.add_argument("--exact", action="store_true", help="only equal texts match (case and punctuation aside)")
    parser.add_argument("--documents", action="store_true", help="take matching positives and negatives out too")
    parser.add_argument(
        "--fields", nargs="+", default=FIELDS, metavar="NAME", help=f"fields with texts (default {' '.join(FIELDS)})"
    )
    parser.add_argument("--split", default="test", help="split of BEIR folders (default test)")
    parser.add_argument("--max-bad-records", type=count, default=0, help="leave out so many bad records (default 0)")
    add_json(parser, "the counts")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from nvembed_mcore.data.decontaminate import decontaminate, dropped_path

    counts = decontaminate(
        arguments.records,
        arguments.output,
        against=arguments.against,
        threshold=None if arguments.exact else arguments.bm25_threshold,
        documents=arguments.documents,
        fields=arguments.fields,
        split=arguments.split,
        max_bad_records=arguments.max_bad_records,
    )
    title = f"records in {arguments.output}, dropped texts in {dropped_path(arguments.output)}"
    show_counts(title, counts.by_name(), arguments.json)
