"""`nvembed data KIND`: what makes and examines data sets."""

from __future__ import annotations

import argparse
import dataclasses

from nvembed_mcore.cli import (
    data_check,
    data_convert,
    data_decontaminate,
    data_plan,
    data_prompts,
    data_score,
    data_split,
)
from nvembed_mcore.cli.results import add_json, give, print_tables


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("data", help="make, check, convert and plan data sets")
    kinds = command.add_subparsers(required=True, metavar="KIND")
    tokenizer = kinds.add_parser("tokenizer", help="write Mistral's tokenizer as a Hugging Face folder")
    tokenizer.add_argument("output")
    add_json(tokenizer, "its folder")
    tokenizer.set_defaults(run=_data_tokenizer)
    docs = kinds.add_parser("python-docs", help="code search over the installed Python packages' documentation")
    docs.add_argument("output")
    docs.add_argument("--tokenizer", required=True, help="tokenizer folder, for the statistics and limits")
    docs.add_argument("--held-out", type=int, default=3000, help="held-out queries (default 3000)")
    docs.add_argument("--negatives", type=int, default=7, help="hard negatives of each training record (default 7)")
    docs.add_argument(
        "--packages",
        nargs="+",
        default=["stdlib", "numpy", "torch", "transformers"],
        help="packages to parse (default: stdlib numpy torch transformers)",
    )
    add_json(docs, "the statistics")
    docs.set_defaults(run=_data_python_docs)
    data_plan.add(kinds)
    data_convert.add(kinds)
    data_decontaminate.add(kinds)
    data_prompts.add(kinds)
    data_split.add(kinds)
    data_check.add(kinds)
    data_score.add(kinds)


def _data_tokenizer(arguments: argparse.Namespace) -> None:
    from nvembed_mcore.data.tokenizer import write_mistral_tokenizer

    write_mistral_tokenizer(arguments.output)
    found = {"output": arguments.output}
    give(found, arguments.json, lambda: print(f"tokenizer written to {arguments.output}"))


def _data_python_docs(arguments: argparse.Namespace) -> None:
    from nvembed_mcore.data.python_docs import build_python_docs, statistics_table
    from nvembed_mcore.data.tokenizer import load_tokenizer

    statistics = build_python_docs(
        arguments.output,
        load_tokenizer(arguments.tokenizer),
        packages=arguments.packages,
        held_out=arguments.held_out,
        negatives=arguments.negatives,
    )
    give(dataclasses.asdict(statistics), arguments.json, lambda: print_tables([statistics_table(statistics)]))
