"""Which candidates become a query's negatives: pure numerics on scores.

Positive-aware mining is NV-Retriever's (arXiv 2407.15831, section 3): a candidate that scores near the positive or
above it may well be a positive that nobody labelled, so the positive's score says how high a negative may score.

Letters: `Q` queries, `k` candidates of each, best first.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

METHODS = ("topk-percpos", "topk-marginpos", "topk-abs", "topk")
SAMPLINGS = ("top", "random")


@dataclass(frozen=True)
class Rules:
    """How negatives are chosen.

    Raises:
        ValueError: a value is outside its range; the message names the option.
    """

    method: str = "topk-percpos"
    """Where the limit of a negative's score is: `percent` of the positive's score, the positive's score less `margin`,
    `max_score`, or nowhere."""
    percent: float = 0.95
    """Share of the positive's score, above 0 and at most 1 (0.95: NV-Retriever, and NV-Embed section 4.1.1)."""
    margin: float = 0.05
    """Cosine, at least 0."""
    max_score: float = 0.7
    """Cosine, between -1 and 1."""
    negatives: int = 7
    """Of each query, at most."""
    skip: int = 0
    """The best candidates that are left out (NV-Retriever's "shifted by N")."""
    last: int | None = None
    """Candidates beyond this rank are not looked at; None looks at all."""
    sampling: str = "top"
    """`top` takes the best of those allowed, `random` draws among them."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"--method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"--sampling must be one of {', '.join(SAMPLINGS)}, got {self.sampling!r}")
        if not 0 < self.percent <= 1:
            raise ValueError(f"--percent must be above 0 and at most 1, got {self.percent}")
        if not 0 <= self.margin <= 2:
            raise ValueError(f"--margin must be between 0 and 2, got {self.margin}")
        if not -1 <= self.max_score <= 1:
            raise ValueError(f"--max-score must be a cosine, between -1 and 1, got {self.max_score}")
        if self.negatives < 1:
            raise ValueError(f"--negatives must be at least 1, got {self.negatives}")
        if not 0 <= self.skip < self.end:
            raise ValueError(f"--range must be 0 <= MIN < MAX, got {self.skip} {self.last}")

    @property
    def end(self) -> int:
        return sys.maxsize if self.last is None else self.last


def limits(positive_scores: np.ndarray, rules: Rules) -> np.ndarray:
    """The score that a negative of each query must be below.

    `percent` of a positive's score that is below zero would be above that score. There the limit is as far below the
    score as it would be for its absolute value: `score - (1 - percent) * |score|` on both sides of zero.

    Args:
        positive_scores: [Q], of each query its smallest: every positive is a term of the loss, and a negative that
            scores above one of them is as suspicious as if it were the only one.

    Returns:
        float64 [Q].
    """
    scores = positive_scores.astype(np.float64)
    if rules.method == "topk-percpos":
        return np.where(scores > 0, rules.percent, 2 - rules.percent) * scores
    if rules.method == "topk-marginpos":
        return scores - rules.margin
    return np.full(len(scores), rules.max_score if rules.method == "topk-abs" else np.inf)


def barred(
    texts: np.ndarray,
    ids: np.ndarray,
    present: np.ndarray,
    barred_texts: Sequence[np.ndarray],
    barred_ids: Sequence[np.ndarray],
) -> np.ndarray:
    """Candidates that are no negatives, whatever they score: positives, their duplicates, and repeated texts.

    Args:
        texts, ids: uint64 [Q, k], keys of each candidate's text and id; equal keys are the same.
        present: bool [Q, k], False where there is no candidate.
        barred_texts, barred_ids: of each query the keys of the texts and ids that it must not get.

    Returns:
        bool [Q, k]: True for a candidate with a barred text or id, with the text of a better candidate, or absent.
    """
    result = ~present
    for row in range(len(texts)):
        _, first = np.unique(texts[row], return_index=True)
        repeated = np.ones(texts.shape[1], dtype=bool)
        repeated[first] = False
        result[row] |= repeated | np.isin(texts[row], barred_texts[row]) | np.isin(ids[row], barred_ids[row])
    return result


def allowed(scores: np.ndarray, is_barred: np.ndarray, limit: np.ndarray, rules: Rules) -> np.ndarray:
    """Candidates that may be negatives: bool [Q, k].

    Ranks of `rules.skip` and `rules.last` count those that are not barred.

    Args:
        scores: [Q, k], falling.
        is_barred: bool [Q, k].
        limit: [Q].
    """
    ranks = np.cumsum(~is_barred, axis=1)
    return ~is_barred & (ranks > rules.skip) & (ranks <= rules.end) & (scores < limit[:, None])


def lacks_candidates(is_barred: np.ndarray, is_allowed: np.ndarray, rules: Rules) -> np.ndarray:
    """Queries that more candidates might serve better: bool [Q].

    Those whose ranks do not reach `rules.last`, and, where the best are taken, which have too few.
    """
    short = (~is_barred).sum(axis=1) < rules.end
    return short if rules.sampling == "random" else short & (is_allowed.sum(axis=1) < rules.negatives)


def choose(is_allowed: np.ndarray, rules: Rules, query_ids: Sequence[str]) -> list[np.ndarray]:
    """The columns of each query's negatives, rising. What is drawn depends on the seed and the query's id alone."""
    chosen = []
    for row, query_id in zip(is_allowed, query_ids, strict=True):
        columns = np.flatnonzero(row)
        if rules.sampling == "random" and len(columns) > rules.negatives:
            draw = random.Random(f"{rules.seed}/mine/{query_id}")
            columns = np.sort(draw.sample(columns.tolist(), rules.negatives))
        chosen.append(columns[: rules.negatives])
    return chosen
