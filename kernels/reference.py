"""The block of InfoNCE in plain torch, and what every version of it reads.

Letters: `r` rows of the block, `c` columns, `P` document ids listed for a row or a column at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Anchors and their positives, on one device.

    Attributes:
        query: int32 [r], number of the query that the row belongs to.
        positive: int64 [r], column of its positive; -1 where that is not among the columns at hand.
        weight: float32 [r], share of the row in its query's loss: 1 / (number of the query's positives).
        in_batch: bool [r], whether columns of other queries are its negatives.
        dataset: int32 [r], data set of the query.
        documents: int32 [r, P], ids that never make a negative of this row (repeated to fill).
        is_masked: bool [r], false where every column takes part, which spares the row all comparisons.
    """

    query: Tensor
    positive: Tensor
    weight: Tensor
    in_batch: Tensor
    dataset: Tensor
    documents: Tensor
    is_masked: Tensor

    def __len__(self) -> int:
        return len(self.query)

    def __getitem__(self, selection: slice | Tensor) -> Rows:
        return Rows(**{name: values[selection] for name, values in vars(self).items()})

    def to(self, device: torch.device) -> Rows:
        return Rows(**{name: values.to(device) for name, values in vars(self).items()})


@dataclass(frozen=True)
class Columns:
    """Candidates, on one device.

    Attributes:
        query: int32 [c], number of the query that the column belongs to.
        hard: bool [c], whether it is a hard negative of that query; a column of its own that is not, and is not the
            row's positive, is another positive and takes no part.
        shared: bool [c], whether it may be a negative of other queries.
        dataset: int32 [c], data set of its query.
        documents: int32 [c, P], its document ids (repeated to fill).
    """

    query: Tensor
    hard: Tensor
    shared: Tensor
    dataset: Tensor
    documents: Tensor

    def __len__(self) -> int:
        return len(self.query)

    def to(self, device: torch.device) -> Columns:
        return Columns(**{name: values.to(device) for name, values in vars(self).items()})


@dataclass(frozen=True)
class Masks:
    """Which columns take part in a row's softmax, besides its positive and its own hard negatives.

    Attributes:
        same_document: columns with an id in the row's `documents` are left out, also the row's own.
        same_dataset_only: columns of other queries take part only within the row's data set.
        margin: columns of other queries that score higher than the positive by more than this are left out as false
            negatives; the row's own columns stay. In units of the scores; None: no such mask.
    """

    same_document: bool = True
    same_dataset_only: bool = False
    margin: float | None = None


@dataclass(frozen=True)
class Softmax:
    """What is known of the rows' softmax: float32 [r] each.

    Attributes:
        log_sum: log of the sum over allowed columns of exp(score).
        of_positive: score of the positive.
    """

    log_sum: Tensor
    of_positive: Tensor

    def __getitem__(self, selection: slice) -> Softmax:
        return Softmax(self.log_sum[selection], self.of_positive[selection])


def allowed(scores: Tensor, of_positive: Tensor, rows: Rows, columns: Columns, masks: Masks) -> Tensor:
    """Bool [r, c], true where a column takes part in a row's softmax."""
    is_own = columns.query[None] == rows.query[:, None]
    others = rows.in_batch[:, None] & columns.shared[None]
    if masks.same_dataset_only:
        others &= columns.dataset[None] == rows.dataset[:, None]
    if masks.margin is not None:
        others &= scores <= of_positive[:, None] + masks.margin
    result = torch.where(is_own, columns.hard[None], others)
    if masks.same_document:
        for mine in rows.documents.unbind(1):
            for theirs in columns.documents.unbind(1):
                result &= theirs[None] != mine[:, None]
    # Where the positive is not among these columns, its place is given to column 0 and taken back.
    has_positive = rows.positive >= 0
    place = rows.positive.clamp_min(0)[:, None]
    return result.scatter_(1, place, result.gather(1, place) | has_positive[:, None])


def softmax_gradient_(
    scores: Tensor,
    rows: Rows,
    columns: Columns,
    masks: Masks,
    known: Softmax | None = None,
    *,
    gradient: Tensor | None = None,
) -> tuple[Softmax, Tensor | None]:
    """Turn scores into the gradient of each row's `log_sum - of_positive` to them.

    Args:
        scores: float32 [r, c], written over.
        rows, columns, masks: who takes part.
        known: the rows' softmax over more columns than these, of which this block is a part. None: these are all
            columns, and each row's positive is among them.
        gradient: [r, c] of any floating dtype; becomes softmax over the allowed columns minus one at the positive.
            None: the scores do.

    Returns:
        The rows' softmax, and the largest score [r] among allowed columns (None where `known` is given).
    """
    if known is None:
        of_positive = scores.gather(1, rows.positive[:, None])[:, 0]
    else:
        of_positive = known.of_positive
    _mask_(scores, of_positive, rows, columns, masks)
    if known is None:
        best = scores.amax(1)
        torch.softmax(scores, dim=1, out=scores)
        # The largest weight is one over the sum of exp(score - best).
        found = Softmax(best - scores.amax(1).log(), of_positive)
    else:
        best, found = None, known
        scores.sub_(known.log_sum[:, None]).exp_()
    place = rows.positive.clamp_min(0)[:, None]
    scores.scatter_add_(1, place, -(rows.positive >= 0).to(scores.dtype)[:, None])
    if gradient is not None and gradient is not scores:
        gradient.copy_(scores)
    return found, best


def _mask_(scores: Tensor, of_positive: Tensor, rows: Rows, columns: Columns, masks: Masks) -> None:
    """Set scores that take no part to minus infinity."""
    if scores.is_cuda or bool(rows.is_masked.all()):  # on CUDA, to look would mean to wait
        scores.masked_fill_(~allowed(scores, of_positive, rows, columns, masks), float("-inf"))
    elif bool(rows.is_masked.any()):
        some = rows.is_masked.nonzero()[:, 0]
        part = scores[some]
        part.masked_fill_(~allowed(part, of_positive[some], rows[some], columns, masks), float("-inf"))
        scores[some] = part
