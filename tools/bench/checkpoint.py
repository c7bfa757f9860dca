"""Memory and time of importing a Hugging Face folder and of exporting one, for two synthetic models in bfloat16.

`thin`: 32 layers of width 512 with the full vocabulary. `full`: two layers of Mistral-7B's width and NV-Embed's head.
Everything runs in processes of its own. Memory is the high-water mark of the resident set (pages of mapped files
included) less what was resident when the work began. Ends with status 1 where memory exceeds its bound.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import MistralConfig

from nvembed_mcore.checkpoint.names import name_table
from nvembed_mcore.checkpoint.safetensors_stream import write_weights
from nvembed_mcore.config import PoolingConfig
from tests.helpers import transfer
from tests.helpers.world import World

FIGURES = """keys of the figures (MODEL is thin or full, WORK as below):
  MODEL_files_bytes         bytes of the folder's weight files
  MODEL_largest_bytes       largest parameter, which is made of one Hugging Face tensor or of several
  MODEL_read_seconds        reading the files to nowhere by one process, from the page cache
  MODEL_load_seconds        reading them into memory that is kept
  MODEL_copy_seconds        reading and writing them, with fsync
  MODEL_WORK_peak_bytes     highest memory of a rank beyond what was resident before
  MODEL_WORK_bound_bytes    what it may be. init: the rank's parameters and one tensor. import: a parameter and one
                            tensor. export: a parameter, and as it was stored. Each with the allowance
  MODEL_WORK_seconds        of the slowest rank, median of the repeats
WORK: init_tpT_ppP builds the encoder and fills it, as a run does; import_rR is nvembed import-hf by R processes;
export writes the weights as export-hf does, by one process.
"""
ALLOWANCE = 48 << 20
"""Bytes for libraries that are loaded late, buffers, the writer's blocks and gaps of the heap."""
MODELS = {
    "thin": MistralConfig(
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=32,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=32000,
        sliding_window=None,
    ),
    "full": MistralConfig(num_hidden_layers=2, vocab_size=32000, sliding_window=None),
}
POOLING = {"thin": PoolingConfig(kind="mean"), "full": PoolingConfig()}
LAYOUTS = [(1, 1), (2, 1), (1, 2)]


def write_model(folder: Path, model: str) -> None:
    """A folder of random weights in NV-Embed's names."""
    config, pooling = MODELS[model], POOLING[model]
    entries = {entry.name: entry for entry in name_table(config, pooling)}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(transfer.config_json(config, pooling)), encoding="utf-8")
    draw = lambda name: torch.empty(entries[name].shape, dtype=torch.bfloat16).normal_(0, 0.02)  # noqa: E731
    write_weights(draw, list(entries.values()), folder, torch.bfloat16, 1_000_000_000)


# Work, in the processes


class Peak:
    """`with Peak() as peak`: `peak.bytes` is the highest resident set in between, less what was resident before."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        self.before = self._status("VmRSS")
        return self

    def __exit__(self, *caught: object) -> None:
        self.bytes = self._status("VmHWM") - self.before

    @staticmethod
    def _status(field: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/self/status has no {field}")


def measured(work: Callable[[], Any]) -> dict[str, float]:
    with Peak() as peak:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
    return {"peak": peak.bytes, "seconds": seconds}


def init(folder: Path, tp: int, pp: int) -> dict[str, float]:
    """Build this rank's part of the encoder and fill it; `partition`: its bytes."""
    from nvembed_mcore.checkpoint.hf_import import load_weights
    from nvembed_mcore.checkpoint.hf_model import open_hf_model

    transfer.layout(tp, pp, False)
    parameters: dict[str, torch.nn.Parameter] = {}

    def work() -> None:
        found = open_hf_model(folder)
        encoder, _, groups = transfer.build_encoder(found.hf_config, found.pooling, "bfloat16", tp, pp)
        parameters.update(encoder.parameters_by_global_name())
        entries = [entry for entry in found.entries() if entry.name in parameters]
        load_weights(found.folder, entries, parameters, groups.tp_rank, groups.tp_size)

    return measured(work) | {"partition": sum(parameter.nbytes for parameter in parameters.values())}


def import_hf(folder: Path, output: Path) -> dict[str, float]:
    from nvembed_mcore.checkpoint import import_run
    from nvembed_mcore.config import ParallelConfig
    from nvembed_mcore.parallel.groups import initialize

    initialize(ParallelConfig())
    return measured(lambda: import_run.import_hf(str(folder), str(output)))


def export(checkpoint: Path, output: Path, model: str) -> dict[str, float]:
    from nvembed_mcore.checkpoint.store import find_checkpoint, open_weights

    output.mkdir()
    found, entries = find_checkpoint(checkpoint), name_table(MODELS[model], POOLING[model])
    return measured(lambda: write_weights(open_weights(found), entries, output, torch.bfloat16))


