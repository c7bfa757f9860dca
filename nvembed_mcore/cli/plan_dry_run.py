"""`nvembed plan CONFIG.yaml --dry-run --gpus N`: some ranks of a run of any size, built on this machine."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nvembed_mcore.cli.results import Tables, give
from nvembed_mcore.config import ConfigError, RunConfig

if TYPE_CHECKING:
    from rich.table import Table

    from nvembed_mcore.scaling.dry_run import DryRun, Packing, Rank


def numbers(text: str) -> list[int]:
    """`0,8,1023` as numbers, for `--ranks`."""
    return [int(word) for word in text.split(",")]


def dry_run(config: RunConfig, options: argparse.Namespace) -> None:
    """Print what ranks of a run would have, and write it where `--json` says.

    Args:
        options: those of `nvembed plan`.

    Raises:
        ConfigError, DataError, WeightsError: what `train` raises of such a run.
    """
    from nvembed_mcore.model.mistral import read_mistral_config
    from nvembed_mcore.scaling.dry_run import dry_run as build_ranks

    if len(options.gpus) > 1:
        raise ConfigError(f"--dry-run builds a run of one size, got --gpus {','.join(map(str, options.gpus))}")
    found = build_ranks(
        config,
        *options.gpus,
        hf_config=read_mistral_config(options.architecture) if options.architecture else None,
        lengths=options.lengths,
        ranks=options.ranks,
        device_type="cpu" if options.device == "cpu" else "cuda",
    )
    give(dataclasses.asdict(found), options.json, lambda: _print(found))


def _print(found: DryRun) -> None:
    console = Tables(150)
    console.print(_headline(found), highlight=False)
    console.print(_rank_table(found.ranks))
    console.print(_packing_table(found.packing))
    for warning in found.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)


def _headline(found: DryRun) -> str:
    layout = ", ".join(f"{name} {size:,}" for name, size in found.layout.items())
    stages = f"; layers of the stages: {_runs(found.stages)}" if len(found.stages) > 1 else ""
    return f"{found.gpus:,} processes ({layout}){stages}; {len(found.ranks)} of them were built, none on a GPU"


def _runs(stages: Sequence[int]) -> str:
    """Layers of the stages, those alike together: `3 x 8, 7`."""
    runs: list[list[int]] = []
    for layers in stages:
        if runs and runs[-1][1] == layers:
            runs[-1][0] += 1
        else:
            runs.append([1, layers])
    return ", ".join(f"{number} x {layers}" if number > 1 else str(layers) for number, layers in runs)


def _rank_table(ranks: Sequence[Rank]) -> Table:
    table = _table(
        "Ranks",
        *("rank", "tp pp cp dp", "layers", "trained", "frozen"),
        *("weights GB", "gradients GB", "optimizer GB", "checkpoint GB", "largest"),
        caption="Layers are numbered from 0. A checkpoint's GB are those that the rank writes; largest: that one of "
        "all with the same parameters writes. Activations are not in these: `nvembed plan` estimates them.",
    )
    for one in ranks:
        sizes = (one.weights, one.gradients, one.optimizer, one.checkpoint, one.largest_checkpoint)
        chunks = ", ".join(f"{chunk[0]}-{chunk[-1]}" for chunk in one.layers)
        table.add_row(
            f"{one.rank:,}",
            " ".join(map(str, one.place.values())),
            chunks,
            f"{one.trained:,}",
            f"{one.frozen:,}",
            *(f"{size / 1e9:.3f}" for size in sizes),
        )
    return table


def _packing_table(found: Packing) -> Table:
    table = _table(f"Packs of {found.steps} steps", "", "", caption=f"Lengths: {found.source}")
    rows = {
        "texts, tokens of a step": f"{found.texts:,.0f}, {found.tokens:,.0f}",
        "tokens of the fullest, emptiest rank": f"{found.fullest:,}, {found.emptiest:,}",
        "fullest over mean": f"{found.imbalance:.3f}",
        "packs of a rank, most and fewest": f"{found.most_packs}, {found.fewest_packs}",
        "tokens that only fill": f"{found.padding:.2%}",
        "ranks without text in a step, at most": f"{found.ranks_without_text:,}",
        "steps in which a rank has no text": f"{found.steps_with_idle_ranks} of {found.steps}",
    }
    for row in rows.items():
        table.add_row(*row)
    return table


def _table(title: str, *columns: str, caption: str | None = None) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table
