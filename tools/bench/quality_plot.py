"""Pictures of the comparison: losses of both trainers, and the paper's tables as points with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.bench.quality_measure import MEASURES
from tools.bench.quality_recipes import MASKS, ORDERS, POOLINGS, Recipe
from tools.bench.quality_runs import Result
from tools.bench.quality_table import ORDER_TITLES, POOLING_TITLES, SIDE_MEASURES, TITLES, by_seed, mean_of

SHOWN = ("ndcg_at_10", *MEASURES[3:])


def _figure(panels: int) -> tuple[Figure, Sequence[Axes]]:
    # A figure of its own, without pyplot: no display is needed and nothing global changes.
    figure = Figure(figsize=(4.9 * panels, 4.3), dpi=110, layout="constrained")
    return figure, figure.subplots(1, panels)


def plot_side(found: Mapping[int, Result], path: Path) -> None:
    """Loss by step, difference by step, and held-out quality of each seed.

    Args:
        found: seed -> result of `quality_side.train_both`.
    """
    figure, (losses, apart, quality) = _figure(3)
    for number, (seed, result) in enumerate(sorted(found.items())):
        ours, peer = result["ours"]["losses"], result["peer"]["losses"]
        steps, first = np.arange(1, len(ours) + 1), number == 0
        losses.plot(steps, ours, color=f"C{number}", linewidth=2.4, alpha=0.45, label=f"this trainer, seed {seed}")
        losses.plot(steps, peer, "k:", linewidth=0.9, label="sentence-transformers" if first else None)
        _dots(quality, number, result)
    for name, colour, label in (("peer", "C3", "sentence-transformers"), ("repacked", "C0", "own smaller packs")):
        _apart(apart, [(result["ours"]["losses"], result[name]["losses"]) for result in found.values()], colour, label)
    _finish(losses, "Training loss", "step")
    _finish(apart, "Relative difference from our loss, worst seed", "step")
    quality.set_xticks(range(len(SIDE_MEASURES)), [TITLES[one] for one in SIDE_MEASURES])
    _finish(quality, f"Held-out retrieval, {len(found)} seed{'s' * (len(found) > 1)}", "")
    quality.set_ylim(bottom=0)
    quality.set_xlim(-0.5, len(SIDE_MEASURES) - 0.5)
    figure.savefig(path, format="png")


def _apart(axes: Axes, pairs: Sequence[tuple[Sequence[float], Sequence[float]]], colour: str, label: str) -> None:
    """The largest relative difference of any seed, by step."""
    ours, others = np.array(pairs).swapaxes(0, 1)
    # A difference of nothing has no place on a logarithmic axis; float32 has 24 bits.
    difference = np.maximum(np.abs(ours / others - 1).max(0), 2.0**-24)
    axes.plot(np.arange(1, len(difference) + 1), difference, color=colour, linewidth=1.1, alpha=0.8, label=label)
    axes.set_yscale("log")


def _dots(axes: Axes, number: int, result: Result) -> None:
    for name, mark, size, shift in (("ours", "o", 9, -0.06), ("peer", "x", 7, 0.06)):
        values = [result["quality"][name][one] for one in SIDE_MEASURES]
        at = np.arange(len(values)) + shift
        label = {"ours": "this trainer", "peer": "sentence-transformers"}[name] if number == 0 else None
        fill = {"markerfacecolor": "none"} if name == "ours" else {}
        axes.plot(at, values, mark, color=f"C{number}", markersize=size, label=label, **fill)


def plot_poolings(found: Mapping[Recipe, Result], path: Path) -> None:
    """Table 2 after its second stage: a panel for each measure."""
    figure, panels = _figure(len(SHOWN))
    for axes, measure in zip(panels, SHOWN, strict=True):
        for number, mask in enumerate(MASKS):
            rows = [by_seed(found, Recipe(pooling=pooling, mask=mask), 1, measure) for pooling in POOLINGS]
            _means(axes, rows, 0.24 * number - 0.12, f"C{number}", mask)
        axes.set_xticks(range(len(POOLINGS)), [POOLING_TITLES[one].strip("`") for one in POOLINGS], fontsize=9)
        _finish(axes, f"{TITLES[measure]}, two stages", "")
    figure.savefig(path, format="png")


def plot_orders(found: Mapping[Recipe, Result], path: Path) -> None:
    """Table 4: a panel for each measure."""
    figure, panels = _figure(len(SHOWN))
    for axes, measure in zip(panels, SHOWN, strict=True):
        for number, (taught, label) in enumerate(
            [(False, "from random weights"), (True, "after 100 steps of search")]
        ):
            rows = [by_seed(found, Recipe(order=order, taught=taught), -1, measure) for order in ORDERS]
            _means(axes, rows, 0.24 * number - 0.12, f"C{number + 2}", label)
        titles = [ORDER_TITLES[order].replace(", ", ",\n") for order in ORDERS]
        axes.set_xticks(range(len(ORDERS)), titles, fontsize=8)
        _finish(axes, TITLES[measure], "")
    figure.savefig(path, format="png")


def _means(axes: Axes, rows: Sequence[Mapping[int, float]], shift: float, colour: str, label: str) -> None:
    """Each seed as a point, the mean with its 95 % interval beside it."""
    for at, row in enumerate(rows):
        if row:
            mean = mean_of(row.values())
            half = np.nan_to_num(mean.half)
            place = at + shift
            axes.plot([place - 0.05] * len(row), [*row.values()], "o", color=colour, markersize=3.5, alpha=0.5)
            named = label if at == 0 else None
            axes.errorbar(place + 0.04, mean.value, yerr=half, fmt="D", color=colour, capsize=4, ms=5, label=named)


def _finish(axes: Axes, title: str, x: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8.5)
