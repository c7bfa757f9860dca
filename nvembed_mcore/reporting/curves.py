"""Curves of several runs, by step and by hour: pictures that need no JavaScript, and their numbers for it."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from nvembed_mcore.evaluation.plots import smooth
from nvembed_mcore.report import COLORS, INK, Html, dress, svg
from nvembed_mcore.reporting.folder import RunFolder
from nvembed_mcore.reporting.summary import evaluated, hours

DASHES = (None, (5, 2), (1.2, 1.6), (7, 2, 1.2, 2))
"""Of a run's line, so that it can be told by more than its colour: lengths of strokes and gaps; None: none."""
MOST_POINTS = 400
"""Of a curve; where a run has more lines, a point is the mean of as many neighbours as it takes."""
_SMOOTHED_FROM = 40
_LOGARITHMIC_FROM = 50.0
_MOST_MARKED = 30
_SIZE = (6.2, 2.5)
_DPI = 72
"""That of SVG's points, so that places in the picture are those of its file."""


@dataclass(frozen=True)
class Curve:
    """A number of `metrics.jsonl` and how it is drawn."""

    name: str
    title: str
    is_noisy: bool = True
    """It changes from step to step: a moving mean stands before the values."""
    is_share: bool = False
    may_be_log: bool = False
    """The axis is logarithmic where values differ by more than a factor of 50."""


_FIRST = (Curve("loss", "Contrastive loss"),)
_REST = (
    Curve("accuracy", "Accuracy: queries whose positive scores highest", is_share=True),
    Curve("grad_norm", "Gradient norm, before clipping", may_be_log=True),
    Curve("lr", "Learning rate", is_noisy=False),
    Curve("tokens_per_second", "Throughput: real tokens a second"),
    Curve("seconds", "Seconds a step", may_be_log=True),
    Curve("mfu", "MFU: share of the devices' peak", is_share=True),
    Curve("pad_fraction", "Padding: share of tokens that only fill", is_share=True),
)
_NOT_DRAWN = ("step", "real_tokens", "padded_tokens", "texts", "flops", "padded_tokens_per_second", "microbatches")


@dataclass(frozen=True)
class Points:
    """A run's part of a picture: its number on the page, and float64 arrays [points]."""

    run: int
    steps: np.ndarray
    hours: np.ndarray
    values: np.ndarray


