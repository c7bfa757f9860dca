"""The block of InfoNCE as one Triton kernel: `reference.softmax_gradient_` without its intermediate tensors.

Plain torch reads and writes the block four to nine times (masks, maximum, softmax, one taken off at the positive).
Here a program owns a row, reads it twice and writes it once, in bfloat16 where the products are made in it; ids are
compared in registers. The matrix products around it stay the library's, which no kernel of ours beats.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvembed_mcore.kernels.reference import Columns, Masks, Rows, Softmax

MOST_COLUMNS = 2048
"""Columns that a program holds at a time: with 4096, registers would do for one program a multiprocessor only (what
ptxas says for an H100: 214 a thread, with 2048 112)."""

NUM_WARPS = 8


@triton.jit
def _allowed(
    columns, inside, scores, of_positive, query, positive, in_batch, dataset, row_documents,
    column_query, column_hard, column_shared, column_dataset, column_documents, margin,
    ROW_DOCUMENTS: tl.constexpr, COLUMN_DOCUMENTS: tl.constexpr,
    SAME_DOCUMENT: tl.constexpr, SAME_DATASET: tl.constexpr, HAS_MARGIN: tl.constexpr,
):  # fmt: skip
    """Which of the `columns` take part in one row's softmax."""
    is_own = tl.load(column_query + columns, mask=inside, other=-1) == query
    hard = tl.load(column_hard + columns, mask=inside, other=0) != 0
    others = (tl.load(column_shared + columns, mask=inside, other=0) != 0) & (in_batch != 0)
    if SAME_DATASET:
        others = others & (tl.load(column_dataset + columns, mask=inside, other=-1) == dataset)
    if HAS_MARGIN:
        others = others & (scores <= of_positive + margin)
    result = (is_own & hard) | (others & (is_own == 0))
    if SAME_DOCUMENT:
        for i in range(ROW_DOCUMENTS):
            mine = tl.load(row_documents + i)
            for j in range(COLUMN_DOCUMENTS):
                theirs = tl.load(column_documents + columns * COLUMN_DOCUMENTS + j, mask=inside, other=-1)
                result = result & (theirs != mine)
    return (result | (columns == positive)) & inside


@triton.jit
def _softmax_gradient(
    scores, stride, gradient, gradient_stride, num_columns, margin,
    row_query, row_positive, row_in_batch, row_dataset, row_documents, row_is_masked,
    column_query, column_hard, column_shared, column_dataset, column_documents,
    log_sum_out, of_positive_out, best_out,
    ROW_DOCUMENTS: tl.constexpr, COLUMN_DOCUMENTS: tl.constexpr,
    SAME_DOCUMENT: tl.constexpr, SAME_DATASET: tl.constexpr, HAS_MARGIN: tl.constexpr,
    IS_KNOWN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its softmax over the allowed columns (unless known), then softmax minus one at the positive."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * stride
    gradient += row * gradient_stride
    row_documents += row * ROW_DOCUMENTS
    query, positive = tl.load(row_query + row), tl.load(row_positive + row)
    in_batch, dataset = tl.load(row_in_batch + row), tl.load(row_dataset + row)
    is_masked = tl.load(row_is_masked + row) != 0
    if IS_KNOWN:
        of_positive, best, total = tl.load(of_positive_out + row), tl.load(log_sum_out + row), 1.0
    else:
        of_positive = tl.load(scores + positive)
        best, total = of_positive, 1.0  # of the positive alone, which the blocks leave out
        for begin in range(0, num_columns, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            inside = columns < num_columns
            block = tl.load(scores + columns, mask=inside, other=float("-inf"))
            keep = inside
            if is_masked:
                keep = _allowed(
                    columns, inside, block, of_positive, query, positive, in_batch, dataset, row_documents,
                    column_query, column_hard, column_shared, column_dataset, column_documents, margin,
                    ROW_DOCUMENTS, COLUMN_DOCUMENTS, SAME_DOCUMENT, SAME_DATASET, HAS_MARGIN,
                )  # fmt: skip
            block = tl.where(keep & (columns != positive), block, float("-inf"))
            higher = tl.maximum(best, tl.max(block, 0))
            total = total * tl.exp(best - higher) + tl.sum(tl.exp(block - higher), 0)
            best = higher
        tl.store(log_sum_out + row, best + tl.log(total))
        tl.store(of_positive_out + row, of_positive)
        tl.store(best_out + row, best)
    for begin in range(0, num_columns, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        inside = columns < num_columns
        block = tl.load(scores + columns, mask=inside, other=float("-inf"))
        keep = inside
        if is_masked:
            keep = _allowed(
                columns, inside, block, of_positive, query, positive, in_batch, dataset, row_documents,
                column_query, column_hard, column_shared, column_dataset, column_documents, margin,
                ROW_DOCUMENTS, COLUMN_DOCUMENTS, SAME_DOCUMENT, SAME_DATASET, HAS_MARGIN,
            )  # fmt: skip
        # By way of the sum's logarithm, large scores would lose digits to it.
        weights = tl.where(keep, tl.exp(block - best) / total, 0.0)
        tl.store(gradient + columns, tl.where(columns == positive, weights - 1.0, weights), mask=inside)


def softmax_gradient_(
    scores: Tensor,
    rows: Rows,
    columns: Columns,
    masks: Masks,
    known: Softmax | None = None,
    *,
    gradient: Tensor | None = None,
) -> tuple[Softmax, Tensor | None]:
    """`reference.softmax_gradient_` for float32 scores [r, c] with contiguous rows; same arguments and results.

    Where `gradient` has memory of its own, the scores stay as they are.
    """
    gradient = scores if gradient is None else gradient
    assert scores.dtype == torch.float32 and scores.stride(1) == 1, (scores.dtype, scores.stride())
    assert gradient.shape == scores.shape and gradient.stride(1) == 1, (gradient.shape, gradient.stride())
    num_rows, num_columns = scores.shape
    best = None if known is not None else scores.new_empty(num_rows)
    known = known and Softmax(known.log_sum.contiguous(), known.of_positive.contiguous())
    found = known or Softmax(scores.new_empty(num_rows), scores.new_empty(num_rows))
    if num_rows and num_columns:
        _softmax_gradient[(num_rows,)](
            scores, scores.stride(0), gradient, gradient.stride(0), num_columns, float(masks.margin or 0.0),
            rows.query, rows.positive, rows.in_batch, rows.dataset, rows.documents.contiguous(), rows.is_masked,
            columns.query, columns.hard, columns.shared, columns.dataset, columns.documents.contiguous(),
            found.log_sum, found.of_positive, found.log_sum if best is None else best,
            ROW_DOCUMENTS=rows.documents.size(1), COLUMN_DOCUMENTS=columns.documents.size(1),
            SAME_DOCUMENT=masks.same_document, SAME_DATASET=masks.same_dataset_only,
            HAS_MARGIN=masks.margin is not None, IS_KNOWN=known is not None,
            BLOCK=min(MOST_COLUMNS, triton.next_power_of_2(num_columns)), num_warps=NUM_WARPS,
        )  # fmt: skip
    return found, best
