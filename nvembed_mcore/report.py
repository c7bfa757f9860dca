"""Reports as one HTML page: text, tables and pictures, readable without a network and without JavaScript.

All text is escaped; what is markup already has the type `Html`. Pictures are SVG in the page, drawn by matplotlib,
with axes and labels in the colour of the page's text, so they suit light and dark alike. The same content makes the
same bytes.
"""

from __future__ import annotations

import html
import os
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nvembed_mcore import redact

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#3f83d0", "#d9613a", "#3f9a56", "#9467bd", "#b58900", "#17a0a8")
INK = "#010203"
"""The colour of the page's text: matplotlib knows no `currentColor`, so it draws in this, which `svg` replaces."""

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: .8rem 0; display: block; overflow-x: auto; }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
th, td { min-width: 2.5em; overflow-wrap: anywhere; }
th { border-bottom: 1px solid #8888; font-weight: 600; } td { border-bottom: 1px solid #8883; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #8881; padding: .6rem; }
figure { margin: 1rem 0; } figcaption { font-weight: 600; } svg { max-width: 100%; height: auto; }
.key { font-weight: 400; margin-right: 1rem; } .key i { display: inline-block; width: .8em; height: .8em; }
.bad { color: #d0342c; font-weight: 600; } .warning { color: #b97400; font-weight: 600; }
""".strip()


class Html(str):
    """Markup that is escaped already."""

    __slots__ = ()


def page(title: str, sections: Iterable[tuple[str, Iterable[str]]], head: Html | None = None) -> str:
    """One self-contained page.

    Args:
        title: heading of the page.
        sections: heading and parts of each; a part is `Html`, or text, which becomes a paragraph. An empty heading
            is left out.
        head: more for its `<head>`.
    """
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>",
        f"<style>\n{_STYLE}\n</style>{head or ''}</head><body>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    for heading, parts in sections:
        lines += ["<section>", f"<h2>{html.escape(heading)}</h2>" if heading else ""]
        lines += [part if isinstance(part, Html) else f"<p>{html.escape(part)}</p>" for part in parts]
        lines.append("</section>")
    return "\n".join([*filter(None, lines), "</body></html>\n"])


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Html:
    """A table. Integers get commas, floats three decimals; numbers stand to the right; None is an empty cell."""
    cells = [[_cell(value) for value in row] for row in rows]
    columns = list(zip(*cells, strict=True)) or [()] * len(header)
    sides = [' class="n"' if any(map(_is_number, column)) else "" for column in columns]
    heads = [f"<th{side}>{_cell(name)}</th>" for name, side in zip(header, sides, strict=True)]
    lines = ["<table>", f"<tr>{''.join(heads)}</tr>"]
    for row in cells:
        tags = [f'<td class="n">{cell}</td>' if _is_number(cell) else f"<td>{cell}</td>" for cell in row]
        lines.append(f"<tr>{''.join(tags)}</tr>")
    return Html("\n".join([*lines, "</table>"]))


def marked(text: str, mark: str) -> Html:
    """Text that stands out: `mark` is `bad` (red) or `warning` (amber)."""
    assert mark in ("bad", "warning"), mark
    return Html(f'<span class="{mark}">{html.escape(text)}</span>')


def verbatim(text: str) -> Html:
    """Text with its line ends, in letters of one width."""
    return Html(f"<pre>{html.escape(text)}</pre>")


def histogram(
    series: Mapping[str, np.ndarray],
    title: str,
    xlabel: str,
    *,
    counts: Mapping[str, np.ndarray] | None = None,
    bins: int = 50,
    log: bool = False,
    marks: Sequence[float] = (),
) -> Html:
    """Share of each series' values by size, as outlines over common bins.

    Args:
        series: name -> finite values, any number type [n]; an empty one is only named.
        title, xlabel: of the picture and of its axis.
        counts: name -> how often each of the values stands for itself, [n]; None: once.
        bins: of equal width from the smallest to the largest value.
        log: bins of equal ratio instead; values must be above 0. Of whole numbers none is narrower than 1, and the
            height is the share over the width that the eye sees, in bins of equal ratio.
        marks: where dashed lines stand, for example a limit.
    """
    values = {name: np.asarray(some, dtype=np.float64) for name, some in series.items()}
    filled = [some for some in values.values() if len(some)]
    drawn = _draw(values, counts or {}, _edges(filled, bins, log), bins, xlabel, log, marks) if filled else ""
    key = "".join(
        f'<span class="key"><i style="background:{COLORS[number % len(COLORS)]}"></i> {html.escape(name)}'
        f"{'' if len(values[name]) else ' (none)'}</span>"
        for number, name in enumerate(series)
    )
    return Html(f"<figure><figcaption>{html.escape(title)}<br>{key}</figcaption>\n{drawn}</figure>")


def save(path: str | Path, text: str) -> None:
    """Write a text file aside, then rename it, so that nobody sees half a file. Secrets are left out."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        aside.write_text(redact.text(text), encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _cell(value: Any) -> str:
    """The markup inside a cell."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, (float, np.floating)):
        return f"{value:,.3f}"
    if value is None:
        return ""
    return value if isinstance(value, Html) else html.escape(str(value))


def _is_number(cell: str) -> bool:
    return bool(re.fullmatch(r"[+-]?[\d,.]+%?", cell))


def _edges(filled: Sequence[np.ndarray], bins: int, log: bool) -> np.ndarray:
    """Borders of at most so many bins, float64 [bins + 1], that hold all values."""
    low, high = min(some.min() for some in filled), max(some.max() for some in filled)
    if low == high:
        low, high = (low / 1.5, high * 1.5) if log else (low - 0.5, high + 0.5)
    if not log:
        return np.linspace(low, high, bins + 1)
    edges = np.geomspace(low, high, bins + 1)
    if all((some == np.round(some)).all() for some in filled):
        edges = np.unique([low - 0.5, *(np.round(edges[1:-1]) + 0.5), high + 0.5])
    return edges


def _draw(
    values: Mapping[str, np.ndarray],
    counts: Mapping[str, np.ndarray],
    edges: np.ndarray,
    bins: int,
    xlabel: str,
    log: bool,
    marks: Sequence[float],
) -> str:
    """The picture as an `<svg>` element."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogFormatter, PercentFormatter

    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes = figure.subplots()
    edges[0], edges[-1] = np.nextafter(edges[0], -np.inf), np.nextafter(edges[-1], np.inf)  # of rounding in `log`
    seen = np.diff(np.log(edges) if log else edges)
    widths = seen * bins / seen.sum()
    for number, (name, some) in enumerate(values.items()):
        if len(some):
            heights, _ = np.histogram(some, edges, weights=counts.get(name))
            color = COLORS[number % len(COLORS)]
            heights = heights / heights.sum() / widths
            axes.stairs(heights, edges, color=color, fill=True, alpha=0.18)
            axes.stairs(heights, edges, color=color, linewidth=1.4)
    for mark in marks:
        axes.axvline(mark, color=INK, linestyle="--", linewidth=1)
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.xaxis.set_minor_formatter(LogFormatter())
    axes.set_xlabel(xlabel, color=INK, parse_math=False)
    axes.set_ylabel("share", color=INK)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.set_ylim(bottom=0)
    dress(figure)
    return svg(figure, xlabel)


def dress(figure: Figure) -> None:
    """The picture as it stands on a page: no background, no frame, lines and letters in the colour of its text."""
    for axes in figure.axes:
        axes.grid(axis="y", color="#888888", alpha=0.25, linewidth=0.8)
        axes.tick_params(which="both", colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
        axes.patch.set_visible(False)
    figure.patch.set_visible(False)


def svg(figure: Figure, name: str) -> Html:
    """The picture as an `<svg>` element; the names inside follow from `name` and the content."""
    import matplotlib

    file = StringIO()
    # Letters stay letters.
    salt = ascii(name)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    drawn = file.getvalue()
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    return Html(drawn.replace(INK, "currentColor"))
