"""Counts the collectives of a step: how many, in which group, of how many bytes, and for how long."""

from __future__ import annotations

import time
from collections import Counter

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from nvembed_mcore import device
from nvembed_mcore.parallel.groups import Groups


class Traffic(TorchDispatchMode):
    """While it is active, the collectives and sends of this process are counted (those of `_KINDS`).

        with Traffic(groups) as traffic:
            step(...)
        traffic.calls[("reduce_scatter", "data")], traffic.bytes[("reduce_scatter", "data")]

    Bytes are those of the tensors that this rank hands in: of an all-gather its own part, of a reduce-scatter the
    whole. A hand-over between pipeline stages counts where it is sent. Groups of one process do not count.

    Attributes:
        groups: names of all groups, in the same order on every rank.
        seconds: by group, if they are wanted: from where this rank has nothing else to do to the end of each
            collective, the wait for other ranks included. Sends are not waited for: their receiver may not be there.
            So what TransformerEngine sends round over context-parallel ranks is not in these.
    """

    def __init__(self, groups: Groups, is_timed: bool = False) -> None:
        """
        Args:
            is_timed: wait for each collective as soon as it begins, so that nothing overlaps.
        """
        super().__init__()
        self._is_timed = is_timed
        self.seconds: Counter[str] = Counter()
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
        self.groups = [*dimensions, "all"]
        # Where two dimensions have the same ranks, the first name counts.
        self._names: dict[tuple[int, ...], str] = {}
        for name, group in dimensions.items():
            self._names.setdefault(tuple(dist.get_process_group_ranks(group)), name)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        group = None
        if function.namespace == "c10d" and function._opname in _KINDS:
            group = self._count(function, args)
        if group is None or not self._is_timed or function._opname == "send":
            return function(*args, **(kwargs or {}))
        device.synchronize()
        begin = time.perf_counter()
        result = function(*args, **(kwargs or {}))
        work = result[-1] if isinstance(result, tuple) else result
        dist.Work.unbox(work).wait()
        device.synchronize()
        self.seconds[group] += time.perf_counter() - begin
        return result

    def _count(self, function, args: tuple) -> str | None:
        """The group's name; None where it has one process only."""
        named = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False))
        ranks = tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(named["process_group"])))
        if len(ranks) == 1:
            return None
        kind, tensors = _KINDS[function._opname]
        key = (kind, self._names.get(ranks, "all"))
        self.calls[key] += 1
        self.bytes[key] += sum(tensor.nbytes for tensor in _flat(named[tensors]))
        return key[1]

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
