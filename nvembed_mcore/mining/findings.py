"""What mining found out about a data set, collected shard by shard of its queries: figures, not yet a page.

Letters: `Q` queries of a shard, `k` candidates of each, best first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np

from nvembed_mcore.mining.candidates import Judged
from nvembed_mcore.mining.select import Rules

RANKS = (1, 10, 100)
_PERCENTILES = (5, 25, 50, 75, 95)


class Suspect(TypedDict):
    """A document that may be a positive nobody labelled."""

    record: int
    document: int
    score: float
    positive: int
    """Number of the query's positive with the smallest score."""
    positive_score: float
    used: bool
    """Whether it became a negative."""


@dataclass
class Findings:
    """Figures of all queries so far."""

    rules: Rules
    num_documents: int
    num_suspects: int
    positives: list[np.ndarray] = field(default_factory=list)
    best: list[np.ndarray] = field(default_factory=list)
    """Scores of the best candidates that are not barred, as many as there should be negatives."""
    negatives: list[np.ndarray] = field(default_factory=list)
    """Scores of those that were chosen."""
    counts: list[np.ndarray] = field(default_factory=list)
    """Negatives of each query."""
    ranks: list[np.ndarray] = field(default_factory=list)
    """Of each query's best positive among documents that are not barred; 0 where the candidates end before it."""
    refused: list[np.ndarray] = field(default_factory=list)
    """Candidates of each query, among the ranks that are looked at, that score too high."""
    suspects: list[Suspect] = field(default_factory=list)

    def add(self, judged: Judged) -> None:
        free = ~judged.is_barred
        places = np.cumsum(free, axis=1)
        looked_at = free & (places > self.rules.skip) & (places <= self.rules.end)
        self.positives.append(np.concatenate(judged.positive_scores))
        self.best.append(judged.scores[free & (places <= self.rules.negatives)])
        chosen = [row[columns] for row, columns in zip(judged.scores, judged.columns, strict=True)]
        self.negatives.append(np.concatenate(chosen))
        self.counts.append(np.array([len(columns) for columns in judged.columns]))
        self.refused.append((looked_at & ~judged.is_allowed).sum(axis=1))
        self.ranks.append(self._ranks(judged, free))
        self._add_suspects(judged, free)

    def _ranks(self, judged: Judged, free: np.ndarray) -> np.ndarray:
        best = np.array([scores.max() for scores in judged.positive_scores])
        above = (free & (judged.scores > best[:, None])).sum(axis=1)
        present = judged.documents >= 0
        # The positive itself may be the last candidate: what scores as it does, or less, ends the search for it.
        reached = (present & (judged.scores <= best[:, None])).any(axis=1) | (
            present.sum(axis=1) == self.num_documents
        )
        return np.where(reached, above + 1, 0)

    def _add_suspects(self, judged: Judged, free: np.ndarray) -> None:
        """Of each query the best candidate, if it scores above the limit or a positive; the worst of all are kept."""
        positives = judged.positive_scores
        for row in np.flatnonzero(free.any(axis=1)):
            column, lowest = int(free[row].argmax()), int(positives[row].argmin())
            score, positive_score = float(judged.scores[row, column]), float(positives[row][lowest])
            if score >= min(judged.limit[row], positive_score):
                self.suspects.append(
                    Suspect(
                        record=int(judged.records[row]),
                        document=int(judged.documents[row, column]),
                        score=score,
                        positive=int(judged.own[row][lowest]),
                        positive_score=positive_score,
                        used=column in judged.columns[row],
                    )
                )
        self.suspects.sort(key=lambda one: (one["positive_score"] - one["score"], one["record"]))
        del self.suspects[self.num_suspects :]

    def figures(self) -> dict[str, Any]:
        """All of it as JSON values."""
        counts, ranks, refused = (np.concatenate(parts) for parts in (self.counts, self.ranks, self.refused))
        total = len(counts)
        return {
            "records": total,
            "documents": self.num_documents,
            "negatives": int(counts.sum()),
            "records_with_enough_negatives": int((counts == self.rules.negatives).sum()),
            "records_with_too_few_negatives": int((counts < self.rules.negatives).sum()),
            "records_without_negatives": int((counts == 0).sum()),
            "share_with_too_few_negatives": round(float((counts < self.rules.negatives).mean()), 6),
            "records_with_candidates_above_the_limit": int((refused > 0).sum()),
            "candidates_above_the_limit": int(refused.sum()),
            **{f"positive_in_first_{rank}": int(((ranks > 0) & (ranks <= rank)).sum()) for rank in RANKS},
            "positive_not_found": int((ranks == 0).sum()),
            "scores": {name: _spread(scores) for name, scores in self.scores().items()},
        }

    def scores(self) -> dict[str, np.ndarray]:
        """Scores by what they belong to, float32."""
        parts = {"positives": self.positives, "best candidates": self.best, "chosen negatives": self.negatives}
        return {name: np.concatenate([*some, np.empty(0, np.float32)]) for name, some in parts.items()}


def _spread(scores: np.ndarray) -> dict[str, float]:
    if not len(scores):
        return {}
    values = {"mean": scores.mean(dtype=np.float64)}
    values |= {f"p{share}": np.percentile(scores, share) for share in _PERCENTILES}
    return {name: round(float(value), 6) for name, value in values.items()}
