"""The only data-path collectives of ours.

Letters: `N` rows in global order, `n` rows of one rank, `D` row width.

The gradient contract (docs/design.md). A rank scores the rows that it holds against all embeddings; what every rank
has to say about an embedding is summed and handed to the embedding's owner, or made there anew. A rank's gradients
are those of `(W / Q)` times the sum of losses, and Megatron's data parallelism divides by `W`: together the gradient
of the mean over all `Q` queries, as one process holding the batch has it.
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


def _slots(owned: Sequence[np.ndarray]) -> tuple[torch.Tensor, int]:
    """Where each global row stands when every rank's are padded to the most that one has: int64 [N], and that most."""
    rows = max(1, max(len(numbers) for numbers in owned))
    slots = torch.empty(sum(len(numbers) for numbers in owned), dtype=torch.long)
    for rank, numbers in enumerate(owned):
        slots[torch.as_tensor(numbers, dtype=torch.long)] = rank * rows + torch.arange(len(numbers))
    return slots, rows


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
