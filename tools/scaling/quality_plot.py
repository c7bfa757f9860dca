"""The plots of the quality study: each seed, their mean, the fitted curve with its interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.scaling.quality_fit import FORMS, fit, levels_of

X_LABELS = {
    "negatives": "in-batch negatives of a query",
    "tokens": "training tokens (queries and documents), millions",
    "width": "hidden size",
    "temperature": "temperature of the loss",
}
PANELS: dict[str, list[tuple[str, str, dict[str, str]]]] = {
    "negatives": [
        (
            "negatives",
            "Negatives by larger batches",
            {"negatives": "equal queries seen: 8 passes", "negatives_equal_steps": "equal steps: 39"},
        ),
        ("negatives", "Negatives alone", {"negatives_alone": "batch 2,048, 8 passes, records in parts"}),
    ],
    "tokens": [
        (
            "tokens",
            "Tokens seen, 256 queries a step",
            {"tokens": "runs with their own schedules", "tokens_on_the_way": "on the way of the longest run"},
        )
    ],
    "width": [("width", "Width, one pass over the data", {"width": "rate by the root of 1 / width"})],
    "temperature": [("temperature", "Temperature, 4 passes", {"temperature": "256 queries a step"})],
}
"""File -> panels: (label of x, title, axis -> legend)."""


def plot(rows: list[dict[str, Any]], to: Path) -> None:
    """Write `quality-NAME.png` for every name of `PANELS` of which there are rows."""
    for name, panels in PANELS.items():
        panels = [panel for panel in panels if {row["axis"] for row in rows} & {*panel[2]}]
        if not panels:
            continue
        # A figure of its own, without pyplot: no display is needed and nothing global changes.
        figure = Figure(figsize=(6.4 * len(panels), 4.6), dpi=110, layout="constrained")
        for axes, (x, title, series) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
            _panel(axes, rows, series, 1e-6 if name == "tokens" else 1.0)
            axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
            axes.set_xlabel(X_LABELS[x])
        figure.savefig(to / f"quality-{name}.png", format="png")


def _panel(axes: Axes, rows: list[dict[str, Any]], series: dict[str, str], unit: float) -> None:
    axes.set_xscale("log")
    for number, (axis, label) in enumerate(series.items()):
        colour = f"C{number}"
        if axis == "tokens_on_the_way":
            _on_the_way(axes, rows, label, colour, unit)
        elif levels := levels_of(rows, axis):
            _points_and_curve(axes, levels, axis, label, colour, unit)
    ticks = sorted({x * unit for axis in series if axis in X_LABELS or axis.startswith("negatives")
                    for x, _ in levels_of(rows, axis)})  # fmt: skip
    if len(ticks) > 6:
        # Points that are shared by two series, or nearly.
        ticks = [one for one, before in zip(ticks, [0.0, *ticks], strict=False) if one > 1.5 * before]
    axes.set_xticks(ticks, [f"{tick:,.0f}" if tick >= 20 else f"{tick:.3g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylabel("held-out nDCG@10")
    axes.grid(alpha=0.3)
    axes.set_ylim(0, 1.15 * max(row["ndcg_at_10"] for row in rows if row["axis"] in series))
    axes.legend(fontsize=8.5, loc="lower right")


def _points_and_curve(axes: Axes, levels: list, axis: str, label: str, colour: str, unit: float) -> None:
    x, means = np.array([at for at, _ in levels]), np.array([np.mean(values) for _, values in levels])
    for at, values in levels:
        axes.plot([at * unit] * len(values), values, "o", color=colour, markersize=3, alpha=0.55)
    spread = [np.std(values, ddof=1) if len(values) > 1 else 0.0 for _, values in levels]
    seeds = sorted({len(values) for _, values in levels})
    counted = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    what = f"{counted} seed{'s' * (seeds[-1] > 1)}"
    # Two series may share a run: one mark is inside the other.
    mark = {"fmt": "D", "markersize": 5} if colour == "C0" else {"fmt": "s", "markersize": 8, "mfc": "none"}
    label = f"{label}; {'mean, deviation, ' * (seeds[-1] > 1)}{what}"
    axes.errorbar(x * unit, means, yerr=spread, color=colour, capsize=3, label=label, **mark)
    found = fit(levels, axis)
    if found is None:
        return
    fine = np.geomspace(x[0], x[-1], 200)
    text = f"fit: {FORMS[found.form].text}" + ("" if found.is_borne else " (points do not bear it)")
    axes.plot(fine * unit, found.curve(fine), "-" if found.is_borne else ":", color=colour, linewidth=1.4, label=text)
    if (band := found.band(fine)) is not None:
        axes.fill_between(fine * unit, *band, color=colour, alpha=0.15, linewidth=0)


def _on_the_way(axes: Axes, rows: list[dict[str, Any]], label: str, colour: str, unit: float) -> None:
    of_axis = [row for row in rows if row["axis"] == "tokens_on_the_way"]
    for seed in sorted({row["seed"] for row in of_axis}):
        points = sorted((row["tokens_seen"] * unit, row["ndcg_at_10"]) for row in of_axis if row["seed"] == seed)
        axes.plot(*zip(*points, strict=True), "--", color=colour, linewidth=1, label=label if seed == 1 else None)
