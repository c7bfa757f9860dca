"""`nvembed data convert LAYOUT SOURCE ... OUTPUT`: published layouts of training sets as records."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from nvembed_mcore.cli.results import add_json, give, print_tables

_GENERAL = ("run", "layout", "sources", "output", "json")


def add(kinds: argparse._SubParsersAction) -> None:
    parser = kinds.add_parser("convert", help="turn a published set into records")
    layouts = parser.add_subparsers(required=True, metavar="LAYOUT", dest="layout")
    for name, (about, declare) in _LAYOUTS.items():
        layout = layouts.add_parser(name, help=about, description=f"{name}: {about}.")
        layout.add_argument(
            "sources", nargs="+", help="files of the set (JSONL, JSON, CSV, TSV, Parquet; text also compressed)"
        )
        layout.add_argument("output", help="JSONL file of records to write")
        declare(layout)
        layout.add_argument("--sample", type=at_least_one, metavar="N", help="draw so many records instead of all")
        layout.add_argument("--seed", type=int, default=0, help="decides what is drawn (default 0)")
        layout.add_argument("--max-bad-records", type=count, default=0, help="leave out so many bad rows (default 0)")
        layout.add_argument("--overwrite", action="store_true", help="replace OUTPUT where it exists")
        add_json(layout, "the counts")
        layout.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from nvembed_mcore.data.convert import convert

    options = {name: value for name, value in vars(arguments).items() if name not in _GENERAL}
    counts = convert(arguments.layout, arguments.sources, arguments.output, **options)
    show_counts(f"records in {arguments.output}", counts.by_name(), arguments.json)


def show_counts(title: str, counts: dict[str, int], json_path: str | None) -> None:
    """A small table, or the figures as JSON where `--json` says."""
    give(counts, json_path, lambda: _print(title, counts))


def _print(title: str, counts: dict[str, int]) -> None:
    from rich.table import Table

    table = Table("", "number", show_header=False)
    for what, number in counts.items():
        table.add_row(what, f"{number:,}")
    print(title)
    print_tables([table])


def count(text: str) -> int:
    """A whole number from 0 on."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must not be negative: {number}")
    return number


def at_least_one(text: str) -> int:
    """A whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1: {number}")
    return number


def _negatives(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--negatives", type=count, default=7, help="most negatives of a record (default 7)")


def _task(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--by",
        required=True,
        choices=("label", "example"),
        help="positives and negatives are the texts of labels, or other texts of the same class and of other classes",
    )
    _negatives(parser)
    parser.add_argument("--labels", metavar="FILE", help="JSON object: label -> its text")


def _classification(parser: argparse.ArgumentParser) -> None:
    _task(parser)
    _fields(parser, text="text", label="label", label_text="label_text")


def _clustering(parser: argparse.ArgumentParser) -> None:
    _task(parser)
    parser.add_argument(
        "--fields",
        nargs="+",
        default=["sentences"],
        metavar="NAME",
        help="fields that make a text, or one with a list of texts (default sentences)",
    )
    _fields(parser, label="labels")
    parser.add_argument("--label-separator", metavar="TEXT", help="stands between the labels of a text with several")


def _sts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--min-score", type=float, default=4.0, help="least score of a positive, of 5 (default 4)")
    parser.add_argument(
        "--scale",
        nargs=2,
        type=float,
        default=(0.0, 5.0),
        metavar=("LEAST", "GREATEST"),
        help="scores of the set; they are mapped to 0 to 5 (default 0 5)",
    )
    _negatives(parser)
    _fields(parser, first="sentence1", second="sentence2", score="score")


def _nli(parser: argparse.ArgumentParser) -> None:
    _negatives(parser)
    parser.add_argument(
        "--both-directions",
        action="store_true",
        help="hypotheses become queries for the premises that entail them too",
    )
    _fields(parser, premise="premise", hypothesis="hypothesis", label="label")


def _dpr(parser: argparse.ArgumentParser) -> None:
    _negatives(parser)
    parser.add_argument("--positives", type=at_least_one, default=1, help="most positives of a record (default 1)")


def _hover(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--corpus", required=True, help="file of articles: rows of title and text")


def _fields(parser: argparse.ArgumentParser, **names: str) -> None:
    """An option for the name of each of some fields."""
    for what, name in names.items():
        option = f"--{what.replace('_', '-')}-field"
        parser.add_argument(option, default=name, metavar="NAME", help=f"field of a row (default {name})")


_LAYOUTS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "classification": ("rows of text, label and label_text, as MTEB has them", _classification),
    "clustering": ("rows of lists sentences and labels, or of a title, an abstract and a category", _clustering),
    "sts": ("rows of sentence1, sentence2 and score", _sts),
    "nli": ("rows of premise, hypothesis and label", _nli),
    "pairs": ("lines of sentence-transformers' embedding-training-data", _negatives),
    "squad": ("SQuAD 1.1 and 2.0, as JSON or rows", _negatives),
    "dpr": ("files of Dense Passage Retrieval: NQ, TriviaQA, PAQ", _dpr),
    "hotpotqa": ("HotpotQA with its paragraphs", _negatives),
    "bioasq": ("BioASQ's task b", lambda parser: None),
    "synthetic": ("a file of prompts (data prompts write), then files of answers", lambda parser: None),
    "hover": ("HoVer, with its articles in a file of their own", _hover),
}
