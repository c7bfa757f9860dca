"""What a teacher's scores of a data set are like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nvembed_mcore.data.records import Record

_NAMES = {"pos_scores": "positives", "neg_scores": "negatives"}


@dataclass(slots=True)
class Scores:
    """A teacher's scores of some records.

    Attributes:
        records: those that have scores.
        disputed: of these, those of which a negative scores as high as a positive, or higher.
        ranges: field -> least and greatest score; without fields that have no document.
    """

    records: int = 0
    disputed: int = 0
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Sequence[Record]) -> Scores:
        found = cls()
        for record in records:
            scores = {name: values for name, values in record.scores.items() if values}
            disputed = len(scores) == 2 and max(scores["neg_scores"]) >= min(scores["pos_scores"])
            ranges = {name: (min(values), max(values)) for name, values in scores.items()}
            found.add(cls(int(bool(scores)), int(disputed), ranges))
        return found

    def add(self, other: Scores) -> None:
        """Those of more records."""
        self.records += other.records
        self.disputed += other.disputed
        for name, (low, high) in other.ranges.items():
            lowest, highest = self.ranges.get(name, (low, high))
            self.ranges[name] = (min(lowest, low), max(highest, high))

    def text(self, records: int) -> str:
        """In words, of so many records."""
        ranges = [f"{_NAMES[name]} from {low:.4g} to {high:.4g}" for name, (low, high) in self.ranges.items()]
        share = f"{self.disputed:,} with a negative as high as a positive"
        return f"a teacher's scores of {self.records:,} of {records:,} records ({share}): {', '.join(ranges)}"

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {"records": self.records, "disputed": self.disputed, **{n: list(r) for n, r in self.ranges.items()}}
