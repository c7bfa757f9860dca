"""What a data check found: counts, lengths, faults with examples, and whether a run may start."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nvembed_mcore.data.check.scores import Scores
from nvembed_mcore.data.faults import Problems

QUANTILES = {"median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of one field's texts before they are cut, prompt and special tokens included.

    Attributes:
        counts: length -> texts of that length.
        limit: longest length that is not cut; None: there is no limit, since lengths are in characters.
    """

    counts: Counter[int]
    limit: int | None

    @property
    def texts(self) -> int:
        return sum(self.counts.values())

    @property
    def cut(self) -> int:
        """Texts that are longer than the limit."""
        return sum(count for length, count in self.counts.items() if self.limit is not None and length > self.limit)

    def summary(self) -> dict[str, float | int]:
        """Texts, mean, and for each of `QUANTILES` the smallest length that so large a share does not exceed."""
        texts = self.texts
        if not texts:
            return {"texts": 0, "mean": 0.0, **dict.fromkeys(QUANTILES, 0), "cut": 0}
        values = np.array(sorted(self.counts))
        reached = np.cumsum([self.counts[value] for value in values.tolist()])
        at = {name: np.searchsorted(reached, np.ceil(share * texts)) for name, share in QUANTILES.items()}
        mean = sum(length * count for length, count in self.counts.items()) / texts
        return {
            "texts": texts,
            "mean": mean,
            **{name: int(values[index]) for name, index in at.items()},
            "cut": self.cut,
        }


@dataclass(frozen=True, slots=True)
class Shown:
    """An example: `file:line` of its records, its texts, and the ids of its documents where they are at fault."""

    places: list[str]
    texts: list[str]
    ids: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Finding:
    """A warning: it forbids no start.

    Attributes:
        kind: one word a kind of fault.
        count: how often.
        of: among how many; None where that says nothing.
        what: in words.
        examples: the first few.
    """

    kind: str
    count: int
    of: int | None
    what: str
    examples: list[Shown]

    @property
    def text(self) -> str:
        """What, and how often."""
        share = "" if self.of is None else f" of {self.of:,} ({self.count / self.of:.2%})"
        return f"{self.what}: {self.count:,}{share}"


@dataclass(slots=True)
class SetReport:
    """What was found in one data set.

    Attributes:
        path: as the user named it.
        counts: by name; those of `COUNTS`.
        lengths: field (`query`, `pos`, `neg`) -> lengths.
        problems: its bad lines.
        warnings: what forbids no start.
        error: what else would make a run refuse the set; empty if nothing.
        scores: what a teacher says of its documents.
    """

    path: str
    counts: dict[str, int]
    lengths: dict[str, Lengths]
    problems: Problems
    warnings: list[Finding]
    error: str = ""
    scores: Scores = field(default_factory=Scores)

    @property
    def refusal(self) -> str:
        """Why a run would refuse this set; empty if it would not."""
        if self.error:
            return self.error
        if self.problems.too_many:
            return self.problems.message()
        return "" if self.counts["records"] else f"{self.path} holds no records"


COUNTS = (
    "records",
    "distinct_queries",
    "positives",
    "negatives",
    "distinct_documents",
    "records_without_negatives",
    "bad_lines",
)


@dataclass(slots=True)
class CheckReport:
    """What was found in all data sets of a run.

    Attributes:
        unit: of lengths, `tokens` or `characters`.
        sets: one for each data set.
        together: all of them as one set, with the warnings about several sets.
    """

    unit: str
    sets: list[SetReport]
    together: SetReport

    @property
    def refusals(self) -> list[str]:
        return [one.refusal for one in self.sets if one.refusal]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for one in (*self.sets, self.together) for finding in one.warnings]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        return {
            "may_start": not self.refusals,
            "refusals": self.refusals,
            "unit": self.unit,
            "datasets": [{**_set_dict(one), "refusal": one.refusal} for one in self.sets],
            "together": _set_dict(self.together),
        }


def _set_dict(one: SetReport) -> dict[str, Any]:
    return {
        "path": one.path,
        "counts": one.counts,
        "lengths": {
            name: {"limit": lengths.limit, **lengths.summary(), "histogram": sorted(lengths.counts.items())}
            for name, lengths in one.lengths.items()
        },
        "teacher_scores": one.scores.as_dict(),
        "bad_lines": [line.strip() for line in one.problems.shown],
        "warnings": [
            {
                "kind": warning.kind,
                "count": warning.count,
                "of": warning.of,
                "what": warning.what,
                "examples": [
                    {"places": shown.places, "texts": shown.texts, "ids": shown.ids} for shown in warning.examples
                ],
            }
            for warning in one.warnings
        ],
    }
