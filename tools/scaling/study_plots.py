"""The pictures of a study. Each is drawn from the rows of points, and is None where they have nothing for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter
from study_table import PHASES, Row

COLORS = ("#3f83d0", "#d9613a", "#3f9a56", "#9467bd", "#b58900", "#17a0a8", "#8c564b", "#e377c2")
MARKERS = "osD^vPX*"
PHASE_COLORS = {
    "data": "#b0b0b0",
    "embed": "#3f83d0",
    "score": "#b58900",
    "backward": "#d9613a",
    "optimizer": "#3f9a56",
    "other": "#dddddd",
}
_FAINT = "#777777"
_WIDE = 8.6
_AXES = ("gpus", "dtype", "fp8", "query_tokens", "document_tokens", "queries")


def of_a_process(rows: Sequence[Row]) -> str:
    """What one of `gpus` is called."""
    return "process" if all(row["device"] == "cpu" for row in rows) else "GPU"


def processes(rows: Sequence[Row]) -> str:
    return {"process": "processes", "GPU": "GPUs"}[of_a_process(rows)]


def layout_of(row: Row) -> str:
    """As `TP 2`, `PP 2 x DP 4`, with what is 1 left out."""
    sizes = {"TP": row["tp"], "PP": row["pp"], "CP": row["cp"], "DP": row["dp"]}
    words = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    if row["chunks"] > 1:
        words.append(f"{row['chunks']} chunks")
    return " x ".join(words) or "one process"


def kept_layout(row: Row) -> str:
    """The layout without data parallelism, which is what grows."""
    return layout_of(row | {"dp": 1}).replace("one process", "data parallel")


def differing(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    return [name for name in names if len({row[name] for row in rows}) > 1]


def setting(row: Row, names: Sequence[str]) -> str:
    """The named values of a row, for a label."""
    words = {
        "gpus": f"{row['gpus']}",
        "dtype": str(row["dtype"]),
        "fp8": f"FP8 {row['fp8']}",
        "query_tokens": f"{row['query_tokens']}/{row['document_tokens']} tokens",
        "document_tokens": f"{row['query_tokens']}/{row['document_tokens']} tokens",
        "queries": f"batch {row['queries']:,}",
    }
    return ", ".join(dict.fromkeys(words[name] for name in names))


def label(row: Row, rows: Sequence[Row]) -> str:
    """A point in one line; what is the same for all is left out."""
    names = [name for name in differing(rows, _AXES) if name != "gpus"]
    unit = of_a_process(rows) if row["gpus"] == 1 else processes(rows)
    # Where there is one process, its number says it all.
    words = [f"{row['gpus']:,} {unit}"] + ([layout_of(row)] if row["gpus"] > 1 else [])
    return ", ".join([*words, *([setting(row, names)] if names else [])])


def scaling(rows: Sequence[Row]) -> Figure | None:
    """Tokens a second of all against the number of GPUs, both axes logarithmic, with the line of perfect scaling."""

    def draw(axes: Axes, some: Sequence[Row], every: Sequence[Row]) -> None:
        _perfect(axes, some)
        _lines(axes, some, every, lambda row: row["tokens_per_second"])
        axes.set_yscale("log")
        _plain_log(axes.yaxis)
        axes.set_ylabel(f"real tokens/s of all {processes(every)}")

    return _by_series(rows, draw)


def efficiency(rows: Sequence[Row]) -> Figure | None:
    """Tokens a second and GPU over those of the smallest run."""

    def draw(axes: Axes, some: Sequence[Row], every: Sequence[Row]) -> None:
        axes.axhline(1, color=_FAINT, linestyle="--", linewidth=1)
        _lines(axes, some, every, lambda row: row["efficiency"])
        axes.set_ylim(0, 1.12 * max(1.0, *(row["efficiency"] for row in some)))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylabel("efficiency")

    return _by_series(rows, draw)


def batches(rows: Sequence[Row]) -> Figure | None:
    """Tokens a second and GPU against the batch, where that is what varies."""
    some = [row for row in rows if row["kind"] == "batch"]
    if not some:
        return None
    figure, (axes,) = _figure(1, 3.8)
    names = [name for name in differing(some, _AXES) if name != "queries"]
    lines: dict[str, list[Row]] = {}
    for row in some:
        words = [layout_of(row), *([setting(row, [n for n in names if n != "gpus"])] if set(names) - {"gpus"} else [])]
        lines.setdefault(", ".join(words), []).append(row)
    for number, (name, line) in enumerate(lines.items()):
        _line(axes, number, name, line, "queries", lambda row: row["tokens_per_second_per_gpu"])
    axes.set_xscale("log", base=2)
    _ticks_at(axes, some, "queries")
    axes.set_ylim(0, 1.1 * max(row["tokens_per_second_per_gpu"] for row in some))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("queries of the batch")
    axes.set_ylabel(f"real tokens/s a {of_a_process(rows)}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def phases(rows: Sequence[Row]) -> Figure | None:
    """Seconds of a step by phase, a bar a point."""
    figure, axes, places = _bars(rows)
    left = [0.0] * len(rows)
    for phase in (*PHASES, "other"):
        values = [_seconds(row, phase) for row in rows]
        axes.barh(places, values, left=left, color=PHASE_COLORS[phase], label=phase, height=0.7)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_xlim(0, 1.04 * max(left))
    axes.set_xlabel("seconds of a step (medians of the first process)")
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    return figure


def memory(rows: Sequence[Row]) -> Figure | None:
    """Memory of the fullest process, measured and as predicted."""
    figure, axes, places = _bars(rows)
    is_cpu = of_a_process(rows) == "process"
    name = "model_memory_bytes" if is_cpu else "memory_bytes"
    axes.barh(places, [row[name] / 1e9 for row in rows], color=COLORS[0], label="measured", height=0.7)
    predicted = [
        (place, row["predicted_memory_bytes"] / 1e9)
        for place, row in zip(places, rows, strict=True)
        if _has(row, "memory")
    ]
    if predicted:
        y, x = zip(*predicted, strict=True)
        axes.plot(x, y, "D", color="#222222", markersize=5, label="predicted")
    what = "resident, less what was there before the model" if is_cpu else "tensors"
    axes.set_xlabel(f"GB of the fullest {of_a_process(rows)} ({what})")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def prediction(rows: Sequence[Row]) -> Figure | None:
    """Measured seconds against predicted ones, with the line where both are the same."""
    some = [row for row in rows if _has(row, "seconds")]
    if not some:
        return None
    figure, (axes,) = _figure(1, 4.6)
    ends = [value for row in some for value in (row["seconds"], row["predicted_seconds"])]
    line = [0.8 * min(ends), 1.25 * max(ends)]
    axes.plot(line, line, "--", color=_FAINT, linewidth=1, label="equal")
    axes.fill_between(line, [0.9 * x for x in line], [1.1 * x for x in line], color=_FAINT, alpha=0.15, label="±10 %")
    for number, series in enumerate(dict.fromkeys(row["series"] for row in some)):
        points = [row for row in some if row["series"] == series]
        x = [row["predicted_seconds"] for row in points]
        below = [row["predicted_seconds"] - row["predicted_seconds_low"] for row in points]
        above = [row["predicted_seconds_high"] - row["predicted_seconds"] for row in points]
        style = dict(color=COLORS[number % len(COLORS)], fmt=MARKERS[number % len(MARKERS)], markersize=6)
        y = [row["seconds"] for row in points]
        axes.errorbar(x, y, xerr=[below, above], label=series, elinewidth=0.8, alpha=0.85, **style)
    axes.set(xscale="log", yscale="log", xlim=line, ylim=line)
    for axis in (axes.xaxis, axes.yaxis):
        _plain_log(axis)
    axes.set_xlabel("predicted seconds of a step (bars: from the low to the high one)")
    axes.set_ylabel("measured seconds of a step")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


PICTURES: dict[str, tuple[str, Callable[[Sequence[Row]], Figure | None]]] = {
    "scaling": ("Tokens a second", scaling),
    "efficiency": ("Efficiency", efficiency),
    "batch": ("The batch", batches),
    "phases": ("Seconds by phase", phases),
    "memory": ("Memory", memory),
    "prediction": ("Prediction and measurement", prediction),
}


def _seconds(row: Row, phase: str) -> float:
    if phase != "other":
        return row[f"seconds_{phase}"]
    return max(0.0, row["seconds"] - sum(row[f"seconds_{one}"] for one in PHASES))


def _has(row: Row, what: str) -> bool:
    return row.get(f"predicted_{what}" if what == "seconds" else f"predicted_{what}_bytes") is not None


def _figure(panels: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(_WIDE, height), dpi=110, layout="constrained")
    all_axes = figure.subplots(1, panels, squeeze=False)[0]
    for axes in all_axes:
        axes.grid(color="#888888", alpha=0.25, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, all_axes


def _by_series(rows: Sequence[Row], draw: Callable[[Axes, Sequence[Row], Sequence[Row]], None]) -> Figure | None:
    """Panels beside each other, one for each series in which the number of GPUs is what varies; two in a row."""
    series = [
        some
        for name in dict.fromkeys(row["series"] for row in rows)
        if (some := [row for row in rows if row["series"] == name and row["kind"] != "batch"])
    ]
    if not series:
        return None
    lines = -(-len(series) // 2)
    figure = Figure(figsize=(_WIDE, 4.1 * lines), dpi=110, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.08)
    grid = figure.subplots(lines, min(2, len(series)), squeeze=False)
    for axes, some in zip(grid.flat, series, strict=False):
        axes.grid(color="#888888", alpha=0.25, linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, some, rows)
        axes.set_xscale("log", base=2)
        axes.set_xlim(min(row["gpus"] for row in some) / 1.25, max(row["gpus"] for row in some) * 1.25)
        _ticks_at(axes, some, "gpus")
        axes.set_title(some[0]["series"], fontsize=10)
        axes.set_xlabel(processes(rows))
        axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    for axes in grid.flat[len(series) :]:
        axes.set_visible(False)
    return figure


def _perfect(axes: Axes, some: Sequence[Row]) -> None:
    """From the point that efficiencies are measured against."""
    fewest = min(row["gpus"] for row in some)
    bases = [row for row in some if row["gpus"] == fewest and row["efficiency"] == 1]
    most = max(row["gpus"] for row in some)
    for number, base in enumerate(bases):
        y = base["tokens_per_second_per_gpu"]
        name = "perfect" if number == 0 else None
        axes.plot([fewest, most], [fewest * y, most * y], "--", color=_FAINT, linewidth=1, label=name)


def _lines(axes: Axes, some: Sequence[Row], every: Sequence[Row], value: Callable[[Row], float]) -> None:
    """A line for each layout, precision and length; where one begins above the smallest run, from that on."""
    names = [name for name in differing(some, _AXES) if name not in ("gpus", "queries")]
    lines: dict[str, list[Row]] = {}
    for row in sorted(some, key=lambda one: one["gpus"]):
        words = [kept_layout(row), *([setting(row, names)] if names else [])]
        lines.setdefault(", ".join(words), []).append(row)
    for number, (name, line) in enumerate(lines.items()):
        _line(axes, number, name, line, "gpus", value)
        begin = [row for row in some if row["efficiency"] == 1 and all(row[n] == line[0][n] for n in names)]
        if begin and begin[0]["gpus"] < line[0]["gpus"]:
            ends = [begin[0], line[0]]
            color = COLORS[number % len(COLORS)]
            axes.plot([row["gpus"] for row in ends], [value(row) for row in ends], ":", color=color, linewidth=1)


def _line(axes: Axes, number: int, name: str, line: Sequence[Row], x: str, y: Callable[[Row], float]) -> None:
    style = dict(color=COLORS[number % len(COLORS)], marker=MARKERS[number % len(MARKERS)], markersize=6)
    axes.plot([row[x] for row in line], [y(row) for row in line], label=name, **style)


def _ticks_at(axes: Axes, rows: Sequence[Row], name: str) -> None:
    """Where something was measured; of many, those that have room."""
    values = sorted({row[name] for row in rows})
    kept = values[:1]
    for value in values[1:]:
        if value >= kept[-1] * (values[-1] / values[0]) ** 0.09:
            kept.append(value)
    axes.set_xticks(kept, [f"{value:,}" for value in kept])
    axes.xaxis.set_minor_locator(NullLocator())


def _plain_log(axis) -> None:
    """Numbers as one writes them, not powers; where they span little, some between the powers of ten as well."""

    def between(value: float, _: int) -> str:
        low, high = sorted(axis.get_view_interval())
        shown = "2357" if high / low < 12 else "25" if high / low < 120 else ""
        return f"{value:,.10g}" if f"{value:e}"[0] in shown else ""

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(FuncFormatter(between))


def _bars(rows: Sequence[Row]) -> tuple[Figure, Axes, list[int]]:
    """An empty picture with a place for a bar a point, below a line with the name of their series; and these places,
    counted from the top."""
    names: list[str] = []
    places = []
    for number, row in enumerate(rows):
        if number == 0 or row["series"] != rows[number - 1]["series"]:
            names.append(row["series"])
        places.append(len(names))
        names.append(label(row, rows))
    figure, (axes,) = _figure(1, 1.2 + 0.24 * len(names))
    axes.set_yticks(range(len(names)), names, fontsize=8)
    for place, text in enumerate(axes.get_yticklabels()):
        text.set_weight("normal" if place in places else "bold")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return figure, axes, places
