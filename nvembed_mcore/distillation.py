"""Distillation from a teacher's scores, with its gradient: no autograd and no collectives (docs/design.md, The loss).

Letters: `q` queries scored here, `C` passages of one of them at most, `Q` queries, `M` passages and `N` texts of the
global batch (queries first), `n` texts of this rank, `D` embedding size.

    divergence of query i = sum over j of t_ij (log t_ij - log s_ij)
    t_i = softmax(scores of the teacher / teacher_temperature),   s_i = softmax(scale * query_i . passage_ij)

over the query's own positives and hard negatives in this step. What is added to InfoNCE is `weight` times the mean
over all Q queries; one with fewer than two scored passages counts zero. With weight 1 the gradient is that of
FlagEmbedding (abc/finetune/embedder/AbsModeling.py, `kl_div`), whose cross-entropy is larger by the teacher's entropy,
which no weight of the student changes. sentence-transformers' DistillKLDivLoss is this divergence without InfoNCE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nvembed_mcore import device
from nvembed_mcore.config_step import DistillationConfig
from nvembed_mcore.data.batch import Batch

BLOCK_NUMBERS = 1 << 22
"""Numbers of the passages' embeddings that are copied at once (16 MiB in float32). With their gradient, and the part
of it that is this rank's, a block takes three times as much, when what InfoNCE made for its rows and columns is
gone."""


@dataclass(frozen=True)
class Divergence:
    """Of each query: float32, or the dtype of the embeddings if that is wider.

    Attributes:
        loss: [q].
        grad_queries: [q, D].
        grad_passages: [q, C, D], zero where there is no passage.
        grad_log_scale: [q].
    """

    loss: Tensor
    grad_queries: Tensor
    grad_passages: Tensor
    grad_log_scale: Tensor


def divergence(queries: Tensor, passages: Tensor, teacher: Tensor, scale: float) -> Divergence:
    """The divergence of the student from the teacher for each query, and its gradients.

    Args:
        queries: float [q, D], unit vectors.
        passages: [q, C, D], each query's own; any vector where it has fewer.
        teacher: [q, C], logarithms of the teacher's probabilities, `-inf` where there is no passage.
        scale: one over the student's temperature.
    """
    teacher = teacher.to(queries.dtype)
    scores = scale * torch.bmm(passages, queries[:, :, None]).squeeze(2)
    is_there = teacher > -torch.inf
    student = torch.log_softmax(scores.masked_fill(~is_there, -torch.inf), dim=1)
    target = teacher.exp()
    gap = torch.where(is_there, teacher - student, 0.0)
    to_scores = student.exp() - target
    return Divergence(
        loss=(target * gap).sum(1),
        grad_queries=scale * torch.bmm(to_scores[:, None], passages).squeeze(1),
        grad_passages=(scale * to_scores)[:, :, None] * queries[:, None],
        # A score is the scale times a cosine, so its derivative to log(scale) is the score itself.
        grad_log_scale=(to_scores * scores).sum(1),
    )


def is_distilled(batch: Batch) -> np.ndarray:
    """Bool [Q], whether a query has what a distribution needs: scores of two of its passages at least."""
    if batch.teacher_scores is None:
        return np.zeros(batch.num_queries, dtype=bool)
    scored = batch.passage_query[np.isfinite(batch.teacher_scores)]
    return np.bincount(scored, minlength=batch.num_queries) >= 2


@dataclass(frozen=True)
class Share:
    """What a rank computes of the divergences of a batch, whatever the number of dimensions.

    Attributes:
        queries: int64 [q], text numbers.
        passages: int64 [q, C], text numbers; the query's own where it has fewer than C.
        teacher: float32 [q, C], as in `divergence`.
        query_places, passage_places: int64 [q] and [q, C], their rows of the gradient; -1: not for this rank to make.
        is_own: bool [q], whether the query is this rank's, which then reports its loss.
        weight: of the gradients.
    """

    queries: Tensor
    passages: Tensor
    teacher: Tensor
    query_places: Tensor
    passage_places: Tensor
    is_own: Tensor
    weight: float

    def score_(self, vectors: Tensor, scale: float, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Add `weight` times the gradients to `grad`; the rank's own queries' sum of divergences and `weight` times
        their gradient to log(scale).

        Args:
            vectors: float32 [N, d], unit vectors of all texts.
            scale: one over the temperature.
            grad: [N, d], takes this rank's part for all texts, or [n, d] everything for its own.
        """
        loss, grad_log_scale = vectors.new_zeros(()), vectors.new_zeros(())
        height = max(1, BLOCK_NUMBERS // max(1, self.passages.size(1) * vectors.size(1)))
        for begin in range(0, len(self.queries), height):
            some = slice(begin, begin + height)
            found = divergence(vectors[self.queries[some]], vectors[self.passages[some]], self.teacher[some], scale)
            loss += found.loss[self.is_own[some]].sum()
            grad_log_scale += self.weight * found.grad_log_scale[self.is_own[some]].sum()
            for places, values in (
                (self.query_places[some], found.grad_queries),
                (self.passage_places[some], found.grad_passages),
            ):
                is_mine = places >= 0
                grad.index_add_(0, places[is_mine], values[is_mine], alpha=self.weight)
        return loss, grad_log_scale


def share_of(
    batch: Batch, owned: Sequence[np.ndarray], rank: int, config: DistillationConfig, *, alone: bool, weight: float
) -> Share | None:
    """A rank's share; None where no query of the batch is distilled.

    Args:
        owned: for each rank the numbers of its texts.
        rank: whose share.
        alone: whether the rank makes all of its own texts' gradients, so that nothing is summed over ranks: those of
            a passage need the query's other passages, which may be texts of any rank. Otherwise it makes those of its
            queries and of all their passages.
        weight: of the gradients.
    """
    is_query = is_distilled(batch)
    if not is_query.any():
        return None
    is_mine = np.zeros(len(batch.texts), dtype=bool)
    is_mine[owned[rank]] = True
    is_own = is_mine[: batch.num_queries]
    wanted = is_own.copy()
    if alone:
        wanted[batch.passage_query[is_mine[batch.num_queries :]]] = True
        place = np.full(len(batch.texts), -1)
        place[owned[rank]] = np.arange(len(owned[rank]))
    else:
        place = np.arange(len(batch.texts))
    queries = np.flatnonzero(wanted & is_query)
    passages, scores = _own_passages(batch, queries)
    is_there = passages >= 0
    texts = np.where(is_there, batch.num_queries + passages, queries[:, None])
    teacher = torch.log_softmax(torch.as_tensor(scores) / config.teacher_temperature, dim=1)

    def on_device(values: np.ndarray | Tensor) -> Tensor:
        return torch.as_tensor(values, device=device.current())

    return Share(
        queries=on_device(queries),
        passages=on_device(texts),
        teacher=on_device(teacher.float()),
        query_places=on_device(place[queries]),
        passage_places=on_device(np.where(is_there, place[texts], -1)),
        is_own=on_device(is_own[queries]),
        weight=weight,
    )


def _own_passages(batch: Batch, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and scores of the scored passages of some queries: int64 and float64 [q, C]; -1 and `-inf` to fill."""
    row_of = np.full(batch.num_queries, -1)
    row_of[queries] = np.arange(len(queries))
    numbers = np.flatnonzero(np.isfinite(batch.teacher_scores) & (row_of[batch.passage_query] >= 0))
    rows = row_of[batch.passage_query[numbers]]
    counts = np.bincount(rows, minlength=len(queries))
    # A query's passages stand together, in the order of the queries.
    columns = np.arange(len(numbers)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = (len(queries), int(counts.max(initial=0)))
    passages, scores = np.full(shape, -1), np.full(shape, -np.inf)
    passages[rows, columns], scores[rows, columns] = numbers, batch.teacher_scores[numbers]
    return passages, scores
