"""What each rank has of the optimizer and writes of a checkpoint, told without an optimizer and without other ranks.

What decides stands in Megatron's buffers, in `optimizer_state` and in `saver`; here it is only looked up.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import distribute_shards_to_ranks
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.distributed import DistributedDataParallel

from nvembed_mcore.checkpoint import fp8_state
from nvembed_mcore.checkpoint.optimizer_state import Piece, pieces_of, places_of
from nvembed_mcore.checkpoint.saver import BYTES_OF_OPTIMIZER
from nvembed_mcore.checkpoint.store import weights_of_chunks
from nvembed_mcore.parallel.groups import Groups

_MOMENTS, _COPY = 8, 4
"""Bytes of a number."""


def optimizer_bytes(chunks: list[DistributedDataParallel], groups: Groups) -> int:
    """Bytes that this rank's optimizer holds after its first step: two moments, and of other weights than float32 a
    copy in float32.
    """
    place = groups.members()["dp_cp"].index(groups.rank)
    return sum(
        (_MOMENTS + (0 if parameter.dtype == torch.float32 else _COPY)) * (piece.end - piece.begin)
        for parameter, pieces in _trained(chunks, groups)
        for piece in pieces
        if piece.rank == place
    )


def written_by_ranks(chunks: list[DistributedDataParallel], groups: Groups) -> dict[int, int]:
    """Bytes of the tensors that this rank and its data-parallel peers write to a checkpoint, by rank."""
    ranks, all_ranks = groups.members()["dp"], groups.members()["dp_cp"]
    sharers: dict[tuple, list[int]] = {}
    sizes: dict[tuple, int] = {}
    for shard in _shards(chunks):
        # Context-parallel ranks but the first have copies.
        if not any(shard.replica_id[:2]) and groups.cp_rank == 0:
            key = (shard.key, shard.global_offset)
            sharers[key] = [*range(len(ranks))]
            sizes[key] = torch.Size(shard.local_shape).numel() * shard.dtype.itemsize
    places = places_of(weights_of_chunks(chunks))
    for parameter, pieces in _trained(chunks, groups):
        place, owner = places[id(parameter)], all_ranks[pieces[0].rank]
        if not any(place.replica_id[:2]) and owner in ranks:
            key = (f"optimizer.state.{place.key}", ())
            sharers[key], sizes[key] = [ranks.index(owner)], BYTES_OF_OPTIMIZER * parameter.numel()
    writers = distribute_shards_to_ranks(sharers, sizes, len(ranks), set())
    written = dict.fromkeys(ranks, 0)
    for key, writer in writers.items():
        written[ranks[writer]] += sizes[key]
    return written


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
