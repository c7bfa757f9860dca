"""Writing a checkpoint of weights alone, from tensors that are made one at a time and without a model.

The folder is one that `store` reads: its `state/` is in Megatron's distributed format, with the names that the
encoder's own state has, so it loads into any layout.
"""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from nvembed_mcore import device
from nvembed_mcore.checkpoint.folders import publish
from nvembed_mcore.checkpoint.store import stored_name
from nvembed_mcore.checkpoint.writing import Writing
from nvembed_mcore.parallel.groups import first_rank_does, patient_group
from nvembed_mcore.progress import progress

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
        StorageError: it cannot be written.
        Exception: what `make` raises, on every rank.
    """
    output = Path(output)

    def give_name() -> None:
        check_new(output)
        publish(writing.aside, output)

    group = patient_group()
    try:
        first_rank_does(lambda: check_new(output), group)
        mine = {stored_name(name): name for name in _share(tensors, dist.get_rank(), dist.get_world_size())}
        with progress("write weights", len(mine), "tensors") as shown:
            done = itertools.count(1)

            def make_next(stored: str) -> torch.Tensor:
                tensor = make(mine[stored])
                shown.update(next(done))
                return tensor

            planner = _Planner({stored: tensors[name] for stored, name in mine.items()}, make_next)
            writing = Writing(output.with_name(f".{output.name}.partial"), facts["step"], planner, group)
            writing.write()
        content = io.BytesIO()
        torch.save({}, content)
        described = json.dumps(facts, indent=1, sort_keys=True).encode()
        writing.finish(content.getvalue(), described, give_name)
    finally:
        dist.destroy_process_group(group)


def check_new(output: str | os.PathLike) -> None:
    """Raise a `FileExistsError` when `output` exists."""
    if Path(output).exists():
        raise FileExistsError(f"{output} exists; choose another folder or remove it")


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


class _Planner(DefaultSavePlanner):
    """Plans from shapes, and makes a tensor when its turn comes."""

    def __init__(self, tensors: Shapes, make: Callable[[str], torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self.tensors, self.make = tensors, make
        self.last: torch.Tensor | None = None

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_whole(name, *one) for name, one in self.tensors.items()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        if self.last is not None:
            # The writer keeps what it has written until the end, and does not look at it again.
            self.last.untyped_storage().resize_(0)
            device.release_unused_memory()
        self.last = self.make(write_item.index.fqn)
        return self.last


def _whole(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> WriteItem:
    """A tensor that one rank writes in one piece."""
    origin, size = torch.Size([0] * len(shape)), torch.Size(shape)
    return WriteItem(
        index=MetadataIndex(name, origin),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=origin, sizes=size), properties=TensorProperties(dtype=dtype), size=size
        ),
    )
