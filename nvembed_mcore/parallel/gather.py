"""The only data-path collectives of ours.

Letters: `N` rows in global order, `n` rows of one rank, `D` row width, `C` context-parallel size, `t` tokens of a
context-parallel rank, `S` tokens of the pack that they share.

The gradient contract (docs/design.md). A rank scores the rows that it holds against all embeddings; what every rank
has to say about an embedding is summed and handed to the embedding's owner, or made there anew. A rank's gradients
are those of `(W / Q)` times the sum of losses, and Megatron's data parallelism divides by `W`: together the gradient
of the mean over all `Q` queries, as one process holding the batch has it.

Under context parallelism C ranks hold the same texts, score the same, and each pushes back through its own tokens all
of `dL/dE`. Megatron divides by `W * C`; C of that is undone where the ranks' sums over tokens are added.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from nvembed_mcore.parallel.groups import Groups


def gather_rows(local: torch.Tensor, owned: Sequence[np.ndarray], group: dist.ProcessGroup) -> torch.Tensor:
    """Rows of all ranks in global order; no gradient flows through.

    Args:
        local: [n, D], this rank's rows in the order of `owned[rank]`. `n` may be 0 and may differ between ranks.
        owned: for each rank of `group`, int64 [n of that rank], the global numbers of its rows. Together they are
            a permutation of 0..N-1; every rank passes the same.
        group: the data-parallel group of the last pipeline stage. Never the default group.

    Returns:
        [N, D], the dtype of `local`.
    """
    slots, rows = _slots(owned)
    padded = local.new_zeros(rows, local.size(1))
    padded[: local.size(0)] = local
    gathered = local.new_empty(group.size() * rows, local.size(1))
    dist.all_gather_into_tensor(gathered, padded, group=group)
    return gathered[slots.to(local.device)]


def scatter_sum(values: torch.Tensor, owned: Sequence[np.ndarray], group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over ranks of their `values`, to each rank its own rows: the adjoint of `gather_rows`.

    Args:
        values: [N, D], in global order, another on each rank.
        owned, group: as in `gather_rows`.

    Returns:
        [n, D], in the order of `owned[rank]`.
    """
    slots, rows = _slots(owned)
    padded = values.new_zeros(group.size() * rows, values.size(1))
    padded[slots.to(values.device)] = values
    local = values.new_empty(rows, values.size(1))
    dist.reduce_scatter_tensor(local, padded, op=dist.ReduceOp.SUM, group=group)
    return local[: len(owned[group.rank()])]


def deal_rows(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """What all ranks have of this rank's share of the rows: the ranks' first dimension transposed.

    Args:
        values: [Q, ...], contiguous, another on each rank; the shape is the same on all.
        group: as in `gather_rows`.

    Returns:
        [ranks, q, ...]: rows `shares(Q, ranks)[rank]` of every rank.
    """
    ranks = group.size()
    rows = max(1, -(-len(values) // ranks))
    padded = values.new_zeros(ranks * rows, *values.shape[1:])
    padded[: len(values)] = values
    dealt = torch.empty_like(padded)
    dist.all_to_all_single(dealt, padded, group=group)
    return dealt.unflatten(0, (ranks, rows))[:, : len(shares(len(values), ranks)[group.rank()])]


def shares(num_rows: int, ranks: int) -> list[np.ndarray]:
    """Numbers of the rows of each rank where they are dealt out in stretches: int64; the last ones may have fewer."""
    rows = max(1, -(-num_rows // ranks))
    return [np.arange(min(num_rows, rank * rows), min(num_rows, (rank + 1) * rows)) for rank in range(ranks)]


def _slots(owned: Sequence[np.ndarray]) -> tuple[torch.Tensor, int]:
    """Where each global row stands when every rank's are padded to the most that one has: int64 [N], and that most."""
    rows = max(1, max(len(numbers) for numbers in owned))
    slots = torch.empty(sum(len(numbers) for numbers in owned), dtype=torch.long)
    for rank, numbers in enumerate(owned):
        slots[torch.as_tensor(numbers, dtype=torch.long)] = rank * rows + torch.arange(len(numbers))
    return slots, rows


class _GatheredTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local: torch.Tensor, rows: torch.Tensor, group: dist.ProcessGroup):
        ctx.rows, ctx.group = rows, group
        gathered = local.new_empty(group.size() * local.size(0), *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
        ctx.shape = gathered.shape
        return gathered.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        gathered = grad.new_zeros(ctx.shape).index_copy_(0, ctx.rows, grad)
        local = grad.new_empty(ctx.shape[0] // ctx.group.size(), *ctx.shape[1:])
        dist.reduce_scatter_tensor(local, gathered, op=dist.ReduceOp.SUM, group=ctx.group)
        return local, None, None


def gather_tokens(local: torch.Tensor, rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """States of a whole pack on each of the context-parallel ranks that share it.

    The gradient is the exact adjoint: what all ranks say of a token is summed and handed to the rank that has it.

    Args:
        local: [t, ...], those of this rank's tokens; t is the same on all ranks.
        rows: int64 [S], which of the C * t rows, one rank's behind the other's, are wanted, each at most once.
        group: the context-parallel group.

    Returns:
        [S, ...].
    """
    return _GatheredTokens.apply(local, rows, group)


class _SummedOverContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: torch.Tensor, group: dist.ProcessGroup):
        ctx.size = group.size()
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad * ctx.size, None


def sum_over_context(values: torch.Tensor, groups: Groups) -> torch.Tensor:
    """The sum of `values` over the context-parallel ranks, which all go on alike with it.

    The adjoint sums the ranks' gradients. These are equal, so it multiplies by C and sends nothing.
    """
    return _SummedOverContext.apply(values, groups.cp) if groups.cp_size > 1 else values


def sum_over_token_parts(values: torch.Tensor, groups: Groups, *, is_split: bool) -> torch.Tensor:
    """Sum a vector (in place) over the ranks that have parts of the same packs' tokens; returns it.

    Args:
        is_split: whether tensor ranks have a part each (sequence parallelism), besides context-parallel ones.
    """
    if is_split or groups.cp_size > 1:
        dist.all_reduce(values, group=groups.tp_cp if is_split else groups.cp)
    return values


def sum_over_data_ranks(values: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Sum a vector over the data-parallel ranks (in place); returns it."""
    dist.all_reduce(values, group=groups.dp)
    return values


def share_from_last_stage(values: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Give every pipeline stage the last stage's numbers (in place); returns them."""
    if groups.pp_size > 1:
        dist.broadcast(values, src=dist.get_global_rank(groups.pp, groups.pp_size - 1), group=groups.pp)
    return values


def smallest_on_all(value: float, where: torch.device) -> float:
    """The smallest of all ranks' numbers, on every rank of the run."""
    found = torch.tensor([value], dtype=torch.float64, device=where)
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return float(found)


def numbers_of_all(values: Sequence[float]) -> torch.Tensor:
    """A few numbers of every rank of the run on every rank: float64 [ranks, numbers], over gloo."""
    own = torch.tensor(values, dtype=torch.float64, device="cpu")
    found = torch.empty(dist.get_world_size(), len(own), dtype=torch.float64, device="cpu")
    dist.all_gather(list(found.unbind()), own)
    return found
