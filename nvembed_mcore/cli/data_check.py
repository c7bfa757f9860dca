"""`nvembed data check`: what is in data sets, and whether a run may start on them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from nvembed_mcore.cli.results import add_json, give, print_tables

if TYPE_CHECKING:
    from nvembed_mcore.data.check.findings import CheckReport

REFUSED = 1
_LIMIT = 512

_STATUS = """exit status:
  0  a run may start (with --strict: and there is no warning)
  1  a run would refuse a data set: it cannot be read, holds no record, has more bad lines than allowed, or an
     instruction that leaves no room for a text. With --strict also: there are warnings
  78 the command itself cannot be carried out: options, configuration, tokenizer, evaluation set

warnings: bad lines that are skipped, blank negatives, queries and pairs that stand twice, negatives that are
positives, documents whose texts and ids do not belong together, queries of several data sets, texts of --against"""


def add(kinds: argparse._SubParsersAction) -> None:
    check = kinds.add_parser(
        "check",
        help="read data sets as a run would, and say what is in them and what is wrong",
        description="Read the data sets of a run's configuration, or of --data, once with all cores.",
        epilog=_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="configuration of a run: sets and limits")
    check.add_argument("--data", nargs="+", metavar="PATH", help="data sets, instead of a configuration")
    check.add_argument("--tokenizer", help="its folder (with --data); without it lengths are in characters")
    check.add_argument("--instruction", help="of the queries (with --data; default none)")
    for name, what in (("query", "query"), ("document", "document")):
        text = f"longest {what} (with --tokenizer; default {_LIMIT})"
        check.add_argument(f"--max-{name}-tokens", type=int, metavar="N", help=text)
    check.add_argument(
        "--max-bad-records",
        type=int,
        metavar="N",
        help="bad lines of a set to skip (default: as the configuration says; with --data 0)",
    )
    check.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="PATH",
        help="evaluation sets that must not be in the data; a configuration's is looked for too",
    )
    check.add_argument("--strict", action="store_true", help="warnings count as refusals")
    check.add_argument("--report", metavar="FILE.html", help="write a page with histograms and examples")
    add_json(check)
    check.add_argument("--processes", type=int, metavar="N", help="workers (default: one a core, 32 at most)")
    check.set_defaults(run=_check)


def _check(arguments: argparse.Namespace) -> int:
    from nvembed_mcore import report as pages
    from nvembed_mcore.data.check.sets import check_sets
    from nvembed_mcore.data.check.show import html_page

    for name, least in (("max_bad_records", 0), ("processes", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    report: CheckReport = check_sets(
        **_what(arguments),
        processes=arguments.processes,
    )
    if arguments.report:
        pages.save(arguments.report, html_page(report))
    give(report.as_dict(), arguments.json, lambda: _print(report))
    return REFUSED if report.refusals or (arguments.strict and report.warnings) else 0


def _print(report: CheckReport) -> None:
    from nvembed_mcore.data.check.show import lines, tables

    print_tables(tables(report))
    for line in lines(report):
        print(line)


def _what(arguments: argparse.Namespace) -> dict[str, Any]:
    """Data and evaluation sets, tokenizer and limits, from the configuration or the options that stand for it."""
    from nvembed_mcore.cli.run_config import read_run_config
    from nvembed_mcore.config import DatasetConfig

    of_data = ("tokenizer", "instruction", "max_query_tokens", "max_document_tokens")
    if bool(arguments.config) == bool(arguments.data):
        raise ValueError("name a configuration or --data, " + ("not both" if arguments.data else "got neither"))
    if arguments.config:
        given = [f"--{name.replace('_', '-')}" for name in of_data if getattr(arguments, name) is not None]
        if given:
            raise ValueError(f"{given[0]} goes with --data; {arguments.config} says it already")
        config = read_run_config([arguments.config])
        data = config.data
        return {
            "datasets": data.datasets,
            "against": [*(one.path for one in config.eval.test_sets), *arguments.against],
            "max_bad_records": (
                data.max_bad_records if arguments.max_bad_records is None else arguments.max_bad_records
            ),
            "tokenizer": data.tokenizer,
            "max_query_tokens": data.max_query_tokens,
            "max_document_tokens": data.max_document_tokens,
            "needs_scores": config.loss.distillation.is_on,
        }
    for name in of_data[1:]:
        if getattr(arguments, name) is not None and arguments.tokenizer is None:
            raise ValueError(f"--{name.replace('_', '-')} needs --tokenizer")
    return {
        "datasets": [DatasetConfig(path=path, instruction=arguments.instruction or "") for path in arguments.data],
        "against": arguments.against,
        "max_bad_records": arguments.max_bad_records or 0,
        "tokenizer": arguments.tokenizer,
        "max_query_tokens": _LIMIT if arguments.max_query_tokens is None else arguments.max_query_tokens,
        "max_document_tokens": _LIMIT if arguments.max_document_tokens is None else arguments.max_document_tokens,
    }
