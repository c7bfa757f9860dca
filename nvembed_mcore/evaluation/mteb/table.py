"""Scores by kind of task, beside what NV-Embed reached."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nvembed_mcore.evaluation.mteb.run import Score

_PUBLISHED = Path(__file__).parent / "published_scores.yaml"


@dataclass(frozen=True)
class Row:
    """A line of the table: a task, or the heading of a kind of task or of all.

    Attributes:
        ours: a score or an average, in per cent; None where not all tasks of the heading were run.
        theirs: of each of `models`, None where the paper has none.
    """

    label: str
    ours: float | None
    theirs: list[float | None]
    is_heading: bool = False


def models() -> list[str]:
    """The published models that `Row.theirs` is about."""
    return list(_published()["models"])


def rows_of(scores: Iterable[Score], english: dict[str, str]) -> list[Row]:
    """Tasks by kind. A heading has an average only where all English tasks of its kind were run, and of those only.

    Args:
        english: kind of each of the 56 English tasks by name.
    """
    published = _published()
    nothing = [None] * len(published["models"])
    ours = {score.task: score for score in scores}
    rows: list[Row] = []
    for kind in _kinds(ours.values(), published):
        wanted = [name for name in english if english[name] == kind]
        if wanted and all(name in ours for name in wanted):
            mean = sum(ours[name].score for name in wanted) / len(wanted)
            rows.append(Row(f"{kind}, average of {len(wanted)}", mean, published["kinds"][kind], is_heading=True))
        else:
            rows.append(Row(kind, None, nothing, is_heading=True))
        for name in sorted(name for name in ours if ours[name].kind == kind):
            rows.append(Row(name, ours[name].score, published["tasks"].get(name, nothing)))
    if all(name in ours for name in english):
        mean = sum(ours[name].score for name in english) / len(english)
        rows.append(Row(f"All, average of {len(english)}", mean, published["average"], is_heading=True))
    return rows


def text_of(rows: list[Row]) -> str:
    """The table for a terminal."""
    lines = [("", "ours", *models())]
    for row in rows:
        label = row.label if row.is_heading else f"  {row.label}"
        lines.append((label, *("" if one is None else f"{one:.2f}" for one in (row.ours, *row.theirs))))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(one.rjust(width) for one, width in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    )


def _kinds(scores: Iterable[Score], published: dict[str, Any]) -> list[str]:
    """Kinds of the tasks that were run, those of the paper first, in its order."""
    seen = {score.kind for score in scores}
    return [kind for kind in published["kinds"] if kind in seen] + sorted(seen - set(published["kinds"]))


def _published() -> dict[str, Any]:
    return yaml.safe_load(_PUBLISHED.read_text(encoding="utf-8"))
