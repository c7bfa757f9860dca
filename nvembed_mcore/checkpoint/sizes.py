"""What each rank has of the optimizer and writes of a checkpoint, told without an optimizer and without other ranks.

What decides stands in Megatron's buffers, in `optimizer_state` and in `saver`; here it is only looked up.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.distributed import DistributedDataParallel

from nvembed_mcore.checkpoint import fp8_state
from nvembed_mcore.checkpoint.optimizer_state import Piece, pieces_of, places_of
from nvembed_mcore.checkpoint.saver import bytes_of_optimizer
from nvembed_mcore.checkpoint.store import weights_of_chunks
from nvembed_mcore.parallel.groups import Groups

_MOMENTS, _COPY, _AVERAGE = 8, 4, 4
"""Bytes of a number."""


def optimizer_bytes(chunks: list[DistributedDataParallel], groups: Groups, *, averages: bool) -> int:
    """Bytes that this rank's optimizer holds after its first step: two moments, of other weights than float32 a copy
    in float32, and with `averages` an average.
    """
    place = groups.members()["dp_cp"].index(groups.rank)
    both = _MOMENTS + (_AVERAGE if averages else 0)
    return sum(
        (both + (0 if parameter.dtype == torch.float32 else _COPY)) * (piece.end - piece.begin)
        for parameter, pieces in _trained(chunks, groups)
        for piece in pieces
        if piece.rank == place
    )


def written_by_ranks(chunks: list[DistributedDataParallel], groups: Groups, *, averages: bool) -> dict[int, int]:
    """Bytes of the tensors that this rank and those with the same parameters write to a checkpoint, by rank."""
    ranks = groups.members()["dp_cp"]
    written = dict.fromkeys(ranks, 0)
    places = places_of(weights_of_chunks(chunks))
    for parameter, pieces in _trained(chunks, groups):
        if not any(places[id(parameter)].replica_id[:2]):
            written[ranks[pieces[0].rank]] += bytes_of_optimizer(averages) * parameter.numel()
    # All have the rest. As Megatron's `distribute_shards_to_ranks`, which takes the square of the number of ranks: the
    # largest first to the rank that writes least.
    loads = [(bytes, place) for place, bytes in enumerate(written.values())]
    heapq.heapify(loads)
    for _, _, _, size in sorted(_shared(chunks)):
        least, place = loads[0]
        heapq.heapreplace(loads, (least + size, place))
    return {ranks[place]: bytes for bytes, place in loads}


def _shared(chunks: list[DistributedDataParallel]) -> Iterator[tuple[int, str, tuple, int]]:
    """What tells the order of the tensors that all ranks of `dp_cp` have, and their bytes.

    Tensor ranks but the first have copies of what is not split.
    """
    for shard in _shards(chunks):
        if not any(shard.replica_id[:2]):
            size = torch.Size(shard.local_shape).numel() * shard.dtype.itemsize
            yield -size, shard.key, shard.global_offset, size


def _shards(chunks: list[DistributedDataParallel]) -> Iterator[ShardedTensor]:
    """All tensors but the optimizer's, in the parts in which they are stored."""
    state = {"model": weights_of_chunks(chunks), "fp8": [fp8_state.sharded_state(chunk) for chunk in chunks]}
    apply_factories(state)
    return (one for one in nested_values(state) if isinstance(one, ShardedTensor))


def _trained(chunks: list[DistributedDataParallel], groups: Groups) -> Iterator[tuple[torch.Tensor, list[Piece]]]:
    """Each trained parameter, and who updates which piece of it: places in the group `dp_cp`."""
    ranks = groups.members()["dp_cp"]
    for chunk in chunks:
        for buffer in chunk.buffers:
            for parameter, (begin, end, _) in buffer.param_index_map.items():
                if chunk.ddp_config.use_distributed_optimizer:
                    yield parameter, pieces_of(buffer.param_to_bucket[parameter], begin, end, len(ranks))
                else:
                    yield parameter, [Piece(place, 0, parameter.numel()) for place in range(len(ranks))]
