"""`nvembed mine`: hard negatives for training records, alone or under torchrun."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from nvembed_mcore.cli.encode import add_embedder, is_first_rank, open_named
from nvembed_mcore.cli.results import add_json, give

_METHODS = """\
what a negative must score below: topk-percpos: --percent of the positive's score (default); topk-marginpos: the
positive's score less --margin; topk-abs: --max-score; topk: anything"""
_INDEX = """\
exact (default), or a FAISS index for a corpus that is too large for it, such as IVF1024,PQ64 or HNSW32 (needs
nvembed_mcore[mine])"""


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "mine", help="hard negatives for records: nvembed mine MODEL RECORDS OUTPUT, alone or under torchrun"
    )
    add_embedder(command)
    command.add_argument("records", metavar="RECORDS", help="training records, in any layout that `train` reads")
    command.add_argument("output", metavar="OUTPUT", help="folder for records.jsonl, report.html and report.json")
    command.add_argument(
        "--corpus",
        metavar="PATH",
        help="a BEIR folder, or JSON Lines or Parquet with id and text; default: the records' documents",
    )
    _add_rules(command)
    command.add_argument("--index", default="exact", metavar="KIND", help=_INDEX)
    command.add_argument(
        "--keep-negatives", action="store_true", help="keep the records' own negatives in front of the mined ones"
    )
    command.add_argument(
        "--shard-size",
        type=int,
        default=8192,
        metavar="N",
        help="documents, and queries, that one rank does at a time (default 8192)",
    )
    command.add_argument(
        "--suspects", type=int, default=50, metavar="N", help="suspected positives in the report (default 50)"
    )
    add_json(command, "the figures of the report")
    command.set_defaults(run=_mine)


def _add_rules(command: argparse.ArgumentParser) -> None:
    # Which words and numbers these options take is checked where they are used, with the others.
    command.add_argument("--method", default="topk-percpos", metavar="NAME", help=_METHODS)
    command.add_argument("--percent", type=float, default=0.95, metavar="SHARE", help="(default 0.95)")
    command.add_argument("--margin", type=float, default=0.05, metavar="COSINE", help="(default 0.05)")
    command.add_argument("--max-score", type=float, default=0.7, metavar="COSINE", help="(default 0.7)")
    command.add_argument("--negatives", type=int, default=7, metavar="N", help="of each record (default 7)")
    command.add_argument(
        "--range",
        type=int,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="leave out the MIN best candidates, and look at no more than the MAX best (default 0 and --depth)",
    )
    command.add_argument(
        "--sampling", default="top", metavar="HOW", help="top: the best (default); random: drawn from the range"
    )
    command.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    command.add_argument(
        "--depth",
        type=int,
        default=1000,
        metavar="N",
        help="candidates of a query at most: 100 at first, more while it has too few negatives (default 1000)",
    )


def _mine(arguments: argparse.Namespace) -> None:
    from nvembed_mcore.mining.run import Mining, mine
    from nvembed_mcore.mining.select import Rules

    skip, last = arguments.range or (0, None)
    rules = Rules(
        method=arguments.method,
        percent=arguments.percent,
        margin=arguments.margin,
        max_score=arguments.max_score,
        negatives=arguments.negatives,
        skip=skip,
        last=last,
        sampling=arguments.sampling,
        seed=arguments.seed,
    )
    mining = Mining(
        records=arguments.records,
        output=arguments.output,
        corpus=arguments.corpus,
        rules=rules,
        depth=arguments.depth,
        index=arguments.index,
        keep_negatives=arguments.keep_negatives,
        shard_size=arguments.shard_size,
        suspects=arguments.suspects,
    )
    figures = mine(lambda: open_named(arguments), mining)
    if is_first_rank():
        give(figures, arguments.json, lambda: _print(figures, mining.output))


def _print(figures: Mapping[str, Any], output: str) -> None:
    from nvembed_mcore.mining.report import summary

    for name, figure in summary(figures):
        print(f"{name:32} {figure}")
    print(f"{output}: records.jsonl, report.html, report.json")
