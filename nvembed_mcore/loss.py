"""InfoNCE on gathered embeddings, with its gradient: pure numerics, no collectives and no autograd (docs/design.md).

Letters: `a` rows scored here, `c` columns scored here, `P` document ids listed for a row or column at most, `D`
embedding size.

    loss of row i = -weight_i log( exp(s_ip) / sum over allowed j of exp(s_ij) ),   s_ij = scale * row_i . column_j

A row is an anchor with one positive: a query with a passage, or, in the other direction, a passage with its query.
Scores exist only for a block of rows. `score_rows` makes the gradients of a block while it has the block, so nothing
is computed twice; `score_columns` makes those of some columns alone, from the rows' softmax. Both hand back what they
found as tensors, because a step pushes `dL/dE` through each pack on its own.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nvembed_mcore.kernels import reference
from nvembed_mcore.kernels.reference import Columns, Masks, Rows, Softmax

BLOCK_SCORES = 1 << 23
"""Scores of one block (32 MiB in float32)."""
LEAST_ROWS = 64
"""Rows of a block at least, however many columns there are: fewer make slow matrix products."""


@dataclass(frozen=True)
class Found:
    """What `score_rows` finds, in the dtype of the embeddings.

    Attributes:
        loss: scalar, sum of the rows' losses.
        correct: scalar, sum of the weights of rows whose positive scores highest among their columns.
        softmax: of each row, for `score_columns`.
        grad_rows: [a, D].
        grad_columns: [c, D], or None where it was not asked for.
        grad_log_scale: scalar, gradient of `loss` to log(scale).
    """

    loss: Tensor
    correct: Tensor
    softmax: Softmax
    grad_rows: Tensor
    grad_columns: Tensor | None
    grad_log_scale: Tensor


def make_targets(
    *,
    query: np.ndarray,
    positive: np.ndarray,
    weight: np.ndarray,
    in_batch: np.ndarray,
    dataset: np.ndarray,
    documents: np.ndarray,
    column_query: np.ndarray,
    column_hard: np.ndarray,
    column_shared: np.ndarray,
    column_dataset: np.ndarray,
    column_documents: np.ndarray,
    masks: Masks,
) -> tuple[Rows, Columns]:
    """Rows and columns on the CPU, from host arrays; document ids may be any int64.

    Args:
        query, positive, weight, in_batch, dataset: [a], see `Rows`.
        documents: int64 [a, P].
        column_query, column_hard, column_shared, column_dataset: [c], see `Columns`.
        column_documents: int64 [c, P].
        masks: decides which rows need comparisons at all.
    """
    # Small numbers for ids: comparisons of half the width.
    _, dense = np.unique(np.concatenate([documents.ravel(), column_documents.ravel()]), return_inverse=True)
    dense = dense.astype(np.int32)
    documents = dense[: documents.size].reshape(documents.shape)
    column_documents = dense[documents.size :].reshape(column_documents.shape)
    is_masked = ~np.asarray(in_batch, dtype=bool)
    is_masked |= masks.margin is not None or not np.all(column_shared)
    own_positives = np.bincount(column_query[~column_hard], minlength=int(query.max(initial=0)) + 1)
    is_masked |= own_positives[query] > (positive >= 0)
    if masks.same_dataset_only:
        is_masked |= len(np.unique(np.concatenate([dataset, column_dataset]))) > 1
    if masks.same_document:
        is_masked |= _meets_its_documents(documents, positive, column_documents)

    def tensor(values: np.ndarray, dtype: type) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(values, dtype=dtype))

    rows = Rows(
        query=tensor(query, np.int32),
        positive=tensor(positive, np.int64),
        weight=tensor(weight, np.float32),
        in_batch=tensor(in_batch, np.bool_),
        dataset=tensor(dataset, np.int32),
        documents=tensor(documents, np.int32),
        is_masked=tensor(is_masked, np.bool_),
    )
    columns = Columns(
        query=tensor(column_query, np.int32),
        hard=tensor(column_hard, np.bool_),
        shared=tensor(column_shared, np.bool_),
        dataset=tensor(column_dataset, np.int32),
        documents=tensor(column_documents, np.int32),
    )
    return rows, columns


def _meets_its_documents(documents: np.ndarray, positive: np.ndarray, column_documents: np.ndarray) -> np.ndarray:
    """Bool [a], whether a column other than the positive has one of the row's document ids (small non-negative)."""
    if documents.size == 0 or column_documents.size == 0:
        return np.zeros(len(documents), dtype=bool)
    count, width = column_documents.shape
    # A column that lists an id twice counts once.
    pairs = np.unique(column_documents.astype(np.int64) * count + np.arange(count)[:, None])
    columns_of = np.bincount(pairs // count, minlength=int(documents.max()) + 1)
    of_positive = np.where(positive[:, None] >= 0, column_documents[positive], -1)  # [a, width]
    is_positives = (documents[:, :, None] == of_positive[:, None, :]).any(2)
    return (columns_of[documents] > is_positives).any(1)


def _blocks(anchors: Tensor, candidates: Tensor, scale: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows: which, their anchors times the scale [r, D], and their scores [r, c].

    All scores lie in the same memory: that of a new block would first have to be mapped, and the small tensors that a
    loop keeps would break up the one just freed.
    """
    height = max(LEAST_ROWS, BLOCK_SCORES // max(1, len(candidates)))
    height = max(1, min(height, len(anchors)))
    memory = anchors.new_empty(height, len(candidates))
    for begin in range(0, len(anchors), height):
        block = slice(begin, min(begin + height, len(anchors)))
        scaled = anchors[block] * scale
        yield block, scaled, torch.mm(scaled, candidates.T, out=memory[: len(scaled)])


def score_rows(
    anchors: Tensor,
    candidates: Tensor,
    rows: Rows,
    columns: Columns,
    masks: Masks,
    scale: float,
    *,
    with_columns: bool,
) -> Found:
    """Losses and gradients of some rows against all columns.

    Args:
        anchors: float32 [a, D], unit vectors. `a` may be 0.
        candidates: float32 [c, D], unit vectors.
        rows, columns: on the same device; every row's positive is among the columns.
        masks: `margin` in cosines.
        scale: one over the temperature.
        with_columns: make `grad_columns` too, these rows' part of it.
    """
    masks = _in_scores(masks, scale)
    grad_anchors = torch.empty_like(anchors)
    grad_candidates = torch.zeros_like(candidates) if with_columns else None
    every = Softmax(anchors.new_empty(len(anchors)), anchors.new_empty(len(anchors)))
    loss, correct = anchors.new_zeros(()), anchors.new_zeros(())
    for block, scaled, scores in _blocks(anchors, candidates, scale):
        some = rows[block]
        softmax, best = _softmax_gradient_(scores, some, columns, masks)
        weight = some.weight.to(anchors.dtype)
        loss += (weight * (softmax.log_sum - softmax.of_positive)).sum()
        correct += (weight * (best <= softmax.of_positive)).sum()
        every.log_sum[block], every.of_positive[block] = softmax.log_sum, softmax.of_positive
        torch.mm(scores, candidates, out=grad_anchors[block]).mul_((weight * scale)[:, None])
        if grad_candidates is not None:
            grad_candidates.addmm_(scores.T, scaled * weight[:, None])
    return Found(
        loss=loss,
        correct=correct,
        softmax=every,
        grad_rows=grad_anchors,
        grad_columns=grad_candidates,
        # A score is the scale times a product with the anchor, so its derivative to log(scale) is the score itself.
        grad_log_scale=(anchors * grad_anchors).sum(),
    )


def score_columns(
    anchors: Tensor,
    candidates: Tensor,
    rows: Rows,
    columns: Columns,
    masks: Masks,
    scale: float,
    softmax: Softmax,
) -> Tensor:
    """Gradient of all rows' losses to some columns: [c, D]. The sum of what every rank's `score_rows` says of them.

    Args:
        anchors: float32 [a, D], those of all rows.
        candidates: float32 [c, D], some of the columns.
        rows: `positive` counts among these columns, -1 for a positive elsewhere.
        columns: of the candidates.
        masks: `margin` in cosines.
        scale: one over the temperature.
        softmax: of each row over all columns.
    """
    masks = _in_scores(masks, scale)
    grad_candidates = torch.zeros_like(candidates)
    if len(candidates) == 0:
        return grad_candidates
    for block, scaled, scores in _blocks(anchors, candidates, scale):
        some = rows[block]
        _softmax_gradient_(scores, some, columns, masks, softmax[block])
        grad_candidates.addmm_(scores.T, scaled * some.weight.to(anchors.dtype)[:, None])
    return grad_candidates


def _in_scores(masks: Masks, scale: float) -> Masks:
    """The same masks with the margin in units of the scores."""
    return masks if masks.margin is None else replace(masks, margin=masks.margin * scale)


def why_no_kernel(device_type: str, dtype: torch.dtype) -> str:
    """Why torch computes the softmax of scores and its gradient, and not the Triton kernel; empty where that does."""
    if device_type != "cuda":
        return "the kernel needs a CUDA device"
    if dtype != torch.float32:
        return f"the kernel takes float32 scores, and not {dtype}"
    return "" if _has_triton() else "Triton is not installed"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _softmax_gradient_(
    scores: Tensor, rows: Rows, columns: Columns, masks: Masks, known: Softmax | None = None
) -> tuple[Softmax, Tensor | None]:
    """`reference.softmax_gradient_`, by the Triton kernel where it can."""
    if why_no_kernel(scores.device.type, scores.dtype):
        softmax_gradient_ = reference.softmax_gradient_
    else:
        from nvembed_mcore.kernels.info_nce import softmax_gradient_
    return softmax_gradient_(scores, rows, columns, masks, known)