def read_files(files: list[Path], output: Path | None = None) -> float:
    """Seconds of reading files in blocks and, with an output, of writing them there."""
    start = time.perf_counter()
    buffer = bytearray(1 << 22)
    for file in files:
        target = open(output / file.name, "wb") if output else None
        with open(file, "rb") as opened:
            while count := opened.readinto(buffer):
                if target:
                    target.write(memoryview(buffer)[:count])
        if target:
            target.flush()
            os.fsync(target.fileno())
            target.close()
    return time.perf_counter() - start


def load_files(files: list[Path]) -> float:
    """Seconds of reading files into memory."""
    start = time.perf_counter()
    kept = [file.read_bytes() for file in files]
    seconds = time.perf_counter() - start
    del kept
    return seconds


# The tables


def run_apart(num_processes: int, function: Callable, *arguments: Any) -> list[dict[str, float]]:
    """The result of each rank, in processes that have done nothing else."""
    world = World(num_processes)
    try:
        return world.run(function, *arguments, timeout_seconds=600)
    finally:
        world.stop()


def bench(model: str, room: Path, repeats: int) -> dict[str, float]:
    folder = room / model
    write_model(folder, model)
    files = sorted(folder.glob("*.safetensors"))
    entries = name_table(MODELS[model], POOLING[model])
    sizes = [torch.Size(shape).numel() * 2 for entry in entries for shape in entry.hf.values()]
    largest, tensor = max(torch.Size(entry.shape).numel() * 2 for entry in entries), max(sizes)
    figures: dict[str, float] = {"files_bytes": sum(sizes), "largest_bytes": largest}
    read_files(files)  # warms the page cache
    figures["read_seconds"] = sorted(read_files(files) for _ in range(repeats))[repeats // 2]
    figures["load_seconds"] = sorted(load_files(files) for _ in range(repeats))[repeats // 2]
    (room / "copy").mkdir()
    figures["copy_seconds"] = read_files(files, room / "copy")
    shutil.rmtree(room / "copy")

    def note(work: str, bound: Callable[[dict], int], run: Callable[[int], list[dict[str, float]]]) -> None:
        results = [run(number) for number in range(repeats)]
        worst = max((one for ranks in results for one in ranks), key=lambda one: one["peak"] - bound(one))
        slowest = sorted(max(one["seconds"] for one in ranks) for ranks in results)
        figures[f"{work}_peak_bytes"], figures[f"{work}_bound_bytes"] = worst["peak"], bound(worst) + ALLOWANCE
        figures[f"{work}_seconds"] = slowest[repeats // 2]

    for tp, pp in LAYOUTS:
        note(
            f"init_tp{tp}_pp{pp}",
            lambda one: int(one["partition"]) + tensor,
            lambda number, tp=tp, pp=pp: run_apart(tp * pp, init, folder, tp, pp),
        )
    for ranks in (1, 2):
        note(
            f"import_r{ranks}",
            lambda one: largest + tensor,
            lambda number, ranks=ranks: run_apart(ranks, import_hf, folder, _emptied(room / f"imported{ranks}")),
        )
    note(
        "export",
        lambda one: 2 * largest,
        lambda number: run_apart(1, export, room / "imported1", _emptied(room / "export"), model),
    )
    shutil.rmtree(room)
    return figures


def _emptied(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    return path


def show(model: str, figures: dict[str, float]) -> None:
    size, largest = figures["files_bytes"], figures["largest_bytes"]
    seconds = ", ".join(f"{how} {figures[f'{how}_seconds']:.2f} s" for how in ("read", "load", "copy"))
    print(f"\n{model}: {size / 1e6:,.0f} MB in files, largest parameter {largest / 1e6:,.0f} MB; {seconds}")
    print(f"{'work':>14} {'peak MB':>9} {'bound MB':>9} {'seconds':>9} {'x read':>7} {'x load':>7} {'x copy':>7}")
    for key in figures:
        if key.endswith("_peak_bytes"):
            work = key.removesuffix("_peak_bytes")
            seconds = figures[f"{work}_seconds"]
            print(
                f"{work:>14} {figures[key] / 1e6:9,.0f} {figures[f'{work}_bound_bytes'] / 1e6:9,.0f} {seconds:9.2f}"
                + "".join(f" {seconds / figures[f'{how}_seconds']:7.1f}" for how in ("read", "load", "copy")),
                flush=True,
            )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=FIGURES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement (default: 3)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all figures to PATH as one flat object")
    arguments = parser.parse_args()
    everything, over = {}, []
    for model in arguments.models:
        figures = bench(model, Path(tempfile.mkdtemp(prefix="nvembed-bench-")), arguments.repeats)
        show(model, figures)
        everything |= {f"{model}_{key}": value for key, value in figures.items()}
        over += [
            f"{model} {key.removesuffix('_peak_bytes')}"
            for key in figures
            if key.endswith("_peak_bytes") and figures[key] > figures[key.replace("_peak_", "_bound_")]
        ]
    if arguments.json:
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    if over:
        print(f"over their bound: {', '.join(over)}")
    return 1 if over else 0


if __name__ == "__main__":
    raise SystemExit(main())