def look_of(run: int) -> tuple[str, tuple[float, ...] | None]:
    """Colour and strokes of a run; 24 runs have different ones."""
    return COLORS[run % len(COLORS)], DASHES[(run + run // 12) % len(DASHES)]


def curves_of(runs: Sequence[RunFolder]) -> list[Curve]:
    """Those that the runs have numbers for: losses, evaluations, what else training wrote, and how fast it was."""
    known = {one.name for one in (*_FIRST, *_REST)} | set(_NOT_DRAWN)
    written = dict.fromkeys(name for run in runs for line in run.training for name in line)
    others = [name for name in written if name not in known and not name.startswith(("seconds_", "communication_"))]
    metrics = dict.fromkeys(name for run in runs for name in evaluated(run))
    found = [one for one in _FIRST if one.name in written]
    found += [Curve(name, f"Evaluation: {name}", is_noisy=False) for name in metrics]
    found += [Curve(name, name) for name in others]
    return found + [one for one in _REST if one.name in written]


def picture(curve: Curve, runs: Sequence[RunFolder]) -> Html:
    """A curve of all runs that have it, by step and by hour; which of both is seen is the page's to say."""
    parts = [points for number, run in enumerate(runs) if (points := points_of(curve.name, run, number)) is not None]
    lines = ['<figure class="chart">', f"<figcaption>{html.escape(curve.title)}</figcaption>"]
    for axis in ("step", "hour"):
        some = parts if axis == "step" else [one for one in parts if np.isfinite(one.hours).all()]
        drawn = _draw(curve, some, axis) if some else "<p>no seconds are known</p>"
        lines.append(f'<div class="by-{axis}">{drawn}</div>')
    return Html("\n".join([*lines, "</figure>"]))


def points_of(name: str, run: RunFolder, number: int) -> Points | None:
    """The values of a run, each at its step and hour; None where it has none."""
    lines = [line for line in run.lines if name in line]
    if not lines:
        return None
    steps = np.array([line["step"] for line in lines], dtype=np.float64)
    known = np.array([0, *(line["step"] for line in run.training)], dtype=np.float64)
    at = np.interp(steps, known, [0.0, *hours(run)])
    return Points(number, steps, at, np.array([line[name] for line in lines], dtype=np.float64))


def thinned(points: Points) -> Points:
    """Means of neighbours, at the last one's place, where there are more than `MOST_POINTS`."""
    if len(points.values) <= MOST_POINTS:
        return points
    groups = np.array_split(np.arange(len(points.values)), MOST_POINTS)
    last = [group[-1] for group in groups]
    values = np.array([points.values[group].mean() for group in groups])
    return replace(points, steps=points.steps[last], hours=points.hours[last], values=values)


def _draw(curve: Curve, parts: Sequence[Points], axis: str) -> str:
    """The picture with its numbers, as markup."""
    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    every = np.concatenate([one.values for one in parts])
    is_log = curve.may_be_log and every.min() > 0 and every.max() > _LOGARITHMIC_FROM * every.min()
    if is_log:
        axes.set_yscale("log")
    shown = [thinned(one) for one in parts]
    for whole, some in zip(parts, shown, strict=True):
        color, dashes = look_of(some.run)
        how = {"color": color, "linestyle": (0, dashes) if dashes else "-", "gid": f"r{some.run}"}
        x = some.steps if axis == "step" else some.hours
        is_smoothed = curve.is_noisy and len(whole.values) >= _SMOOTHED_FROM
        if is_smoothed:
            axes.plot(x, some.values, color=color, alpha=0.3, linewidth=0.8, gid=f"r{some.run}")
        values = thinned(replace(whole, values=smooth(whole.values))).values if is_smoothed else some.values
        axes.plot(x, values, linewidth=1.6, marker="." if len(x) <= _MOST_MARKED else "", **how)
    if curve.is_share and every.min() >= 0:
        axes.set_ylim(0, max(1.05 * every.max(), 0.01))
    axes.set_xlabel("optimizer step" if axis == "step" else "hours of training", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=axis == "step"))
    number = FuncFormatter(lambda value, _: f"{value:,.6g}")
    axes.xaxis.set_major_formatter(number)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None) if curve.is_share else number)
    dress(figure)
    figure.draw_without_rendering()  # now its parts have their places
    figure.set_layout_engine("none")
    drawn = svg(figure, f"{curve.name} {axis}").replace("<svg ", f'<svg role="img" aria-label="{_label(curve)}" ', 1)
    for one in parts:
        drawn = drawn.replace(f'<g id="r{one.run}">', f'<g class="r{one.run}">')
    numbers = html.escape(json.dumps(_numbers(axes, shown, axis, is_log), separators=(",", ":")))
    return f'<div class="plot" data-curves="{numbers}">{drawn}</div>'


def _label(curve: Curve) -> str:
    return html.escape(f"curves of {curve.title}; the tables of this page have the last and best values")


def _numbers(axes: Any, parts: Sequence[Points], axis: str, is_log: bool) -> dict[str, Any]:
    """What the script needs: where the axes lie in the picture, their ends, and each run's points."""
    box = axes.bbox
    points = [[one.run, _plain(one.steps if axis == "step" else one.hours), _plain(one.values)] for one in parts]
    return {
        "box": _plain([box.x0, _SIZE[1] * _DPI - box.y1, box.width, box.height]),
        "x": _plain(axes.get_xlim()),
        "y": _plain(axes.get_ylim()),
        "log": bool(is_log),
        "unit": axis,
        "curves": points,
    }


def _plain(values: Sequence[float] | np.ndarray) -> list[float]:
    """Six digits, whole numbers as such."""
    return [int(value) if value == int(value) else float(f"{value:.6g}") for value in map(float, values)]
