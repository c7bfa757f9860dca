"""The page that compares runs: results, curves, what differs in their configurations, speed, hardware, time."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import yaml

from nvembed_mcore import report
from nvembed_mcore.goodput import BUCKETS
from nvembed_mcore.report import Html
from nvembed_mcore.reporting import summary
from nvembed_mcore.reporting.curves import curves_of, look_of, picture
from nvembed_mcore.reporting.folder import RunFolder
from nvembed_mcore.reporting.script import POLICY, SCRIPT

_STYLE = """
body { max-width: 78rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); gap: 0 1.5rem; }
.chart { margin: .6rem 0; } .plot { position: relative; } .plot svg { display: block; width: 100%; }
.plot:focus-visible { outline: 2px solid Highlight; }
.runs { position: sticky; top: 0; z-index: 1; background: Canvas; padding: .5rem 0; border-bottom: 1px solid #8888; }
.runs label { margin-right: 1.2rem; white-space: nowrap; } .line { vertical-align: middle; width: 34px; height: 8px; }
.name { display: inline-block; max-width: 24rem; overflow-wrap: anywhere; vertical-align: top; }
.tip { position: absolute; top: .2rem; pointer-events: none; background: Canvas; font-size: 13px;
  border-radius: 4px; box-shadow: 0 1px 4px #0006; max-width: 60%; overflow-wrap: anywhere; }
.tip div { padding: .05rem .6rem; border-left: 4px solid transparent; }
.by-hour, body:has(#by-hour:checked) .by-step { display: none; }
body:has(#by-hour:checked) .by-hour { display: block; }
details { margin: .5rem 0; } summary { cursor: pointer; }
@media print { .runs { position: static; } }
""".strip()


def html_page(runs: Sequence[RunFolder], now: datetime | None = None) -> str:
    """The whole page; text that cannot be written as UTF-8 is replaced."""
    now = now or datetime.now(timezone.utc)
    sections = [
        ("", _beginning(runs, now)),
        ("Results", _results(runs)),
        ("Curves", _curves(runs)),
        ("What differs in the configurations", _differences(runs)),
        ("Throughput", _throughput(runs)),
        ("Hardware and layout", _hardware(runs)),
        ("Time and attempts", _time(runs)),
        ("Configurations", _configurations(runs)),
        ("", [Html(f"<script>{SCRIPT}</script>")]),
    ]
    title = f"{len(runs)} runs: " if len(runs) > 1 else "Run "
    names = ", ".join(run.name for run in runs)
    hides = "\n".join(f"body:has(#run{one}:not(:checked)) .r{one} {{ display: none; }}" for one in range(len(runs)))
    head = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<style>\n{_STYLE}\n{hides}\n</style>'
    text = report.page(title + (names if len(names) < 90 else f"{names[:90]} …"), sections, Html(head))
    return text.encode("utf-8", "replace").decode("utf-8")


def _key(number: int) -> Html:
    """A run's line, as it is drawn in the curves."""
    color, dashes = look_of(number)
    strokes = f' stroke-dasharray="{" ".join(str(1.6 * one) for one in dashes)}"' if dashes else ""
    line = f'<line x1="0" y1="4" x2="34" y2="4" stroke="{color}" stroke-width="2"{strokes}/>'
    return Html(f'<svg class="line" viewBox="0 0 34 8" aria-hidden="true">{line}</svg>')


def _named(number: int, run: RunFolder) -> Html:
    return Html(f'{_key(number)} <span class="name">{html.escape(run.name)}</span>')


def _table(header: Sequence[str], runs: Sequence[RunFolder], rows: Sequence[Sequence[Any]]) -> Html:
    """A row for each run, its name and line in front, without columns in which no run has anything."""
    kept = [number for number in range(len(header)) if any(row[number] not in (None, "") for row in rows)]
    cells = [[_named(i, runs[i]), *(row[number] for number in kept)] for i, row in enumerate(rows)]
    return report.table(["run", *(header[number] for number in kept)], cells)


def _beginning(runs: Sequence[RunFolder], now: datetime) -> list[str]:
    parts = [f"Read from {'their folders' if len(runs) > 1 else 'its folder'} at {now:%Y-%m-%d %H:%M} UTC."]
    for number, run in enumerate(runs):
        for note in summary.warnings(run, now):
            parts.append(Html(f"<p>{_named(number, run)}: {report.marked(note, 'warning')}</p>"))
    return parts


def _results(runs: Sequence[RunFolder]) -> list[str]:
    found = [summary.results(run) for run in runs]
    rows = [
        [
            run.status.state if run.status else "not known",
            _count(one["step"], one["steps"]),
            *(None if one[name] is None else f"{one[name]:.4f}" for name in ("loss_last", "loss_mean_of_end")),
        ]
        for run, one in zip(runs, found, strict=True)
    ]
    parts: list[str] = [
        _table(["state", "steps", "last loss", "mean of the end"], runs, rows),
        f"The end is the last {summary.LAST_SHARE:.0%} of the lines, at least one.",
    ]
    names = dict.fromkeys(name for one in found for name in one["evaluations"])
    if names:
        rows = [_metric(name, number, runs, found) for name in names for number, one in enumerate(found)
                if name in one["evaluations"]]  # fmt: skip
        parts += [
            report.table(["metric", "run", *(f"{place} (after step)" for place in _PLACES)], rows),
            "Of metrics the largest value is the best.",
        ]
    return parts


_PLACES = ("first", "best", "last")


def _metric(name: str, number: int, runs: Sequence[RunFolder], found: Sequence[dict[str, Any]]) -> list[Any]:
    values = found[number]["evaluations"][name]
    cells = [f"{values[place]:.4f} ({values[f'{place}_step']:,})" for place in _PLACES]
    return [name, _named(number, runs[number]), *cells]


def _count(step: Any, steps: Any) -> str:
    known = [f"{one:,}" if isinstance(one, int) else "?" for one in (step, steps)]
    return f"{known[0]} of {known[1]}"


def _curves(runs: Sequence[RunFolder]) -> list[str]:
    keys = [
        f'<label data-run="{number}" data-color="{look_of(number)[0]}"><input type="checkbox" id="run{number}" '
        f'checked> {_key(number)} <span class="name">{html.escape(run.name)}</span></label>'
        for number, run in enumerate(runs)
    ]
    axes = [
        f'<label><input type="radio" name="axis" id="by-{axis}"{checked}> {words}</label>'
        for axis, words, checked in (("step", "by step", " checked"), ("hour", "by hour of training", ""))
    ]
    pictures = [picture(curve, runs) for curve in curves_of(runs)]
    if not pictures:
        return ["No run has written numbers yet."]
    return [
        Html(f'<div class="runs">{"".join(keys)}<br>{"".join(axes)}</div>'),
        Html(f'<div class="charts">{"".join(pictures)}</div>'),
        "Faint: values as they are; strong: their moving mean over a twentieth of them on each side, from 40 values "
        "on. Hours are those of steps: evaluations and checkpoints do not count.",
    ]


def _differences(runs: Sequence[RunFolder]) -> list[str]:
    if sum(bool(run.fields) for run in runs) < 2:
        return ["There are no two configurations to compare."]
    found = summary.differences(runs)
    if not found:
        return ["Nothing differs but the folder."]
    header = ["field", *(_named(number, run) for number, run in enumerate(runs))]
    rows = [[name, *(_value(value) for value in values)] for name, values in found.items()]
    link = Html('<p>Fields that are not here are the same; <a href="#configurations">all of them</a>.</p>')
    return [report.table(header, rows), link]


def _value(value: Any) -> str:
    """As YAML has it, so that `null`, `true`, `1` and `1.0` look different; a dash where a run has no such field."""
    if value is summary.MISSING:
        return "–"
    return (
        yaml.safe_dump(value, width=10**6, default_flow_style=True, allow_unicode=True).removesuffix("...\n").strip()
    )


def _throughput(runs: Sequence[RunFolder]) -> list[str]:
    found = [summary.throughput(run) for run in runs]
    header = ["tokens/s", "tokens/s a process", "s/step", "95th percentile", "padding", "MFU", "training time"]
    names = ["tokens_per_second", "tokens_per_second_per_process", "seconds_median", "seconds_p95"]
    rows = []
    for one in found:
        speeds = [one.get(name) for name in names]
        speeds[:2] = [None if value is None else round(value) for value in speeds[:2]]
        rows.append(
            [
                *speeds,
                _percent(one.get("pad_fraction")),
                _percent(one.get("mfu")),
                _duration(one.get("training_hours")),
            ]
        )
    parts = [
        _table(header, runs, rows),
        "Tokens are those of texts: what only fills, and passes done again for memory, count as time alone. Figures "
        "are medians of the logged steps; padding is over all of them. MFU is known where the devices' peak is.",
    ]
    phases = [*dict.fromkeys(name for one in found for name in one.get("phases", {}))]
    if phases:
        shares = [[_percent(one.get("phases", {}).get(name)) for name in phases] for one in found]
        parts += [_table(phases, runs, shares), "Share of a step's time by phase."]
    return parts


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f}%"


def _duration(hours: float | None) -> str | None:
    return None if hours is None else str(timedelta(seconds=round(3600 * hours)))


def _hardware(runs: Sequence[RunFolder]) -> list[str]:
    """Of all attempts; values that changed from one to another stand beside each other."""
    header = ["device", "processes", "layout", "cores", "hosts", "memory at most, GB"]
    rows = []
    for run in runs:
        layouts = [_layout(one["layout"]) for one in run.attempts]
        hardware = [one["hardware"] for one in run.attempts]
        peaks = [one["peak_memory"].get("bytes") for one in run.attempts]
        rows.append(
            [
                _distinct(one.get("device") for one in hardware),
                _distinct(one["world_size"] or None for one in run.attempts),
                _distinct(layouts),
                _distinct(one.get("cores") for one in hardware),
                _distinct(one.get("host") for one in run.attempts),
                max((one / 1e9 for one in peaks if isinstance(one, int)), default=None),
            ]
        )
    names = [*dict.fromkeys(name for run in runs for name in run.versions)]
    versions = [[_short_commit(run.versions.get(name)) for name in names] for run in runs]
    return [_table(header, runs, rows), *([_table(names, runs, versions)] if names else [])]


def _short_commit(version: str | None) -> str | None:
    return None if version is None else re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28}\b", r"\1", version)


def _layout(sizes: dict[str, Any]) -> str:
    """What is split; `dp 1` where nothing is."""
    return ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in sizes.items() if size != 1 or name == "dp")


def _distinct(values: Any) -> str:
    return ", then ".join(dict.fromkeys(str(value) for value in values if value not in (None, "")))


def _time(runs: Sequence[RunFolder]) -> list[str]:
    found = [summary.time_spent(run) for run in runs]
    rows = []
    for one in found:
        seconds = one.get("seconds", {})
        wall = _duration(one["wall_seconds"] / 3600) if one else None
        spent = [f"{seconds[name]:,.1f}" if one else None for name in BUCKETS]
        rows.append([_percent(one.get("goodput")), wall, *spent, one.get("attempts")])
    header = ["goodput", "wall time", *(f"{name.replace('_', ' ')}, s" for name in BUCKETS), "attempts"]
    meanings = "; ".join(f"{name.replace('_', ' ')}: {what}" for name, what in BUCKETS.items())
    parts: list[str] = [_table(header, runs, rows), f"Goodput is productive time by wall time. {meanings}."]
    for number, run in enumerate(runs):
        if run.attempts:
            parts.append(_details(Html(f"attempts of {_named(number, run)}"), _attempts(run)))
    return parts


def _attempts(run: RunFolder) -> Html:
    header = ["attempt", "start (UTC)", "end (UTC)", "steps", "saves", "ended as", "host"]
    rows = []
    for one in run.attempts:
        times = [str(one[name] or "").partition(".")[0].replace("T", " ") for name in ("start", "end")]
        steps = "–" if one["from_step"] is None else f"{one['from_step']} to {one['last_step']}"
        rows.append(
            [str(one["number"]), *times, steps, str(one["saves"]), str(one["state"]), str(one.get("host", ""))]
        )
    return report.table(header, rows)


def _configurations(runs: Sequence[RunFolder]) -> list[str]:
    parts: list[str] = [Html('<a id="configurations"></a>')]
    for number, run in enumerate(runs):
        text = report.verbatim(run.config) if run.config else Html("<p>not known</p>")
        parts.append(_details(Html(f"{_named(number, run)}, in {html.escape(str(run.path))}"), text))
    return parts


def _details(title: Html, content: Html) -> Html:
    return Html(f"<details><summary>{title}</summary>{content}</details>")
