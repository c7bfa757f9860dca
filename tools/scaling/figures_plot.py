"""The plots of tools/scaling/figures.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nvembed_mcore.scaling.hardware import cluster

Row = dict[str, Any]
COLOURS = {("LoRA", "BF16"): "C0", ("LoRA", "FP8"): "C1", ("full", "BF16"): "C2", ("full", "FP8"): "C3"}
MARKS = {"BF16": "o", "FP8": "s"}
USABLE_GB = cluster("h200").device.memory_bytes / 1e9
LARGEST_TERMS = 8
"""So many terms, or kinds of memory, have a colour of their own; the others are one."""


def draw(rows: list[Row], to: Path) -> None:
    """Write the five files."""
    rows = [row for row in rows if "seconds" in row]
    strong = [(f"Stage {stage}, 1,152 sequences a step", _of(rows, "strong", stage)) for stage in (1, 2)]
    _save(to / "plan-strong.png", strong, _seconds)
    longest = ("Stage 1, 1,152 sequences of 512 tokens", _of(rows, "longest", 1))
    _save(to / "plan-efficiency.png", [strong[0], longest], _efficiency)
    weak = [
        ("Stage 1, 144 sequences a GPU", _of(rows, "weak", 1)),
        ("Stage 1, 73,728 sequences a step", _of(rows, "larger", 1)),
    ]
    _save(to / "plan-weak.png", weak, _tokens)
    kinds = [("LoRA", "FP8"), ("full", "BF16")]
    parts = [
        (f"Stage 1, 1,152 sequences, {weights} {precision}", [
            row for row in _of(rows, "strong", 1) if (row["weights"], row["precision"]) == (weights, precision)
        ])
        for weights, precision in kinds
    ]  # fmt: skip
    _save(to / "plan-terms.png", parts, _terms)
    _save(to / "plan-memory.png", parts, _memory)


def _of(rows: Iterable[Row], study: str, stage: int) -> list[Row]:
    return [row for row in rows if (row["study"], row["stage"]) == (study, stage)]


def _save(path: Path, panels: list[tuple[str, list[Row]]], panel: Callable[[Axes, list[Row]], None]) -> None:
    """Two panels side by side. A figure of its own, without pyplot: no display is needed."""
    figure = Figure(figsize=(12.8, 4.8), dpi=100, layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axes.set_title(f"{title} (by plan)", loc="left", fontsize=11, fontweight="bold")
        if rows:
            panel(axes, sorted(rows, key=lambda row: row["gpus"]))
        axes.set_xlabel("H200s")
    figure.savefig(path, format="png")


def _kinds(rows: list[Row]) -> list[tuple[tuple[str, str], list[Row]]]:
    found = [(kind, [row for row in rows if (row["weights"], row["precision"]) == kind]) for kind in COLOURS]
    return [(kind, some) for kind, some in found if some]


def _gpus_axis(axes: Axes, rows: list[Row]) -> None:
    ticks = sorted({row["gpus"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _lines(axes: Axes, rows: list[Row], value: Callable[[Row], float], ends: Callable[[Row], tuple]) -> None:
    for kind, some in _kinds(rows):
        x = [row["gpus"] for row in some]
        axes.plot(x, [value(row) for row in some], color=COLOURS[kind], marker=MARKS[kind[1]], markersize=4,
                  linewidth=1.4, label=" ".join(kind))  # fmt: skip
        low, high = zip(*(ends(row) for row in some), strict=True)
        axes.fill_between(x, low, high, color=COLOURS[kind], alpha=0.13, linewidth=0)
    if beyond := [row for row in rows if not row["fits"]]:
        x, y = [row["gpus"] for row in beyond], [value(row) for row in beyond]
        axes.plot(x, y, "x", color="black", markersize=10, label="does not fit the memory")
    _gpus_axis(axes, rows)


def _seconds(axes: Axes, rows: list[Row]) -> None:
    _lines(axes, rows, lambda row: row["seconds"], lambda row: (row["low"], row["high"]))
    for kind, some in _kinds(rows)[:1]:
        first = some[0]
        ideal = [first["seconds"] * first["gpus"] / row["gpus"] for row in some]
        axes.plot([row["gpus"] for row in some], ideal, ":", color="0.3", label=f"ideal, from {' '.join(kind)}")
    axes.set_yscale("log")
    axes.set_ylabel("seconds a step")
    axes.legend(fontsize=9)


def _efficiency(axes: Axes, rows: list[Row]) -> None:
    def ends(row: Row) -> tuple[float, float]:
        return tuple(100 * row["efficiency"] * row["seconds"] / row[end] for end in ("high", "low"))

    _lines(axes, rows, lambda row: 100 * row["efficiency"], ends)
    axes.axhline(50, color="0.4", linestyle=":", linewidth=1)
    axes.set_ylim(0, 1.1 * max(100 * row["efficiency"] for row in rows))
    axes.set_ylabel("tokens/s/GPU, % of that on the fewest GPUs")
    axes.legend(fontsize=9, loc="lower left")


def _tokens(axes: Axes, rows: list[Row]) -> None:
    def ends(row: Row) -> tuple[float, float]:
        return tuple(row["tokens_per_second_per_gpu"] * row["seconds"] / row[end] / 1e3 for end in ("high", "low"))

    _lines(axes, rows, lambda row: row["tokens_per_second_per_gpu"] / 1e3, ends)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("thousand real tokens a second and GPU")
    axes.legend(fontsize=9, loc="lower left")


def _terms(axes: Axes, rows: list[Row]) -> None:
    _stacked(axes, rows, "t_", [row["seconds"] / 100 for row in rows])
    axes.set_ylabel("% of a step")
    for place, row in enumerate(rows):
        axes.text(place, 101, f"{1000 * row['seconds']:.0f} ms" if row["seconds"] < 1 else f"{row['seconds']:.1f} s",
                  ha="center", fontsize=7.5)  # fmt: skip
    axes.set_ylim(0, 108)


def _memory(axes: Axes, rows: list[Row]) -> None:
    _stacked(axes, rows, "m_", [1e9] * len(rows))
    axes.axhline(USABLE_GB, color="0.2", linestyle=":", linewidth=1)
    axes.set_ylabel(f"GB of the fullest GPU (line: {USABLE_GB:.0f} usable)")
    axes.set_ylim(0, 150)


def _stacked(axes: Axes, rows: list[Row], prefix: str, units: list[float]) -> None:
    """Bars by part, the largest parts in the order of their mean share."""
    names = {name for row in rows for name in row if name.startswith(prefix)}
    values = {name: np.array([row.get(name) or 0.0 for row in rows]) / units for name in names}
    ordered = sorted(names, key=lambda name: -values[name].mean())
    shown = [(name[len(prefix) :].replace("_", " "), values[name]) for name in ordered[:LARGEST_TERMS]]
    if rest := [values[name] for name in ordered[LARGEST_TERMS:]]:
        shown.append(("other", np.sum(rest, axis=0)))
    bottom = np.zeros(len(rows))
    for number, (name, heights) in enumerate(shown):
        axes.bar(range(len(rows)), heights, bottom=bottom, label=name, color=f"C{number}", width=0.8)
        bottom += heights
    labels = [f"{row['gpus']:,}\nTP {row['tp']} PP {row['pp']}" for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=7.5)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
