"""The optimizer's part of a resume checkpoint: whole tensors in the shapes of the model's parameters.

Megatron's distributed optimizer gives each data-parallel rank one stretch of every bucket, so a rank has flat pieces
of parameters. Megatron's own reshardable format (0.16.1) gathers all of them on every rank, and stores wrong numbers
as soon as a bucket that is not the last one ends with padding: it leaves the padding out, and looks parameters up
where they are with it. Here a parameter is put together on the rank that has its first piece, which saves it, so a
rank holds little more than its own share; and a rank reads the parameters of which it has a piece.

What is stored depends neither on the layout nor on whether the optimizer is sharded: for each parameter `param` (the
optimizer's own float32 copy), `exp_avg` and `exp_avg_sq`, of a run with `optim.ema_decay` its `average` (ema.py), and
the settings and steps of the parameter groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys
from torch import Tensor

AVERAGE = "average"
"""What torch's optimizer has of a parameter besides its moments, in a run that averages its weights."""
_KEYS = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """The elements `begin` to `end` of a flattened parameter, and the rank (data and context) that updates them."""

    rank: int
    begin: int
    end: int


@dataclass(frozen=True)
class Trained:
    """A parameter of the model and who updates it.

    Attributes:
        pieces: in order; together they are the parameter.
        own: the piece of this rank; None: it updates nothing of the parameter.
        main: what this rank's optimizer updates: its piece, flat, or the whole; None as `own`.
        state: of torch's optimizer for `main`.
        group: data- and context-parallel, over gloo; None: every rank has the whole parameter.
    """

    parameter: Tensor
    pieces: list[Piece]
    own: Piece | None
    main: Tensor | None
    state: dict[str, Tensor]
    group: dist.ProcessGroup | None = None


def sharded_state(
    optimizer: MegatronOptimizer, weights: dict, *, is_loading: bool, has_average: bool = False
) -> dict[str, Any]:
    """What a checkpoint keeps of an optimizer, as `dist_checkpointing` takes it; every rank calls this.

    Args:
        weights: the model's sharded state, which says where each parameter stands.
        is_loading: whether it is to be filled from a checkpoint.
        has_average: whether that checkpoint has averaged weights.
    """
    places = places_of(weights)
    tensors = {}
    for one in trained(optimizer):
        place = places[id(one.parameter)]
        keys = (*_KEYS, AVERAGE) if AVERAGE in one.state or has_average else _KEYS
        values = _to_fill(one, len(keys)) if is_loading else _whole(one, place, keys)
        if values is not None:
            tensors[place.key] = {key: _at(place, one, key, value) for key, value in zip(keys, values, strict=True)}
    # TransformerEngine's Adam does not count in groups of which this rank has no parameter.
    step = max(group.get("step", 0) for group in optimizer.param_groups)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    state: dict[str, Any] = {"groups": [{**group, "step": step} for group in groups]}
    # An empty part would count as a value, in which this rank differs from others.
    return state | {"tensors": tensors} if tensors else state


@torch.no_grad()
def load(optimizer: MegatronOptimizer, weights: dict, state: dict[str, Any]) -> None:
    """Fill an optimizer with what `dist_checkpointing` loaded for `sharded_state`."""
    places = places_of(weights)
    for one in (one for one in trained(optimizer) if one.own is not None):
        for key, whole in state["tensors"][places[id(one.parameter)].key].items():
            if key != "param":
                one.state[key] = torch.empty_like(one.main, requires_grad=False)
            value = one.main if key == "param" else one.state[key]
            value.copy_(whole.flatten()[one.own.begin : one.own.end].view_as(value))
    saved = {_identity(group): group for group in state["groups"]}
    for group in optimizer.param_groups:
        group.update(saved[_identity(group)])


def _identity(group: dict[str, Any]) -> tuple:
    return tuple(group[key] for key in param_group_identifier_keys)


def places_of(weights: dict) -> dict[int, ShardedTensor | ShardedTensorFactory]:
    tensors, _ = extract_sharded_tensors_and_factories(weights)
    return {id(one.data): one for one in nested_values(tensors)}


