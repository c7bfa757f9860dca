"""A data check for the terminal and as a page."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from nvembed_mcore import report as pages
from nvembed_mcore.data.check.findings import COUNTS, QUANTILES, CheckReport, Lengths, SetReport, Shown

if TYPE_CHECKING:
    from rich.table import Table

_COUNTS_TITLE = "Data check (queries and docs: distinct ones)"
_COUNT_NAMES = ["data set", "records", "queries", "pos", "neg", "docs", "no neg", "bad lines"]


def tables(report: CheckReport) -> Iterator[Table]:
    """Counts and lengths for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    for title, header, rows in (
        (_COUNTS_TITLE, _COUNT_NAMES, _count_rows(report)),
        (_lengths_title(report), _length_header(report), _length_rows(report)),
    ):
        table = Table(title=title, title_justify="left")
        for name in header:
            if name in ("data set", "field"):
                table.add_column(name, overflow="fold", min_width=len(name))
            else:
                table.add_column(name, justify="right", no_wrap=True)
        for number, row in enumerate(rows):
            begins_set = number + 1 < len(rows) and bool(rows[number + 1][0]) and "field" in header
            table.add_row(*(escape(_plain(value)) for value in row), end_section=begins_set)
        yield table


def lines(report: CheckReport) -> Iterator[str]:
    """What is wrong, with the first example of each warning, and the verdict."""
    for refusal in report.refusals:
        yield f"refused: {refusal}"
    for name, one in zip(_names(report), _shown_sets(report), strict=False):
        if one.scores.records:
            yield f"{name}: {one.scores.text(one.counts['records'])}"
        for warning in one.warnings:
            yield f"warning: {name}: {warning.text}"
            if warning.kind == "bad_lines":
                yield from one.problems.shown
            for shown in warning.examples[:1]:
                yield f"  {': '.join(_example(shown))}"
    yield verdict(report)


def verdict(report: CheckReport) -> str:
    """Whether a run may start, in one sentence."""
    number = len(report.warnings)
    warnings = f"{number or 'no'} warning{'' if number == 1 else 's'}"
    if report.refusals:
        refused = sum(bool(one.refusal) for one in report.sets)
        return f"A run would refuse {refused} of {len(report.sets)} data sets; {warnings}."
    return f"A run may start; {warnings}."


def html_page(report: CheckReport) -> str:
    """Everything on one page."""
    mark = "bad" if report.refusals else "warning"
    verdict_line = verdict(report)
    first = [
        _marked(verdict_line, mark) if report.refusals or report.warnings else verdict_line,
        _COUNTS_TITLE,
        pages.table(_COUNT_NAMES, _count_rows(report)),
        _lengths_title(report),
        pages.table(_length_header(report), _length_rows(report)),
    ]
    sections: list[tuple[str, list[str]]] = [("Summary", first)]
    if len(report.sets) > 1:
        sections.append(("All data sets", _set_parts(report, report.together)))
    sections += [(one.path, _set_parts(report, one)) for one in report.sets]
    return pages.page("Data check", sections)


def _shown_sets(report: CheckReport) -> list[SetReport]:
    return [*report.sets, *([report.together] if len(report.sets) > 1 else [])]


def _names(report: CheckReport) -> list[str]:
    """Paths of the sets without the folder that all are in, and the name of all together."""
    paths = [one.path.rstrip("/") for one in report.sets]
    folders = [os.path.dirname(path) for path in paths]
    common = os.path.commonpath(folders) if len(set(map(os.path.isabs, paths))) == 1 else ""
    return [*(os.path.relpath(path, common) if common else path for path in paths), "all"]


def _count_rows(report: CheckReport) -> list[list[Any]]:
    return [
        [name, *(one.counts[count] for count in COUNTS)]
        for name, one in zip(_names(report), _shown_sets(report), strict=False)
    ]


def _lengths_title(report: CheckReport) -> str:
    limits = {name: lengths.limit for name, lengths in report.together.lengths.items()}
    cut = "" if limits["query"] is None else f" (queries cut at {limits['query']:,}, documents at {limits['pos']:,})"
    return f"Lengths in {report.unit}{cut}"


def _length_header(report: CheckReport) -> list[str]:
    return ["data set", "field", "texts", "mean", *QUANTILES, *(["cut"] if report.unit == "tokens" else [])]


def _length_rows(report: CheckReport) -> list[list[Any]]:
    """A row for each field with texts; the first of a set has its name."""
    rows = []
    for name, one in zip(_names(report), _shown_sets(report), strict=False):
        for field, lengths in one.lengths.items():
            summary = lengths.summary()
            if summary["texts"]:
                row = [name, field, summary["texts"], f"{summary['mean']:,.1f}", *(summary[key] for key in QUANTILES)]
                rows.append(row + ([] if lengths.limit is None else [_cut(lengths)]))
                name = ""
    return rows


def _cut(lengths: Lengths) -> str:
    """Share of the texts that a run cuts."""
    return f"{lengths.cut / lengths.texts:.2%}"


def _plain(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _set_parts(report: CheckReport, one: SetReport) -> list[str]:
    parts: list[str] = []
    if one is not report.together and one.refusal:
        parts += [_marked("A run would refuse this data set.", "bad"), pages.verbatim(one.refusal)]
    elif one.problems.count:
        parts.append(pages.verbatim(one.problems.message()))
    if one.scores.records:
        parts.append(one.scores.text(one.counts["records"]).capitalize())
    for warning in one.warnings:
        parts.append(_marked(warning.text, "warning"))
        if warning.examples:
            parts.append(pages.table(["where", "text"], [_example(shown) for shown in warning.examples]))
    if any(lengths.texts for lengths in one.lengths.values()):
        parts.append(_histogram(report.unit, one))
    return parts


def _example(shown: Shown) -> list[str]:
    ids = f" (ids: {', '.join(shown.ids)})" if shown.ids else ""
    return ["; ".join(shown.places), " | ".join(shown.texts) + ids]


def _marked(text: str, mark: str) -> pages.Html:
    return pages.Html(f"<p>{pages.marked(text, mark)}</p>")


def _histogram(unit: str, one: SetReport) -> pages.Html:
    series, counts = {}, {}
    for name, lengths in one.lengths.items():
        series[name] = np.array(sorted(lengths.counts), np.int64)
        counts[name] = np.array([lengths.counts[length] for length in series[name].tolist()], np.int64)
    limits = {lengths.limit for lengths in one.lengths.values() if lengths.limit is not None}
    title = "Lengths before texts are cut" + (
        f"; dashed: limit {', '.join(map(str, sorted(limits)))}" if limits else ""
    )
    return pages.histogram(series, title, unit, counts=counts, bins=40, log=True, marks=sorted(limits))
