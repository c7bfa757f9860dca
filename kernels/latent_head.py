"""What the pooling heads do between their matrix products, as Triton kernels; `reference_head` says the same in torch.

The products stay the library's. What is between them is bound by memory, so a kernel is worth the bytes that it does
not move. Bytes for each number of a bfloat16 tensor, forward and backward, counted from the operations torch runs:

    group softmax    [T, A * R]   torch 20 + 24   here 4 + 6     float32 copies of logits, weights and gradients
    GEGLU            [T, 4H]      torch 10 + 26   here 6 + 10    gelu(gate) and its gradients on their own, and a copy
    pooling          [T, H]       torch 18 + 22   here 2 + 2     a float32 copy, weighted, then added up by atomics

A graph keeps less, too: the logits instead of the softmax in float32 (2 bytes a number, not 4), nothing of gelu(gate)
(2 bytes a number of [T, 4H] less), and no order of addition changes from run to run. The norm of the pooled vectors
moves next to nothing, but is a launch each way instead of some eight and twenty.

The fold's own products are float32: 24 R H A w operations a pack with the backward pass (w the width of a head), or
1.65e12 with NV-Embed's sizes. By an H200's data sheet that is 25 ms in plain float32 (67 TFLOP/s) and 3.3 ms in TF32
(494). Weights of half precision are exact in TF32, and what it takes off the other side, 2^-10 at most, is less than
what the cast behind the fold does, 2^-9.

Residual and LayerNorm are not fused: one pass instead of two saves 2 bytes of 10 forward, which is no kernel's worth.

Letters: `T` tokens, `A` heads, `R` latents, `F` width of the feed-forward, `H` hidden size, `B` sequences of a pack.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

AT_ONCE = 4096
"""Numbers that a program of the group softmax or of GEGLU holds, 32 a thread: a load of 16 bytes and enough on its way
to keep the memory busy."""
ROWS, COLUMNS = 32, 128
"""Tile of a sequence's states: 256 bytes of 32 tokens."""


@triton.jit
def _softmax(logits, places, inside):
    """Softmax over the rows of a tile, in float32; columns that are not `inside` get no weight."""
    values = tl.load(logits + places, mask=inside, other=float("-inf")).to(tl.float32)
    weights = tl.exp(values - tl.max(values, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _group_softmax(logits, result, num_groups, SIZE: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    groups = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    columns = tl.arange(0, BLOCK)[None]
    # A row that is outside repeats the last one: of nothing but minus infinity, the maximum would make NaN.
    places = tl.minimum(groups, num_groups - 1) * SIZE + columns
    weights = _softmax(logits, places, columns < SIZE)
    tl.store(result + places, weights, mask=(columns < SIZE) & (groups < num_groups))


@triton.jit
def _group_softmax_backward(
    logits, upstream, result, num_groups, SIZE: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr
):
    """From the logits again: of weights rounded to half precision, where one is almost 1, nothing would be right."""
    groups = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]
    columns = tl.arange(0, BLOCK)[None]
    places = tl.minimum(groups, num_groups - 1) * SIZE + columns
    weights = _softmax(logits, places, columns < SIZE)
    above = tl.load(upstream + places, mask=columns < SIZE, other=0.0).to(tl.float32)
    gradient = weights * (above - tl.sum(weights * above, 1)[:, None])
    tl.store(result + places, gradient, mask=(columns < SIZE) & (groups < num_groups))


@triton.jit
def _half_of_row(width, BLOCK: tl.constexpr):
    """(place of a block in a row of the projection, in a row of the product, which of its columns exist)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return row * 2 * width + columns, row * width + columns, columns < width


@triton.jit
def _geglu(projected, result, width, BLOCK: tl.constexpr):
    value_at, result_at, inside = _half_of_row(width, BLOCK)
    value = tl.load(projected + value_at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(projected + value_at + width, mask=inside, other=0.0).to(tl.float32)
    below = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))  # the normal distribution's share below the gate
    tl.store(result + result_at, value * gate * below, mask=inside)


@triton.jit
def _geglu_backward(projected, upstream, result, width, BLOCK: tl.constexpr):
    value_at, upstream_at, inside = _half_of_row(width, BLOCK)
    value = tl.load(projected + value_at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(projected + value_at + width, mask=inside, other=0.0).to(tl.float32)
    above = tl.load(upstream + upstream_at, mask=inside, other=0.0).to(tl.float32)
    below = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    density = tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    tl.store(result + value_at, above * gate * below, mask=inside)
    tl.store(result + value_at + width, above * value * (below + gate * density), mask=inside)


@triton.jit
def _segment_sum(states, weights, bounds, result, hidden, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A block of columns of one sequence's sum, token after token in an order that is always the same."""
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None]
    begin, end = tl.load(bounds + segment), tl.load(bounds + segment + 1)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(begin, end, ROWS):
        tokens = first + tl.arange(0, ROWS)[:, None]
        inside = (tokens < end) & (columns < hidden)
        weight = tl.load(weights + tokens, mask=tokens < end, other=0.0)
        total += weight * tl.load(states + tokens * hidden + columns, mask=inside, other=0.0).to(tl.float32)
    places = segment * hidden + tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS) < hidden
    tl.store(result + places, tl.sum(total, 0), mask=inside)


