"""One picture of a run: loss and retrieval quality over the steps of all stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nvembed_mcore.log import read_metrics

_LOSS_COLOR = "#2f6db5"
_METRIC_COLOR = "#c8502d"
_BASELINE_COLORS = ("#4d4d4d", "#7a5195", "#3a7d44")
_FAINT = "#8a8a8a"


def plot_run(
    metrics_files: Sequence[str | Path],
    output_png: str | Path,
    baselines: Mapping[str, float] | None = None,
    *,
    metric: str = "ndcg_at_10",
    metric_label: str = "nDCG@10",
) -> None:
    """Draw loss and a retrieval metric over steps into a PNG of 1000 x 450 pixels.

    Stages stand one after another on the step axis, divided by a line. The loss is drawn faintly as it is and
    strongly as a moving average; the metric as points at the steps of its evaluations.

    Args:
        metrics_files: `metrics.jsonl` of each stage, in order.
        output_png: file to write; its folder must exist.
        baselines: name -> value of the metric, drawn as dashed lines, for example `{"BM25": 0.4}`.
        metric: its name in the files.
        metric_label: its name in the picture.

    Raises:
        ValueError: no file is given, one has no training line, or a line is not valid (file and line are named).
    """
    if not metrics_files:
        raise ValueError("name at least one metrics.jsonl to plot")
    stages = [_read_stage(Path(path), metric) for path in metrics_files]
    lengths = [max(np.max(losses[0]), np.max(points[0], initial=0)) for losses, points in stages]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    # A figure of its own, without pyplot: no global state, no display, and the Agg canvas writes the PNG.
    figure = Figure(figsize=(10, 4.5), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    loss_axes, metric_axes = figure.subplots(1, 2)
    _draw_losses(loss_axes, [losses for losses, _ in stages], starts)
    _draw_metric(metric_axes, [points for _, points in stages], starts, baselines or {}, metric_label)
    for axes, title in ((loss_axes, "Contrastive loss"), (metric_axes, f"Held-out retrieval, {metric_label}")):
        _finish(axes, title, starts)
    figure.savefig(output_png, format="png")


def _read_stage(path: Path, metric: str) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(steps, losses) and (steps, values of the metric) of one file, float64 arrays in order of steps."""
    lines = read_metrics(path)
    series = []
    for name in ("loss", metric):
        values = sorted((line["step"], line[name]) for line in lines if name in line)
        series.append(tuple(np.array(values, dtype=np.float64).reshape(-1, 2).T))
    if len(series[0][0]) == 0:
        raise ValueError(f"{path}: no line with a loss, nothing to plot")
    return series[0], series[1]


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a twentieth of the values on each side, as far as there are any."""
    half = max(1, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.arange(len(values))
    first, end = np.maximum(middle - half, 0), np.minimum(middle + half + 1, len(values))
    return (sums[end] - sums[first]) / (end - first)


def _draw_losses(axes: Axes, losses: Sequence[tuple[np.ndarray, np.ndarray]], starts: np.ndarray) -> None:
    for (steps, values), start in zip(losses, starts[:-1], strict=True):
        axes.plot(start + steps, values, color=_LOSS_COLOR, alpha=0.25, linewidth=0.8)
        axes.plot(start + steps, smooth(values), color=_LOSS_COLOR, linewidth=1.8)


def _draw_metric(
    axes: Axes,
    points: Sequence[tuple[np.ndarray, np.ndarray]],
    starts: np.ndarray,
    baselines: Mapping[str, float],
    label: str,
) -> None:
    """Points joined by a line through all stages, a number at the last one, and the baselines with their names."""
    steps = np.concatenate([start + steps for (steps, _), start in zip(points, starts[:-1], strict=True)])
    values = np.concatenate([values for _, values in points])
    axes.plot(steps, values, color=_METRIC_COLOR, marker="o", markersize=5, linewidth=1.5, label=label)
    top = 1.15 * max([*values.tolist(), *baselines.values(), 0.01])
    axes.set_ylim(0, top)
    if len(values):
        # Below the point where a baseline would run through the number above it.
        is_crossed = any(0 <= value - values[-1] < 0.1 * top for value in baselines.values())
        axes.annotate(
            f"{values[-1]:.3f}",
            (steps[-1], values[-1]),
            textcoords="offset points",
            xytext=(4, -9 if is_crossed else 9),
            ha="right",
            va="top" if is_crossed else "bottom",
            color=_METRIC_COLOR,
            fontweight="bold",
        )
    for index, (name, value) in enumerate(baselines.items()):
        color = _BASELINE_COLORS[index % len(_BASELINE_COLORS)]
        axes.axhline(value, color=color, linestyle="--", linewidth=1.2)
        axes.annotate(
            f"{name} {value:.3f}",
            (0.015, value),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            xytext=(0, 4),
            color=color,
        )


def _finish(axes: Axes, title: str, starts: np.ndarray) -> None:
    """Title, axis, and the stages: a divider between two and the name above each when there are several."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=20 if len(starts) > 2 else 8)
    axes.set_xlabel("optimizer step")
    axes.set_xlim(0 - 0.01 * starts[-1], starts[-1] * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(starts) == 2:
        return
    for divider in starts[1:-1]:
        axes.axvline(divider, color=_FAINT, linewidth=1)
    for number, (begin, end) in enumerate(zip(starts[:-1], starts[1:], strict=True), 1):
        axes.annotate(
            f"stage {number}",
            ((begin + end) / 2, 1),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            xytext=(0, 5),
            ha="center",
            color=_FAINT,
            fontsize=9,
        )
