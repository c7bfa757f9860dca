"""The global batch of one step, the same on every rank.

Letters: `Q` queries, `M` passages, `N = Q + M` texts, `P` positives listed for a query at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nvembed_mcore.data.packing import Text


@dataclass(frozen=True)
class Sample:
    """One query with the passages that this step pairs it with.

    Attributes:
        query: the query.
        passages: its positives first, then its hard negatives.
        passage_ids: int64, the passages' documents.
        positive_ids: int64, documents of all positives of the record, also those that this step did not choose.
        in_batch: whether passages of other queries are its negatives.
        num_positives: how many of the passages are positives.
        dataset: number of its data set.
        teacher_scores: float32, what a teacher scores each passage; None where nothing is distilled.
    """

    query: Text
    passages: list[Text]
    passage_ids: np.ndarray
    positive_ids: np.ndarray
    in_batch: bool
    num_positives: int = 1
    dataset: int = 0
    teacher_scores: np.ndarray | None = None


@dataclass(frozen=True)
class Batch:
    """Texts in global order, queries first, and who belongs to whom.

    Attributes:
        texts: N texts; text `i < Q` is query `i`, text `Q + j` is passage `j`.
        num_queries: Q.
        in_batch: bool [Q].
        dataset: int64 [Q].
        positive_ids: int64 [Q, P], repeated to fill.
        passage_query: int64 [M], query that each passage belongs to.
        passage_ids: int64 [M].
        is_positive: bool [M], whether the passage is a positive of its query or a hard negative.
        teacher_scores: float32 [M], NaN where a query has none; None where no query has any.
    """

    texts: list[Text]
    num_queries: int
    in_batch: np.ndarray
    dataset: np.ndarray
    positive_ids: np.ndarray
    passage_query: np.ndarray
    passage_ids: np.ndarray
    is_positive: np.ndarray
    teacher_scores: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text, int64 [N]."""
        return np.array([len(text) for text in self.texts], dtype=np.int64)


def make_batch(samples: Sequence[Sample]) -> Batch:
    """Flatten samples into a batch."""
    counts = np.array([len(sample.passages) for sample in samples], dtype=np.int64)
    # A power of two: a GPU compiles its kernel for each width.
    widest = 1 << (max(len(sample.positive_ids) for sample in samples) - 1).bit_length()
    return Batch(
        texts=[sample.query for sample in samples] + [text for sample in samples for text in sample.passages],
        num_queries=len(samples),
        in_batch=np.array([sample.in_batch for sample in samples]),
        dataset=np.array([sample.dataset for sample in samples], dtype=np.int64),
        positive_ids=np.stack([np.resize(sample.positive_ids, widest) for sample in samples]).astype(np.int64),
        passage_query=np.repeat(np.arange(len(samples)), counts),
        passage_ids=np.concatenate([sample.passage_ids for sample in samples]).astype(np.int64),
        is_positive=np.concatenate([np.arange(len(one.passages)) < one.num_positives for one in samples]),
        teacher_scores=_teacher_scores(samples),
    )


def _teacher_scores(samples: Sequence[Sample]) -> np.ndarray | None:
    """Of all passages."""
    if all(sample.teacher_scores is None for sample in samples):
        return None
    return np.concatenate(
        [
            np.full(len(one.passages), np.nan, np.float32) if one.teacher_scores is None else one.teacher_scores
            for one in samples
        ]
    )
