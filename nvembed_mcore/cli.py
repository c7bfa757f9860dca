"""The command line: parses arguments and calls one function for each subcommand. Nothing else parses arguments."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from nvembed_mcore import __version__

log = logging.getLogger(__name__)

BAD_INPUT, INTERRUPTED = 2, 130


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status (0 done, 2 bad input, 130 interrupted)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _quiet_libraries()
    if arguments[:1] == ["train"]:
        return _guarded(lambda: _train(arguments[1:]), "; the same command goes on from the newest checkpoint")
    parsed = _parser().parse_args(arguments)
    return _guarded(lambda: parsed.run(parsed))


def _quiet_libraries() -> None:
    """Deprecations between torch, Megatron-Core and transformers are ours to read in the test suite, not a user's."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(megatron|torch|transformers)\.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _guarded(work: Callable[[], None], if_interrupted: str = "") -> int:
    """Call `work`; turn what the user can mend into one message on rank 0 instead of a traceback.

    What ends another rank stands in that rank's log.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        work()
        return 0
    except (ValueError, OSError) as error:
        if is_first:
            print(f"nvembed: error: {error}", file=sys.stderr)
        else:
            log.info("this rank ends with an error", exc_info=True)
        return BAD_INPUT
    except KeyboardInterrupt:
        if is_first:
            print(f"nvembed: interrupted{if_interrupted}", file=sys.stderr)
        return INTERRUPTED
    finally:
        if "nvembed_mcore.parallel.groups" in sys.modules:
            sys.modules["nvembed_mcore.parallel.groups"].shutdown()


def _train(arguments: list[str]) -> None:
    """`nvembed train CONFIG.yaml [--field.of.the.tree value ...]`."""
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, set_parsing_settings

    from nvembed_mcore.config import ConfigError, RunConfig

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="nvembed train",
        usage="nvembed train CONFIG.yaml [--field value ...]",
        description="Train one stage. With several processes: torchrun --nproc-per-node N -m nvembed_mcore train ...",
        exit_on_error=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; the first argument may be it as well")
    parser.add_class_arguments(RunConfig)
    if arguments and not arguments[0].startswith("-"):
        if not os.path.isfile(arguments[0]):
            raise FileNotFoundError(f"no configuration file at {arguments[0]}")
        arguments = ["--config", *arguments]
    try:
        fields = parser.instantiate(parser.parse_args(arguments)).as_dict()
    except ArgumentError as error:
        source = f"{arguments[1]} or the options" if arguments[:1] == ["--config"] else "the options"
        raise ConfigError(f"{error}\n(in {source}; `nvembed train --help` lists all fields)") from error
    fields.pop("config")
    from nvembed_mcore.train import train

    train(RunConfig(**fields))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nvembed", description="Text embedding models on Megatron-Core.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("train", help="train one stage: nvembed train CONFIG.yaml [--field value ...]", add_help=False)
    _add_import(commands)
    _add_export(commands)
    _add_inspect(commands)
    _add_evaluate(commands)
    _add_encode(commands)
    _add_search(commands)
    _add_data(commands)
    return parser


def _add_import(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "import-hf",
        help="write a Hugging Face folder (Mistral, NV-Embed or an export) as a checkpoint for model.init_from",
    )
    command.add_argument("source", help="Hugging Face folder with safetensors")
    command.add_argument("output", help="checkpoint folder to write; must not exist")
    command.add_argument("--tokenizer", help="tokenizer folder; default: the source, if it has a tokenizer.json")
    command.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the written weights; default: as stored"
    )
    command.set_defaults(run=_import)


def _import(arguments: argparse.Namespace) -> None:
    from nvembed_mcore.checkpoint.import_run import import_hf

    done = import_hf(arguments.source, arguments.output, tokenizer=arguments.tokenizer, dtype=arguments.dtype)
    if os.environ.get("RANK", "0") == "0":
        checked = f", SHA-256 of {done.checked_files} of its files as listed" if done.checked_files else ""
        print(
            f"{done.architecture}: {done.num_tensors} tensors, {done.num_parameters:,} parameters, "
            f"{done.num_bytes / 1e9:.2f} GB in {done.seconds:.1f} s{checked}: {arguments.output}"
        )


def _add_export(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("export-hf", help="write a checkpoint as a Hugging Face folder")
    command.add_argument("source", help="run folder or checkpoint folder")
    command.add_argument("output", help="folder to write; must not exist")
    command.add_argument(
        "--format",
        choices=["nv-embed", "mean", "peft"],
        default="nv-embed",
        help="nv-embed (default): NV-Embed's names, with a modelling file; mean: a plain MistralModel without code; "
        "peft: adapters and head alone, for the base they were trained on",
    )
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    command.add_argument(
        "--instruction", help="of the queries (prompt `query` of the export); default: the first data set's"
    )
    command.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> None:
    from nvembed_mcore.checkpoint.export_run import export_adapters, export_run

    if arguments.format == "peft":
        export_adapters(arguments.source, arguments.output, dtype=arguments.dtype)
    else:
        export_run(
            arguments.source,
            arguments.output,
            format=arguments.format,
            dtype=arguments.dtype,
            instruction=arguments.instruction,
        )
    print(f"exported to {arguments.output}")


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("inspect", help="show what a Hugging Face, adapter, run or checkpoint folder holds")
    command.add_argument("folder")
    command.add_argument("--tensors", action="store_true", help="list every tensor instead of one line for all layers")
    command.add_argument("--json", help="write everything here as well")
    command.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from nvembed_mcore.checkpoint.contents import inspect_folder, tables

    found = inspect_folder(arguments.folder)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else 140)
    for table in tables(found, all_tensors=arguments.tensors):
        console.print(table)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="exported folder")
    command.add_argument("--instruction", help="task of the queries; default: the one the model was exported with")
    command.add_argument("--max-length", type=int, default=512, help="longest text in tokens (default 512)")
    command.add_argument("--device", default="cpu", help="torch device (default cpu)")


def _encoder(arguments: argparse.Namespace) -> Callable:
    """The exported model that `_add_model`'s arguments name."""
    from nvembed_mcore.evaluation.exported import ExportedEncoder

    return ExportedEncoder(
        arguments.model,
        instruction=arguments.instruction,
        max_length=arguments.max_length,
        device=arguments.device,
    )


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("evaluate", help="retrieval metrics of an exported folder on a BEIR-format test set")
    _add_model(command)
    command.add_argument("data", help="folder with corpus.jsonl, queries.jsonl and qrels/test.tsv")
    command.add_argument("--json", help="write the metrics here as well")
    command.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    from nvembed_mcore.evaluation.exported import evaluate_beir

    encoder = _encoder(arguments)
    metrics = evaluate_beir(encoder, arguments.data)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    for name, value in metrics.items():
        print(f"{name:14} {value:.4f}")


