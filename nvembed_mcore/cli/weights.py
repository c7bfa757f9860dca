"""`nvembed import-hf`, `export-hf`, `export-onnx` and `inspect`: weights in, out and looked at."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from nvembed_mcore.cli.encode import is_first_rank
from nvembed_mcore.cli.results import add_json, give, print_tables

if TYPE_CHECKING:
    from nvembed_mcore.checkpoint.import_run import Imported


def add(commands: argparse._SubParsersAction) -> None:
    _add_import(commands)
    _add_export(commands)
    _add_export_onnx(commands)
    _add_inspect(commands)


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
    add_json(command, "what was imported")
    command.set_defaults(run=_import)


def _import(arguments: argparse.Namespace) -> None:
    from nvembed_mcore.checkpoint.import_run import import_hf

    done = import_hf(arguments.source, arguments.output, tokenizer=arguments.tokenizer, dtype=arguments.dtype)
    if is_first_rank():
        found = dataclasses.asdict(done) | {"output": arguments.output}
        give(found, arguments.json, lambda: _print_imported(done, arguments.output))


def _print_imported(done: Imported, output: str) -> None:
    checked = f", SHA-256 of {done.checked_files} of its files as listed" if done.checked_files else ""
    print(
        f"{done.architecture}: {done.num_tensors} tensors, {done.num_parameters:,} parameters, "
        f"{done.num_bytes / 1e9:.2f} GB in {done.seconds:.1f} s{checked}: {output}"
    )


def _add_export(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("export-hf", help="write a checkpoint as a Hugging Face folder")
    command.add_argument("source", help="run folder (its newest checkpoint) or checkpoint folder")
    command.add_argument("output", help="folder to write; must not exist")
    command.add_argument("--best", action="store_true", help="of a run folder: the checkpoint of the best evaluation")
    command.add_argument(
        "--weights",
        choices=["ema", "last"],
        help="of a run with optim.ema_decay: the averaged weights (default) or those of the last step",
    )
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
    add_json(command, "what was exported")
    command.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> None:
    from nvembed_mcore.checkpoint.best import BEST
    from nvembed_mcore.checkpoint.export_run import export_adapters, export_run
    from nvembed_mcore.checkpoint.folders import folder_of

    source = str(folder_of(arguments.source) / BEST) if arguments.best else arguments.source
    common = {"dtype": arguments.dtype, "weights": arguments.weights}
    if arguments.format == "peft":
        export_adapters(source, arguments.output, **common)
    else:
        export_run(source, arguments.output, format=arguments.format, instruction=arguments.instruction, **common)
    found = {"source": source, "output": arguments.output, "format": arguments.format, **common}
    give(found, arguments.json, lambda: print(f"exported to {arguments.output}"))


def _add_export_onnx(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("export-onnx", help="write an exported folder as an ONNX graph")
    command.add_argument("source", help="exported folder (export-hf)")
    command.add_argument("output", help="folder to write; must not exist")
    command.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    add_json(command, "what was exported")
    command.set_defaults(run=_export_onnx)


def _export_onnx(arguments: argparse.Namespace) -> None:
    from nvembed_mcore.checkpoint.onnx_export import export_onnx

    done = export_onnx(arguments.source, arguments.output, dtype=arguments.dtype)
    line = (
        f"exported to {arguments.output}: {done.num_bytes / 1e6:,.1f} MB; onnxruntime against torch: cosine at least "
        f"{done.cosine:.7f}"
    )
    give(dataclasses.asdict(done) | {"output": arguments.output}, arguments.json, lambda: print(line))


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("inspect", help="show what a Hugging Face, adapter, run or checkpoint folder holds")
    command.add_argument("folder")
    command.add_argument("--tensors", action="store_true", help="list every tensor instead of one line for all layers")
    add_json(command)
    command.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    from nvembed_mcore.checkpoint.contents import inspect_folder, tables

    found = inspect_folder(arguments.folder)
    give(found, arguments.json, lambda: print_tables(tables(found, all_tensors=arguments.tensors)))
