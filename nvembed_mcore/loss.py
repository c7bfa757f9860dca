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

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nvembed_mcore.kernels import has_triton, reference
from nvembed_mcore.kernels.reference import Columns, Masks, Rows, Softmax

BLOCK_SCORES, CUDA_BLOCK_SCORES = 1 << 23, 1 << 27
"""Scores of one block on a CPU (32 MiB in float32) and on CUDA (512 MiB, and half as much for a bfloat16 gradient).

Each block reads and writes the columns' gradient once, 8 c D bytes beside 6 r c D operations: on an H200, at some 170
bfloat16 operations a byte, 220 rows take as long for the one as for the other; with 1024 the traffic is a fifth."""
LEAST_ROWS, TILE_ROWS = 64, 128
"""Rows of a block at least, however many columns there are: fewer make slow matrix products. More than TILE_ROWS are
whole multiples of it, as the library's products cut them."""


@dataclass(frozen=True)
class Found:
    """What `score_rows` finds, in float32 (of float64 embeddings, in float64).

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


@dataclass(frozen=True)
class _Block:
    """Some rows, and their scores against all columns.

    Attributes:
        rows: which.
        anchors: [r, D], and `factor`: what their products are multiplied by. Together the anchors times the scale.
        scores: [r, c], float32 or wider.
        gradient: [r, c], where that to the scores goes: the scores' own memory, or as bfloat16 beside it.
    """

    rows: slice
    anchors: Tensor
    factor: float
    scores: Tensor
    gradient: Tensor


def _blocks(anchors: Tensor, candidates: Tensor, scale: float, *, matrices: int = 1) -> Iterator[_Block]:
    """Blocks of rows with their scores; lower by so much that `matrices` of them take the memory of one.

    All scores lie in the same memory: that of a new block would first have to be mapped, and the small tensors that a
    loop keeps would break up the one just freed.
    """
    height = _height(anchors, matrices * len(candidates))
    wide = torch.promote_types(anchors.dtype, torch.float32)
    is_half = anchors.dtype != wide
    # Tensor cores want rows that begin at multiples of 16 bytes, and the kernel's loads at multiples of 16 numbers.
    width = -(-len(candidates) // 16) * 16 if anchors.is_cuda or is_half else len(candidates)
    memory = anchors.new_empty(height, width, dtype=wide)[:, : len(candidates)]
    gradients = anchors.new_empty(height, width)[:, : len(candidates)] if is_half else memory
    for begin in range(0, len(anchors), height):
        rows = slice(begin, min(begin + height, len(anchors)))
        # A scale in bfloat16 anchors would round them again.
        some, factor = (anchors[rows], scale) if is_half else (anchors[rows] * scale, 1.0)
        scores = _product_(memory[: len(some)], some, candidates.T, factor=factor)
        yield _Block(rows, some, factor, scores, gradients[: len(some)])


def _height(anchors: Tensor, num_columns: int) -> int:
    """Rows of a block."""
    most = CUDA_BLOCK_SCORES if anchors.is_cuda else BLOCK_SCORES
    height = max(LEAST_ROWS, most // max(1, num_columns))
    if anchors.is_cuda and height > TILE_ROWS:
        height -= height % TILE_ROWS
    return max(1, min(height, len(anchors)))


def _product_(out: Tensor, left: Tensor, right: Tensor, *, keep: float = 0.0, factor: float = 1.0) -> Tensor:
    """`out = keep * out + factor * left @ right`, in place; bfloat16 is added up in the dtype of `out`."""
    if left.dtype == out.dtype:
        return torch.addmm(out, left, right, beta=keep, alpha=factor, out=out)
    if out.is_cuda:
        return torch.addmm(out, left, right, out_dtype=out.dtype, beta=keep, alpha=factor, out=out)
    return torch.addmm(out, left.to(out.dtype), right.to(out.dtype), beta=keep, alpha=factor, out=out)


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
        anchors: float32 [a, D], unit vectors. `a` may be 0. In bfloat16, all products are made in it and added up in
            float32, and the gradient to the scores is rounded to it between them.
        candidates: [c, D], unit vectors, likewise.
        rows, columns: on the same device; every row's positive is among the columns.
        masks: `margin` in cosines.
        scale: one over the temperature.
        with_columns: make `grad_columns` too, these rows' part of it.
    """
    masks = _in_scores(masks, scale)
    wide = torch.promote_types(anchors.dtype, torch.float32)
    grad_anchors = torch.empty_like(anchors, dtype=wide)
    grad_candidates = torch.zeros_like(candidates, dtype=wide) if with_columns else None
    every = Softmax(grad_anchors.new_empty(len(anchors)), grad_anchors.new_empty(len(anchors)))
    loss, correct, grad_log_scale = (grad_anchors.new_zeros(()) for _ in range(3))
    for block in _blocks(anchors, candidates, scale):
        some = rows[block.rows]
        softmax, best = _softmax_gradient_(block, some, columns, masks)
        weight = some.weight.to(wide)
        loss += (weight * (softmax.log_sum - softmax.of_positive)).sum()
        correct += (weight * (best <= softmax.of_positive)).sum()
        every.log_sum[block.rows], every.of_positive[block.rows] = softmax.log_sum, softmax.of_positive
        grad = _product_(grad_anchors[block.rows], block.gradient, candidates).mul_((weight * scale)[:, None])
        # A score is the scale times a product with the anchor, so its derivative to log(scale) is the score itself.
        grad_log_scale += (anchors[block.rows] * grad).sum()
        if grad_candidates is not None:
            _add_to_columns_(grad_candidates, block, weight)
    return Found(
        loss=loss,
        correct=correct,
        softmax=every,
        grad_rows=grad_anchors,
        grad_columns=grad_candidates,
        grad_log_scale=grad_log_scale,
    )


def _add_to_columns_(grad_candidates: Tensor, block: _Block, weight: Tensor) -> None:
    """Add what a block's rows, of these weights, say of the columns [c, D]."""
    weighted = (block.anchors * weight[:, None]).to(block.anchors.dtype)
    _product_(grad_candidates, block.gradient.T, weighted, keep=1.0, factor=block.factor)


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
        anchors: [a, D], those of all rows; as in `score_rows`.
        candidates: [c, D], some of the columns.
        rows: `positive` counts among these columns, -1 for a positive elsewhere.
        columns: of the candidates.
        masks: `margin` in cosines.
        scale: one over the temperature.
        softmax: of each row over all columns.
    """
    masks = _in_scores(masks, scale)
    grad_candidates = torch.zeros_like(candidates, dtype=torch.promote_types(candidates.dtype, torch.float32))
    if len(candidates) == 0:
        return grad_candidates
    for block in _blocks(anchors, candidates, scale):
        some = rows[block.rows]
        _softmax_gradient_(block, some, columns, masks, softmax[block.rows])
        _add_to_columns_(grad_candidates, block, some.weight.to(grad_candidates.dtype))
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
    return "" if has_triton() else "Triton is not installed"


def _softmax_gradient_(
    block: _Block, rows: Rows, columns: Columns, masks: Masks, known: Softmax | None = None
) -> tuple[Softmax, Tensor | None]:
    """`reference.softmax_gradient_` of a block, by the Triton kernel where it can."""
    if why_no_kernel(block.scores.device.type, block.scores.dtype):
        softmax_gradient_ = reference.softmax_gradient_
    else:
        from nvembed_mcore.kernels.info_nce import softmax_gradient_
    return softmax_gradient_(block.scores, rows, columns, masks, known, gradient=block.gradient)