def _add_encode(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("encode", help="embed the lines of a text file")
    _add_model(command)
    command.add_argument("texts", help="UTF-8 file, one text a line")
    command.add_argument("output", help="NumPy file to write: float32 [lines, D]")
    command.add_argument("--queries", action="store_true", help="put the instruction in front of each text")
    command.set_defaults(run=_encode)


def _encode(arguments: argparse.Namespace) -> None:
    from nvembed_mcore.evaluation.exported import encode_file

    encoder = _encoder(arguments)
    shape = encode_file(encoder, arguments.texts, arguments.output, are_queries=arguments.queries)
    print(f"{shape[0]} texts, {shape[1]} dimensions: {arguments.output}")


def _add_search(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("search", help="search source files by meaning: nvembed search MODEL FILES... QUERY")
    _add_model(command)
    command.add_argument("paths", nargs="+", metavar="FILES", help="files or folders (*.py in folders)")
    command.add_argument("query")
    command.add_argument("--top", type=int, default=10, help="hits to show (default 10)")
    command.set_defaults(run=_search)


def _search(arguments: argparse.Namespace) -> None:
    from nvembed_mcore.evaluation.search import search_files

    encoder = _encoder(arguments)
    result = search_files(encoder, arguments.paths, arguments.query, top_k=arguments.top)
    for hit in result:
        print(hit)
    skipped = f", {result.num_skipped} not text" if result.num_skipped else ""
    print(f"({result.num_chunks} pieces of {result.num_files} files{skipped})")


def _add_data(commands: argparse._SubParsersAction) -> None:
    kinds = commands.add_parser("data", help="make data sets").add_subparsers(required=True, metavar="KIND")
    tokenizer = kinds.add_parser("tokenizer", help="write Mistral's tokenizer as a Hugging Face folder")
    tokenizer.add_argument("output")
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
    docs.set_defaults(run=_data_python_docs)


def _data_tokenizer(arguments: argparse.Namespace) -> None:
    from nvembed_mcore.data.tokenizer import write_mistral_tokenizer

    write_mistral_tokenizer(arguments.output)
    print(f"tokenizer written to {arguments.output}")


def _data_python_docs(arguments: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from nvembed_mcore.data.python_docs import build_python_docs, statistics_table
    from nvembed_mcore.data.tokenizer import load_tokenizer

    console = Console()
    tokenizer = load_tokenizer(arguments.tokenizer)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, int] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        statistics = build_python_docs(
            arguments.output,
            tokenizer,
            packages=arguments.packages,
            held_out=arguments.held_out,
            negatives=arguments.negatives,
            progress=show,
        )
    console.print(statistics_table(statistics))
