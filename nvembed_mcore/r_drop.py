"""R-Drop (arXiv 2106.14448): how far two embeddings of the same texts, under different dropout, disagree in scores.

    divergence of row i = weight_i / 2 * sum over allowed j of (p_ij - q_ij) (log p_ij - log q_ij)

the mean of KL(p || q) and KL(q || p), where `p` is the softmax of the row's scores in the first view of all texts and
`q` that in the second one. Rows, columns and masks are those of `loss`; a column takes part in both distributions or
in none. Pure numerics, no collectives and no autograd. Scores exist only for a block of rows, in four matrices.

With `d = s - s'`, the difference of a row's scores, and `m` its mean under `p`, `m'` the mean of `d - m` under `q`:

    gradient to s  = weight / 2 * (p (1 + d - m) - q)
    gradient to s' = weight / 2 * (q (1 - d + m + m') - p),      divergence = -weight / 2 * m'

Letters: `a` rows scored here, `c` columns, `r` rows of a block, `D` embedding size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nvembed_mcore.kernels.reference import Columns, Masks, Rows, allowed
from nvembed_mcore.loss import _add_to_columns_, _Block, _blocks, _in_scores, _product_

MATRICES = 4
"""Of the size of a block, while its gradients are made."""
Views = Sequence[Tensor]
"""The same of both embeddings, two of them."""


@dataclass(frozen=True)
class Disagreement:
    """What `diverge_rows` finds, in float32 (of float64 embeddings, in float64).

    Attributes:
        total: scalar, sum of the rows' divergences.
        of_rows: [a, 4], of each row what `diverge_columns` needs: log of the sum over allowed columns of exp(score)
            in both views, m and m'.
        grad_rows: [a, D] for each view.
        grad_columns: [c, D] for each view, or None where it was not asked for.
        grad_log_scale: scalar, gradient of `total` to log(scale).
    """

    total: Tensor
    of_rows: Tensor
    grad_rows: Views
    grad_columns: Views | None
    grad_log_scale: Tensor


def diverge_rows(
    anchors: Views, candidates: Views, rows: Rows, columns: Columns, masks: Masks, scale: float, *, with_columns: bool
) -> Disagreement:
    """Divergences and gradients of some rows against all columns.

    Args:
        anchors: [a, D] in each view, as in `loss.score_rows`; so are `candidates` [c, D] and the rest. Where `masks`
            has a margin, a column is left out that exceeds it in either view.
    """
    masks = _in_scores(masks, scale)
    wide = torch.promote_types(anchors[0].dtype, torch.float32)
    grad_anchors = tuple(torch.empty_like(view, dtype=wide) for view in anchors)
    grad_candidates = tuple(torch.zeros_like(view, dtype=wide) for view in candidates) if with_columns else None
    total, grad_log_scale = (grad_anchors[0].new_zeros(()) for _ in range(2))
    of_rows = grad_anchors[0].new_empty(len(anchors[0]), 4)
    for blocks in _pairs_of_blocks(anchors, candidates, scale):
        some = blocks[0].rows
        weight = rows[some].weight.to(wide)
        of_rows[some] = _gradients_(blocks, rows[some], columns, masks)
        total -= (weight * of_rows[some, 3]).sum() / 2
        for view, block in enumerate(blocks):
            grad = _product_(grad_anchors[view][some], block.gradient, candidates[view])
            grad.mul_((weight * (scale / 2))[:, None])
            grad_log_scale += (anchors[view][some] * grad).sum()
            if grad_candidates is not None:
                _add_to_columns_(grad_candidates[view], block, weight / 2)
    return Disagreement(total, of_rows, grad_anchors, grad_candidates, grad_log_scale)


def diverge_columns(
    anchors: Views, candidates: Views, rows: Rows, columns: Columns, masks: Masks, scale: float, of_rows: Tensor
) -> Views:
    """Gradient of all rows' divergences to some columns, [c, D] in each view; `masks` have no margin.

    Args:
        anchors: those of all rows; as in `loss.score_columns`, and so is the rest.
        of_rows: [a, 4], of all rows over all columns.
    """
    wide = torch.promote_types(candidates[0].dtype, torch.float32)
    grads = tuple(torch.zeros_like(view, dtype=wide) for view in candidates)
    if len(columns) == 0:
        return grads
    for blocks in _pairs_of_blocks(anchors, candidates, scale):
        some = rows[blocks[0].rows]
        _gradients_(blocks, some, columns, masks, of_rows[blocks[0].rows])
        for grad, block in zip(grads, blocks, strict=True):
            _add_to_columns_(grad, block, some.weight.to(wide) / 2)
    return grads


def _pairs_of_blocks(anchors: Views, candidates: Views, scale: float) -> Iterator[tuple[_Block, _Block]]:
    """The same rows' blocks of both views."""
    views = zip(anchors, candidates, strict=True)
    return zip(*(_blocks(some, others, scale, matrices=MATRICES) for some, others in views), strict=True)


def _gradients_(
    blocks: tuple[_Block, _Block], rows: Rows, columns: Columns, masks: Masks, known: Tensor | None = None
) -> Tensor:
    """Turn two blocks of scores into the gradients of the rows' doubled divergences to them; returns [r, 4].

    Args:
        known: what it returned for these rows, where these are not all columns.
    """
    scores = [block.scores for block in blocks]
    apart = scores[0] - scores[1]
    keep = _allowed_in_both(scores, rows, columns, masks)
    apart.masked_fill_(~keep, 0.0)
    for one in scores:
        one.masked_fill_(~keep, float("-inf"))
    log_sums = [one.logsumexp(1) for one in scores] if known is None else known[:, :2].unbind(1)
    p, q = (one.sub_(log_sum[:, None]).exp_() for one, log_sum in zip(scores, log_sums, strict=True))
    mean = (p * apart).sum(1) if known is None else known[:, 2]
    apart.sub_(mean[:, None])
    other = (q * apart).sum(1) if known is None else known[:, 3]
    to_first = (p - q).addcmul_(p, apart)
    # What is left of the scores is not needed any more, and may be where the gradients go.
    to_second = apart.neg_().add_(other[:, None] + 1).mul_(q).sub_(p)
    for block, gradient in zip(blocks, (to_first, to_second), strict=True):
        block.gradient.copy_(gradient)
    return torch.stack([*log_sums, mean, other], dim=1)


def _allowed_in_both(scores: list[Tensor], rows: Rows, columns: Columns, masks: Masks) -> Tensor:
    """Bool [r, c]; only a margin looks at the scores, of which every positive must be among the columns then."""
    if masks.margin is None:
        return allowed(scores[0], scores[0][:, 0], rows, columns, masks)
    first, second = (allowed(one, one.gather(1, rows.positive[:, None])[:, 0], rows, columns, masks) for one in scores)
    return first & second
