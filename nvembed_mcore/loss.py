"""InfoNCE on gathered embeddings: pure numerics, no collectives (docs/design.md).

Letters: `Q` queries of the global batch, `q` query rows scored here, `M` passages of the global batch, `P` positives
listed for a query at most, `D` embedding size.

    loss of row i = -log( exp(s_ip / t) / sum over allowed j of exp(s_ij / t) ),   s_ij = query_i . passage_j

Allowed passages of a row: its own (positive and hard negatives); those of other queries where its data set says so;
never one with the id of any of its positives, its positive itself excepted.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

BLOCK_SCORES = 1 << 22
"""Scores that exist at one time (16 MiB in float32): the loss walks over blocks of whole rows."""


@dataclass(frozen=True)
class Targets:
    """Who belongs to whom. Tensors are on the device of the embeddings.

    Attributes:
        query: int64 [q], global number of each row's query.
        positive: int64 [q], column of its positive among the M passages.
        in_batch: bool [q], whether passages of other queries are its negatives.
        positive_ids: int64 [q, P], document ids of all its positives (repeated to fill).
        passage_query: int64 [M], query that each passage belongs to.
        passage_ids: int64 [M], document ids.
        mask_same_document: whether passages with an id in `positive_ids` are left out.
    """

    query: torch.Tensor
    positive: torch.Tensor
    in_batch: torch.Tensor
    positive_ids: torch.Tensor
    passage_query: torch.Tensor
    passage_ids: torch.Tensor
    mask_same_document: bool = True

    def rows(self, selection: slice | torch.Tensor) -> Targets:
        """The same for some of the rows."""
        per_row = ("query", "positive", "in_batch", "positive_ids")
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Targets(**{name: value[selection] if name in per_row else value for name, value in values.items()})

    def allowed(self) -> torch.Tensor:
        """Bool [q, M], true where a passage takes part in a row's softmax."""
        allowed = (self.passage_query[None] == self.query[:, None]) | self.in_batch[:, None]
        if self.mask_same_document:
            for ids in self.positive_ids.unbind(1):
                allowed &= self.passage_ids[None] != ids[:, None]
        return allowed.scatter_(1, self.positive[:, None], True)


class _RowLoss(torch.autograd.Function):
    """Sum of the rows' losses; gradients are made block by block in the forward pass, so nothing is recomputed."""

    @staticmethod
    def forward(ctx, queries, passages, targets: Targets, temperature: float):
        grad_queries = torch.zeros_like(queries)
        grad_passages = torch.zeros_like(passages)
        total = queries.new_zeros(())
        correct = queries.new_zeros(())
        rows = max(1, BLOCK_SCORES // max(1, passages.size(0)))
        for begin in range(0, queries.size(0), rows):
            block = slice(begin, begin + rows)
            part = targets.rows(block)
            scores = (queries[block] @ passages.T) / temperature
            scores.masked_fill_(~part.allowed(), float("-inf"))
            of_positive = scores.gather(1, part.positive[:, None])
            correct += (scores.amax(1, keepdim=True) <= of_positive).sum()
            log_sum = scores.logsumexp(1, keepdim=True)
            total += (log_sum - of_positive).sum()
            weights = (scores - log_sum).exp_()
            weights.scatter_add_(1, part.positive[:, None], weights.new_full((), -1.0).expand(weights.size(0), 1))
            weights /= temperature
            grad_queries[block] = weights @ passages
            grad_passages.addmm_(weights.T, queries[block])
        ctx.save_for_backward(grad_queries, grad_passages)
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx, grad_total, _):
        grad_queries, grad_passages = ctx.saved_tensors
        return grad_queries * grad_total, grad_passages * grad_total, None, None


def info_nce(
    queries: torch.Tensor, passages: torch.Tensor, targets: Targets, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the rows' losses, and how many rows score their positive highest.

    Args:
        queries: float32 [q, D], unit vectors. `q` may be 0.
        passages: float32 [M, D], unit vectors.
        targets: who belongs to whom.
        temperature: scores are divided by this.

    Returns:
        Two float32 scalars; only the first has a gradient, to both inputs. No score matrix beyond a block exists,
        forward or backward.
    """
    return _RowLoss.apply(queries, passages, targets, temperature)
