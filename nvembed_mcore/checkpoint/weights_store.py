"""Writing a checkpoint of weights alone, from tensors that are made one at a time and without a model.

The folder is one that `store` reads: its `state/` is in Megatron's distributed format, with the names that the
encoder's own state has, so it loads into any layout.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from nvembed_mcore import device
from nvembed_mcore.checkpoint.safetensors_stream import sync_files
from nvembed_mcore.checkpoint.store import stored_name
from nvembed_mcore.parallel.groups import first_rank_does

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of parameters, by the encoder's names."""


def save_weights(
    output: str | os.PathLike, tensors: Shapes, make: Callable[[str], torch.Tensor], facts: dict[str, Any]
) -> None:
    """Write a checkpoint folder; every rank calls this and writes its share. Nothing is left of one that fails.

    Args:
        output: must not exist.
        tensors: all parameters.
        make: name -> the whole parameter on the CPU; called for one after the other, which is let go in between.
        facts: JSON values for `run.json`, with `step`.

    Raises:
        FileExistsError: `output` exists.
        Exception: what `make` raises, on every rank.
    """
    output = Path(output)
    aside = Path(first_rank_does(lambda: _make_aside(output)))
    try:
        mine = _share(tensors, dist.get_rank(), dist.get_world_size())
        state = {
            name: ShardedTensor.from_rank_offsets(stored_name(name), torch.empty(shape, dtype=dtype, device="meta"))
            for name, (shape, dtype) in mine.items()
        }
        by_stored_name = {stored_name(name): name for name in mine}
        strategy = _OneAtATime(lambda stored: make(by_stored_name[stored]))
        dist_checkpointing.save(state, str(aside / "state"), sharded_strategy=strategy)
        first_rank_does(lambda: _publish(aside, output, facts))
    except CheckpointException as error:  # no Exception, and holds those of the ranks
        raise next(iter(error.failures.values()))[0] from error
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)


def check_new(output: str | os.PathLike) -> None:
    """Raise a `FileExistsError` when `output` exists."""
    if Path(output).exists():
        raise FileExistsError(f"{output} exists; choose another folder or remove it")


def _make_aside(output: Path) -> str:
    check_new(output)
    aside = output.with_name(f".{output.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # what a killed process left
    (aside / "state").mkdir(parents=True)
    return str(aside)


def _publish(aside: Path, output: Path, facts: dict[str, Any]) -> None:
    (aside / "run.json").write_text(json.dumps(facts, indent=1, sort_keys=True), encoding="utf-8")
    sync_files(aside)
    aside.rename(output)


def _share(tensors: Shapes, rank: int, num_ranks: int) -> Shapes:
    """This rank's parameters: the largest first to the rank with the fewest bytes, then in their own order."""
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, (shape, dtype) in tensors.items()}
    loads = [0] * num_ranks
    mine = set()
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        emptiest = loads.index(min(loads))
        loads[emptiest] += sizes[name]
        if emptiest == rank:
            mine.add(name)
    return {name: tensors[name] for name in tensors if name in mine}


class _OneAtATime(SaveShardedStrategy):
    """Megatron's format through torch's writer, which asks for each tensor when it writes it. Megatron's own writer
    holds them all and starts processes for them."""

    def __init__(self, make: Callable[[str], torch.Tensor]) -> None:
        super().__init__("torch_dist", 1)
        self.make = make

    def save(self, sharded_state_dict: dict[str, ShardedTensor], checkpoint_dir: str | Path) -> None:
        writer = torch_checkpoint.FileSystemWriter(checkpoint_dir, thread_count=1, per_thread_copy_ahead=0)
        planner = _Planner(list(sharded_state_dict.values()), self.make)
        torch_checkpoint.save({}, storage_writer=writer, planner=planner)


class _Planner(torch_checkpoint.DefaultSavePlanner):
    """Plans from shapes, and makes a tensor when its turn comes."""

    def __init__(self, tensors: list[ShardedTensor], make: Callable[[str], torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self.tensors, self.make = tensors, make
        self.last: torch.Tensor | None = None

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_whole(one) for one in self.tensors])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        if self.last is not None:
            # The writer keeps what it has written until the end, and does not look at it again.
            self.last.untyped_storage().resize_(0)
            device.release_unused_memory()
        self.last = self.make(write_item.index.fqn)
        return self.last


def _whole(tensor: ShardedTensor) -> WriteItem:
    """A tensor that one rank writes in one piece."""
    origin, size = torch.Size([0] * len(tensor.global_shape)), torch.Size(tensor.global_shape)
    return WriteItem(
        index=MetadataIndex(tensor.key, origin),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=origin, sizes=size),
            properties=TensorProperties(dtype=tensor.dtype),
            size=size,
        ),
    )
