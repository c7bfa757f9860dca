"""`nvembed data prompts STEP`: prompts with which a language model writes synthetic data."""

from __future__ import annotations

import argparse

from nvembed_mcore.cli.data_convert import at_least_one, count, show_counts
from nvembed_mcore.cli.results import add_json


def add(kinds: argparse._SubParsersAction) -> None:
    parser = kinds.add_parser("prompts", help="write the prompts for synthetic data")
    steps = parser.add_subparsers(required=True, metavar="STEP")
    first = steps.add_parser("brainstorm", help="step one: ask for search tasks")
    first.add_argument("output", help="JSONL file of prompts to write: rows of id and prompt")
    first.add_argument("--count", type=at_least_one, required=True, help="prompts")
    first.add_argument("--tasks", type=at_least_one, default=20, help="tasks that each prompt asks for (default 20)")
    first.add_argument(
        "--shapes",
        nargs="+",
        choices=("short-long", "long-short", "short-short"),
        default=("short-long", "long-short", "short-short"),
        help="lengths of query and document (default: all three in turn)",
    )
    first.set_defaults(run=_brainstorm)
    second = steps.add_parser("write", help="step two: ask for examples of the tasks")
    second.add_argument("answers", nargs="+", help="answers to step one: JSONL rows of id and answer")
    second.add_argument("output", help="JSONL file of prompts to write")
    second.add_argument("--per-task", type=at_least_one, default=2, help="prompts of each task (default 2)")
    second.add_argument("--languages", nargs="+", default=["English"], help="one is drawn for each (default English)")
    second.add_argument("--max-bad-records", type=count, default=0, help="leave out so many bad rows (default 0)")
    second.add_argument("--overwrite", action="store_true", help="replace OUTPUT where it exists")
    second.set_defaults(run=_write)
    for step in (first, second):
        step.add_argument("--seed", type=int, default=0, help="decides what is drawn (default 0)")
        step.add_argument("--templates", metavar="FOLDER", help="own templates, in the form of the package's")
        add_json(step, "the counts")


def _brainstorm(arguments: argparse.Namespace) -> None:
    from nvembed_mcore.data.synthetic.prompts import TEMPLATES, brainstorm

    figures = brainstorm(
        arguments.output,
        count=arguments.count,
        tasks=arguments.tasks,
        shapes=arguments.shapes,
        seed=arguments.seed,
        templates=arguments.templates or TEMPLATES,
    )
    show_counts(f"prompts in {arguments.output}", figures, arguments.json)


def _write(arguments: argparse.Namespace) -> None:
    from nvembed_mcore.data.synthetic.prompts import TEMPLATES, write

    figures = write(
        arguments.answers,
        arguments.output,
        per_task=arguments.per_task,
        languages=arguments.languages,
        seed=arguments.seed,
        templates=arguments.templates or TEMPLATES,
        max_bad_records=arguments.max_bad_records,
        overwrite=arguments.overwrite,
    )
    show_counts(f"prompts in {arguments.output}", figures, arguments.json)
