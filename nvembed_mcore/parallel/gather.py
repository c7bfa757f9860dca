"""The data-path collectives of our own: embeddings of all data-parallel ranks, and numbers that every rank needs.

Letters: `W` data-parallel size, `N` texts of the global batch, `n` texts of one rank, `D` embedding size.

The gradient contract (docs/design.md). A rank computes the loss of the query rows that it holds against all
passages, as `(W / Q)` times the sum over its rows. The backward of the gather sums what every rank has to say about
an embedding and hands it to the embedding's owner. Megatron's data parallelism then divides parameter gradients by
`W`. Together: the gradient of the mean over all `Q` rows, as one process holding the batch has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from nvembed_mcore.parallel.groups import Groups


class _GatherRows(torch.autograd.Function):
    """Padded all-gather of rows into global order; backward is a reduce-scatter SUM."""

    @staticmethod
    def forward(ctx, local: torch.Tensor, slots: torch.Tensor, rows: int, group: dist.ProcessGroup) -> torch.Tensor:
        padded = local.new_zeros(rows, local.size(1))
        padded[: local.size(0)] = local
        gathered = local.new_empty(group.size() * rows, local.size(1))
        dist.all_gather_into_tensor(gathered, padded, group=group)
        ctx.save_for_backward(slots)
        ctx.rows, ctx.count, ctx.group = rows, local.size(0), group
        return gathered[slots]

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (slots,) = ctx.saved_tensors
        padded = grad.new_zeros(ctx.group.size() * ctx.rows, grad.size(1))
        padded[slots] = grad
        local = grad.new_empty(ctx.rows, grad.size(1))
        dist.reduce_scatter_tensor(local, padded, op=dist.ReduceOp.SUM, group=ctx.group)
        return local[: ctx.count], None, None, None


def gather_embeddings(local: torch.Tensor, owned: Sequence[np.ndarray], group: dist.ProcessGroup) -> torch.Tensor:
    """All embeddings of the global batch, in global order.

    Args:
        local: float32 [n, D], this rank's embeddings in the order of `owned[rank]`. `n` may be 0 and may differ
            between ranks.
        owned: for each rank of `group`, int64 [n of that rank], the global numbers of its texts. Together they are
            a permutation of 0..N-1; every rank passes the same.
        group: the data-parallel group of the last pipeline stage. Never the default group.

    Returns:
        float32 [N, D]. Its backward gives this rank the sum over ranks of the gradient of its own rows.
    """
    rows = max(1, max(len(numbers) for numbers in owned))
    slots = torch.empty(sum(len(numbers) for numbers in owned), dtype=torch.long)
    for rank, numbers in enumerate(owned):
        slots[torch.as_tensor(numbers, dtype=torch.long)] = rank * rows + torch.arange(len(numbers))
    return _GatherRows.apply(local, slots.to(local.device), rows, group)


def sum_over_data_ranks(values: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Sum a vector over the data-parallel ranks (in place); returns it."""
    dist.all_reduce(values, group=groups.dp)
    return values


def share_from_last_stage(values: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Give every pipeline stage the last stage's numbers (in place); returns them."""
    if groups.pp_size > 1:
        dist.broadcast(values, src=dist.get_global_rank(groups.pp, groups.pp_size - 1), group=groups.pp)
    return values
