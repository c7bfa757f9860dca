"""Counts the collectives of a step: how many, in which group, of how many bytes."""

from __future__ import annotations

from collections import Counter

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from nvembed_mcore.parallel.groups import Groups


class Traffic(TorchDispatchMode):
    """While it is active, the collectives and sends of this process are counted (those of `_KINDS`).

        with Traffic(groups) as traffic:
            step(...)
        traffic.calls[("reduce_scatter", "data")], traffic.bytes[("reduce_scatter", "data")]

    Bytes are those of the tensors that this rank hands in: of an all-gather its own part, of a reduce-scatter the
    whole. A hand-over between pipeline stages counts where it is sent. Groups of one process do not count.
    """

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        dimensions = {
            "data": groups.dp,
            "tensor": groups.tp,
            "pipeline": groups.pp,
            "context": groups.cp,
            "model": groups.collection.mp,
            "data and context": groups.dp_cp,
            "tensor and context": groups.tp_cp,
        }
        # Where two dimensions have the same ranks, the first name counts.
        self._names: dict[tuple[int, ...], str] = {}
        for name, group in dimensions.items():
            self._names.setdefault(tuple(dist.get_process_group_ranks(group)), name)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" and function._opname in _KINDS:
            self._count(function, args)
        return function(*args, **(kwargs or {}))

    def _count(self, function, args: tuple) -> None:
        named = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False))
        ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(named["process_group"])))
        if len(ranks) == 1:
            return
        kind, tensors = _KINDS[function._opname]
        key = (kind, self._names.get(ranks, "all"))
        self.calls[key] += 1
        self.bytes[key] += sum(tensor.nbytes for tensor in _flat(named[tensors]))

    def table(self) -> str:
        """One line for each kind of collective and group."""
        lines = [
            f"  {kind} over {group} ranks: {calls} x, {self.bytes[kind, group] / 1e6:.3f} MB"
            for (kind, group), calls in sorted(self.calls.items())
        ]
        return "\n".join(lines) or "  none"


# Operation -> what it is called in the table, and the argument that holds what this rank hands in.
_KINDS = {
    "allreduce_": ("all_reduce", "tensors"),
    "allreduce_coalesced_": ("all_reduce", "tensors"),
    "allgather_": ("all_gather", "input_tensors"),
    "_allgather_base_": ("all_gather", "input_tensor"),
    "allgather_into_tensor_coalesced_": ("all_gather", "inputs"),
    "reduce_scatter_": ("reduce_scatter", "input_tensors"),
    "_reduce_scatter_base_": ("reduce_scatter", "input_tensor"),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", "inputs"),
    "alltoall_base_": ("all_to_all", "input"),
    "broadcast_": ("broadcast", "tensors"),
    "send": ("send", "tensors"),
}


def _flat(value) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [tensor for part in value for tensor in _flat(part)]