@triton.jit
def _spread(upstream, weights, bounds, result, hidden, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The other way: each token's gradient is its weight times that of its sequence."""
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None]
    begin, end = tl.load(bounds + segment), tl.load(bounds + segment + 1)
    above = tl.load(upstream + segment * hidden + columns, mask=columns < hidden, other=0.0)
    for first in range(begin, end, ROWS):
        tokens = first + tl.arange(0, ROWS)[:, None]
        weight = tl.load(weights + tokens, mask=tokens < end, other=0.0)
        tl.store(result + tokens * hidden + columns, weight * above, mask=(tokens < end) & (columns < hidden))


@triton.jit
def _unit(vectors, result, norms, hidden, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    vector = tl.load(vectors + row * hidden + columns, mask=columns < hidden, other=0.0)
    norm = tl.maximum(tl.sqrt(tl.sum(vector * vector, 0)), 1e-12)  # as torch's normalize has it
    tl.store(norms + row, norm)
    tl.store(result + row * hidden + columns, vector / norm, mask=columns < hidden)


@triton.jit
def _unit_backward(units, norms, upstream, result, hidden, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    unit = tl.load(units + row * hidden + columns, mask=columns < hidden, other=0.0)
    above = tl.load(upstream + row * hidden + columns, mask=columns < hidden, other=0.0)
    gradient = (above - tl.sum(unit * above, 0) * unit) / tl.load(norms + row)
    tl.store(result + row * hidden + columns, gradient, mask=columns < hidden)


@contextmanager
def _tensor_float32() -> Iterator[None]:
    """Let float32 products run on tensor cores."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _FoldProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        with _tensor_float32():
            return left @ right

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        with _tensor_float32():
            return upstream @ right.mT, left.mT @ upstream


class _GroupSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, groups: int) -> Tensor:
        logits, result = logits.contiguous(), torch.empty_like(logits, memory_format=torch.contiguous_format)
        ctx.save_for_backward(logits)
        ctx.groups = groups
        grid, sizes = _softmax_grid(logits, groups)
        _group_softmax[grid](logits, result, logits.size(0) * groups, **sizes)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        result = torch.empty_like(logits)
        grid, sizes = _softmax_grid(logits, ctx.groups)
        _group_softmax_backward[grid](logits, upstream.contiguous(), result, logits.size(0) * ctx.groups, **sizes)
        return result, None


def _softmax_grid(logits: Tensor, groups: int) -> tuple[tuple[int], dict[str, int]]:
    size = logits.size(1) // groups
    block = triton.next_power_of_2(size)
    at_once = max(1, AT_ONCE // block)
    return (triton.cdiv(logits.size(0) * groups, at_once),), dict(SIZE=size, GROUPS=at_once, BLOCK=block)


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, projected: Tensor) -> Tensor:
        projected = projected.contiguous()
        ctx.save_for_backward(projected)
        rows, width = projected.size(0), projected.size(1) // 2
        result = projected.new_empty(rows, width)
        grid, block = _geglu_grid(rows, width)
        _geglu[grid](projected, result, width, BLOCK=block)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> Tensor:
        (projected,) = ctx.saved_tensors
        result, (rows, width) = torch.empty_like(projected), upstream.shape
        grid, block = _geglu_grid(rows, width)
        _geglu_backward[grid](projected, upstream.contiguous(), result, width, BLOCK=block)
        return result


def _geglu_grid(rows: int, width: int) -> tuple[tuple[int, int], int]:
    block = min(AT_ONCE, triton.next_power_of_2(width))
    return (rows, triton.cdiv(width, block)), block


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states: Tensor, weights: Tensor, bounds: Tensor) -> Tensor:
        ctx.save_for_backward(weights, bounds)
        ctx.shape, ctx.dtype = states.shape, states.dtype
        return _sums(states, weights, bounds)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        return _spread_out(upstream.contiguous(), *ctx.saved_tensors, ctx.shape, ctx.dtype), None, None


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states: Tensor, weights: Tensor, bounds: Tensor) -> Tensor:
        vectors = _sums(states, weights, bounds)
        norms = vectors.new_empty(len(vectors))
        hidden = vectors.size(1)
        # In place: a program holds all of its row before it writes.
        _unit[(len(vectors),)](vectors, vectors, norms, hidden, BLOCK=triton.next_power_of_2(hidden))
        ctx.save_for_backward(weights, bounds, vectors, norms)
        ctx.shape, ctx.dtype = states.shape, states.dtype
        return vectors

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        weights, bounds, units, norms = ctx.saved_tensors
        gradient, hidden = torch.empty_like(units), units.size(1)
        block = triton.next_power_of_2(hidden)
        _unit_backward[(len(units),)](units, norms, upstream.contiguous(), gradient, hidden, BLOCK=block)
        return _spread_out(gradient, weights, bounds, ctx.shape, ctx.dtype), None, None


def _sums(states: Tensor, weights: Tensor, bounds: Tensor) -> Tensor:
    num_segments, hidden = len(bounds) - 1, states.size(1)
    result = states.new_empty(num_segments, hidden, dtype=torch.float32)
    grid = (num_segments, triton.cdiv(hidden, COLUMNS))
    _segment_sum[grid](states.contiguous(), weights, bounds, result, hidden, ROWS=ROWS, COLUMNS=COLUMNS)
    return result


def _spread_out(upstream: Tensor, weights: Tensor, bounds: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    result = upstream.new_empty(shape, dtype=dtype)
    grid = (len(upstream), triton.cdiv(shape[1], COLUMNS))
    _spread[grid](upstream, weights, bounds, result, shape[1], ROWS=ROWS, COLUMNS=COLUMNS)
    return result


def _bounds(segment_ids: Tensor, num_segments: int) -> Tensor:
    """Int64 [B + 1], where each sequence's tokens begin among those here, and where the last one's end."""
    return torch.searchsorted(segment_ids, torch.arange(num_segments + 1, device=segment_ids.device))


def fold_product(left: Tensor, right: Tensor) -> Tensor:
    """`reference_head.fold_product` in TF32, for matrices one of which comes from half precision."""
    return _FoldProduct.apply(left, right)


def group_softmax(logits: Tensor, groups: int) -> Tensor:
    """`reference_head.group_softmax`, forward and backward a pass each."""
    return _GroupSoftmax.apply(logits, groups)


def geglu(projected: Tensor) -> Tensor:
    """`reference_head.geglu`, forward and backward a pass each."""
    return _Geglu.apply(projected.flatten(0, -2)).unflatten(0, projected.shape[:-1])


def segment_sum(states: Tensor, weights: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    """`reference_head.segment_sum`, without its copies and in a fixed order."""
    return _SegmentSum.apply(states, weights, _bounds(segment_ids, num_segments))


def pool(states: Tensor, weights: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    """`reference_head.pool`, two launches each way."""
    return _Pool.apply(states, weights, _bounds(segment_ids, num_segments))