def stored_name(key: str, name: str) -> str:
    """The name in a checkpoint of what the optimizer has of a parameter; `name`: that of the parameter there."""
    return f"optimizer.state.{key}.{name}"


def _at(
    place: ShardedTensor | ShardedTensorFactory, one: Trained, key: str, value: Tensor
) -> ShardedTensor | ShardedTensorFactory:
    """One of the optimizer's tensors, where its parameter stands."""
    copy = place.replica_id[2] if one.group is None else one.pieces.index(one.own)
    changes = {"key": stored_name(key, place.key), "replica_id": (*place.replica_id[:2], copy)}
    if isinstance(place, ShardedTensor):
        changes["dtype"] = value.dtype
    return replace(place, data=value, **changes)


def _to_fill(one: Trained, number: int) -> Tensor | None:
    """Room for a parameter of which this rank has a piece: float32 [number, *shape], in the host's memory."""
    return None if one.own is None else torch.empty((number, *one.parameter.shape))


def _whole(one: Trained, place: ShardedTensor | ShardedTensorFactory, keys: tuple[str, ...]) -> Tensor | None:
    """A parameter put together on the rank that has its first piece: float32 [keys, *shape], in the host's memory.

    None on other ranks, and where another tensor or data-parallel rank has the same.
    """
    if one.own is None or any(place.replica_id[: 3 if one.group is None else 2]):
        return None
    values = [one.main if key == "param" else one.state[key] for key in keys]
    parts = [torch.stack([value.detach().flatten().cpu() for value in values])]
    first, *others = one.pieces
    if one.own != first:
        dist.send(parts[0], group=one.group, group_dst=first.rank)
        return None
    for other in others:
        parts.append(torch.empty(len(keys), other.end - other.begin))
        dist.recv(parts[-1], group=one.group, group_src=other.rank)
    return torch.cat(parts, dim=1).view(len(keys), *one.parameter.shape)


def trained(optimizer: MegatronOptimizer) -> Iterator[Trained]:
    """Every parameter of this stage that trains, in the same order on all data-parallel ranks."""
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        yield from _of_sharded(one) if isinstance(one, DistributedOptimizer) else _of_whole(one)


def _of_sharded(optimizer: DistributedOptimizer) -> Iterator[Trained]:
    group = optimizer.data_parallel_group_gloo
    for buffer in optimizer.buffers:
        for parameter, (begin, end, _) in buffer.param_index_map.items():
            pieces = pieces_of(buffer.param_to_bucket[parameter], begin, end, group.size())
            own = next((piece for piece in pieces if piece.rank == group.rank()), None)
            main, state = None, {}
            if own is not None:
                place, number = optimizer.model_param_group_index_map[parameter]
                main = optimizer.optimizer.param_groups[place]["params"][number]
                state = optimizer.optimizer.state[main]
                assert main.numel() == own.end - own.begin, (main.shape, own)
            yield Trained(parameter, pieces, own, main, state, group)


def pieces_of(bucket: Any, begin: int, end: int, num_ranks: int) -> list[Piece]:
    """Of the parameter that stands at `begin` to `end` of a buffer. Ranks have equal shares of a bucket, in order."""
    share = bucket.grad_data.numel() // num_ranks
    found = []
    for rank in range((begin - bucket.offset) // share, (end - 1 - bucket.offset) // share + 1):
        first = max(begin, bucket.offset + rank * share)
        last = min(end, bucket.offset + (rank + 1) * share)
        found.append(Piece(rank, first - begin, last - begin))
    return found


def _of_whole(optimizer: MegatronOptimizer) -> Iterator[Trained]:
    # With bfloat16 weights the optimizer updates float32 copies.
    models = chain.from_iterable(getattr(optimizer, "float16_groups", []))
    mains = chain.from_iterable(getattr(optimizer, "fp32_from_float16_groups", []))
    parameter_of = {id(main): model for model, main in zip(models, mains, strict=True)}
    for main in chain.from_iterable(group["params"] for group in optimizer.param_groups):
        whole = Piece(0, 0, main.numel())
        yield Trained(parameter_of.get(id(main), main), [whole], whole, main, optimizer.optimizer.state[main])
