"""`nvembed evaluate` and `search`: an exported folder at work."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nvembed_mcore.cli import evaluate_mteb
from nvembed_mcore.cli.encode import add_fp8
from nvembed_mcore.cli.results import add_json, give

if TYPE_CHECKING:
    from nvembed_mcore.evaluation.search import SearchResult

_LIMIT = 512


def add(commands: argparse._SubParsersAction) -> None:
    _add_evaluate(commands)
    _add_search(commands)


def _add_model(command: argparse.ArgumentParser, help: str = "exported folder") -> None:
    command.add_argument("model", help=help)
    command.add_argument("--instruction", help="task of the queries; default: the one the model was exported with")
    limit = f"longest text in tokens (default {_LIMIT}; of evaluate --mteb the model's own limits)"
    command.add_argument("--max-length", type=int, help=limit)
    command.add_argument("--device", help="torch device (default cpu)")


def _encoder(arguments: argparse.Namespace) -> Callable:
    """The exported model that `_add_model`'s arguments name."""
    from nvembed_mcore.evaluation.exported import ExportedEncoder

    return ExportedEncoder(
        arguments.model,
        instruction=arguments.instruction,
        max_length=_max_length(arguments),
        device=arguments.device or "cpu",
    )


def _max_length(arguments: argparse.Namespace) -> int:
    return _LIMIT if arguments.max_length is None else arguments.max_length


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "evaluate",
        help="retrieval metrics of an exported folder on a BEIR-format test set, or any tasks of MTEB",
        usage="nvembed evaluate MODEL DATA [options] | nvembed evaluate MODEL --mteb TASK... [options]",
    )
    _add_model(command, "exported folder; with --mteb also a run or checkpoint folder")
    data = command.add_argument("data", help="folder with corpus.jsonl, queries.jsonl and qrels/test.tsv")
    add_json(command, "the metrics")
    add_fp8(command)
    evaluate_mteb.add(command, data)
    command.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    evaluate_mteb.check(arguments)
    if arguments.mteb is not None:
        evaluate_mteb.run(arguments)
        return
    from nvembed_mcore.evaluation.exported import evaluate_beir

    encoder = _encoder(arguments) if arguments.fp8 == "off" else _fp8_encoder(arguments)
    metrics = evaluate_beir(encoder, arguments.data)
    give(metrics, arguments.json, lambda: _print_metrics(metrics))


def _print_metrics(metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
        print(f"{name:14} {value:.4f}")


def _fp8_encoder(arguments: argparse.Namespace) -> Callable:
    """The exported model as the trainer computes it, for transformers has no FP8 of this kind.

    Raises:
        ConfigError: a device is named: the trainer takes the GPU where there is one.
    """
    import torch

    from nvembed_mcore.config import ConfigError
    from nvembed_mcore.evaluation.embedders import open_embedder

    if arguments.device is not None:
        raise ConfigError(
            f"--device {arguments.device} is for --fp8 off, and --fp8 is {arguments.fp8}: the trainer's layers then "
            f"embed, on a GPU where there is one"
        )
    embedder = open_embedder(
        arguments.model, instruction=arguments.instruction, max_length=_max_length(arguments), fp8=arguments.fp8
    )
    return lambda texts, is_query: torch.from_numpy(embedder.embed(texts, is_query))


def _add_search(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("search", help="search source files by meaning: nvembed search MODEL FILES... QUERY")
    _add_model(command)
    command.add_argument("paths", nargs="+", metavar="FILES", help="files or folders (*.py in folders)")
    command.add_argument("query")
    command.add_argument("--top", type=int, default=10, help="hits to show (default 10)")
    add_json(command, "the hits")
    command.set_defaults(run=_search)


def _search(arguments: argparse.Namespace) -> None:
    from nvembed_mcore.evaluation.search import search_files

    encoder = _encoder(arguments)
    result = search_files(encoder, arguments.paths, arguments.query, top_k=arguments.top)
    give(_as_json(result), arguments.json, lambda: _print_hits(result))


def _as_json(result: SearchResult) -> dict[str, Any]:
    hits = [dataclasses.asdict(hit) | {"path": str(hit.path)} for hit in result]
    return {"hits": hits, "pieces": result.num_chunks, "files": result.num_files, "not_text": result.num_skipped}


def _print_hits(result: SearchResult) -> None:
    for hit in result:
        print(hit)
    skipped = f", {result.num_skipped} not text" if result.num_skipped else ""
    print(f"({result.num_chunks} pieces of {result.num_files} files{skipped})")
