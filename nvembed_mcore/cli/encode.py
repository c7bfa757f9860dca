"""`nvembed encode`: embeddings of many texts, alone or under torchrun. `add_embedder` is for other commands too."""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import TYPE_CHECKING, Any

from nvembed_mcore.cli.results import add_json, give

if TYPE_CHECKING:
    from nvembed_mcore.evaluation.embedders import Embedder
    from nvembed_mcore.evaluation.shards import Encoded

_TEXTS = (
    "JSON Lines, Parquet, CSV or TSV with _id or id, text and perhaps title; a BEIR folder; any other file: one text "
    "a line"
)

_TRUST = "st: run code that lies beside the model; a model of the hub needs its @REVISION (40 hex digits)"


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "encode", help="embed a large corpus: nvembed encode MODEL TEXTS OUTPUT, alone or under torchrun"
    )
    add_embedder(command)
    command.add_argument("texts", metavar="TEXTS", help=_TEXTS)
    command.add_argument("output", metavar="OUTPUT", help="folder of shards, or one file that ends in .npy")
    command.add_argument("--queries", action="store_true", help="texts are queries: put the instruction in front")
    command.add_argument("--format", choices=["npy", "parquet"], default="npy", help="of the shards (default npy)")
    command.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="(default float32)")
    command.add_argument("--shard-size", type=int, default=8192, metavar="N", help="rows of a shard (default 8192)")
    add_json(command, "counts and seconds")
    command.set_defaults(run=_encode)


def add_embedder(command: argparse.ArgumentParser) -> None:
    """The model and how it embeds; `open_named` opens what these arguments say."""
    command.add_argument(
        "model",
        metavar="MODEL",
        help="run, checkpoint or export folder, any Mistral or NV-Embed folder, or st:NAME[@REVISION] for "
        "sentence-transformers",
    )
    add_embedder_options(command)


def add_embedder_options(command: argparse.ArgumentParser) -> None:
    """How it embeds."""
    command.add_argument("--instruction", help="task of the queries; default: the one the model was trained with")
    command.add_argument("--max-length", type=int, metavar="N", help="longest text in tokens; default: the model's")
    command.add_argument("--tokenizer", metavar="DIR", help="where the model's tokenizer lies; default: as recorded")
    command.add_argument(
        "--tokens-per-pack", type=int, default=16384, metavar="N", help="token budget of a pass (default 16384)"
    )
    command.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel size (default 1)")
    command.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline-parallel size (default 1)")
    add_fp8(command)
    command.add_argument("--query-prompt", metavar="TEXT", help="st: what stands before queries, word for word")
    command.add_argument("--document-prompt", metavar="TEXT", help="st: what stands before documents, word for word")
    command.add_argument("--trust-remote-code", action="store_true", help=_TRUST)


def add_fp8(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--fp8",
        choices=["off", "tensorwise", "blockwise", "mxfp8"],
        default="off",
        help="round the layers' weights and inputs to FP8 (precision.fp8; emulated without TransformerEngine); not "
        "by delayed scaling, which needs a training's history",
    )


def open_named(arguments: argparse.Namespace) -> Embedder:
    """The embedder that `add_embedder`'s arguments name; every rank calls this."""
    from nvembed_mcore.config import ParallelConfig
    from nvembed_mcore.evaluation.embedders import open_embedder

    return open_embedder(
        arguments.model,
        instruction=arguments.instruction,
        max_length=arguments.max_length,
        parallel=ParallelConfig(tp=arguments.tp, pp=arguments.pp),
        token_budget=arguments.tokens_per_pack,
        tokenizer=arguments.tokenizer,
        query_prompt=arguments.query_prompt,
        document_prompt=arguments.document_prompt,
        trust_remote_code=arguments.trust_remote_code,
        fp8=arguments.fp8,
    )


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _encode(arguments: argparse.Namespace) -> None:
    from nvembed_mcore.evaluation.shards import encode_file

    embedder = open_named(arguments)
    how: dict[str, Any] = {
        "are_queries": arguments.queries,
        "format": arguments.format,
        "dtype": arguments.dtype,
        "shard_size": arguments.shard_size,
    }
    done = encode_file(embedder, arguments.texts, arguments.output, **how)
    if is_first_rank():
        found = dataclasses.asdict(done) | {"output": arguments.output}
        give(found, arguments.json, lambda: _print(done, arguments.output))


def _print(done: Encoded, output: str) -> None:
    made = done.texts - done.present
    was_there = f" ({done.present} were there before)" if done.present else ""
    print(f"{done.texts} texts, {done.dim} dimensions: {output}{was_there}")
    if made:
        padding = 1 - done.tokens / max(1, done.positions)
        print(
            f"{made} texts, {done.tokens} tokens in {done.seconds:.1f} s: {done.tokens / done.seconds:,.0f} tokens/s, "
            f"{padding:.1%} padding"
        )
