"""Reading the tensors of a checkpoint without running what it says.

Torch's distributed format keeps its table of contents in a pickle, `.metadata`, and objects beside the tensors in
others. Unpickling calls what the file names, so the table is read by an unpickler that knows the dozen names that such
tables consist of, and objects with `weights_only=True`.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_inplace,
    extract_matching_values,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner, mcore_to_pyt_state_dict
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from nvembed_mcore.checkpoint.manifest import CheckpointError
from nvembed_mcore.parallel.groups import every_rank_does
from nvembed_mcore.progress import Progress, progress

METADATA = ".metadata"
_EXTRA = "_extra_state"
_TABLE = "torch.distributed.checkpoint.metadata"
_NAMES = {
    *((_TABLE, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_TABLE, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
    (_TABLE, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}
"""All that a table of contents may name, besides the data types of torch."""
_FILE = re.compile(r"__\d+_\d+\.distcp")


class _Unpickler(pickle.Unpickler):
    """Knows the classes of a table of contents and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES:
            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise CheckpointError(f"{METADATA} names {module}.{name}, which no table of contents has")


class StateReader(FileSystemReader):
    """Reads the `state/` of a checkpoint.

    Attributes:
        metadata: its table of contents.

    Raises:
        CheckpointError: the table of contents cannot be used.
    """

    def __init__(self, state_dir: str | os.PathLike) -> None:
        super().__init__(state_dir)
        path = Path(state_dir) / METADATA
        try:
            with open(path, "rb") as file:
                self.metadata = _checked(_Unpickler(file).load())
        except Exception as error:  # what a damaged file makes of unpickling may be anything
            raise CheckpointError(f"cannot read {path}: {error!r}") from error
        self.set_up_storage_reader(self.metadata, is_coordinator=False)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def read(self, wanted: dict[str, list[ShardedBase]]) -> None:
        """Fill the `data` of every piece.

        Args:
            wanted: pieces by key, which the table of contents has in these shapes.
        """
        state = mcore_to_pyt_state_dict(dict(wanted), is_loading=True)
        planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(state, self.metadata, is_coordinator=False)
        self._read(planner, "the tensors")
        for key, pieces in wanted.items():
            if isinstance(pieces[0], ShardedObject):
                for piece, content in zip(pieces, planner.state_dict[key], strict=True):
                    piece.data = content

    def read_tensor(self, key: str) -> torch.Tensor:
        """The whole of a tensor of the table of contents."""
        stored = self.metadata.state_dict_metadata[key]
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner({key: tensor}, self.metadata, is_coordinator=False)
        self._read(planner, f"tensor {key!r}")
        return tensor

    def _read(self, planner: MCoreLoadPlanner, what: str) -> None:
        plan = planner.create_local_plan()
        try:
            with progress(f"read {self.path}", len(plan.items), "pieces") as planner.shown:
                self.read_data(plan, planner).wait()
        except Exception as error:  # what a damaged file makes of unpickling may be anything
            raise CheckpointError(f"cannot read {what} of {self.path}: {error}") from error


class _Planner(MCoreLoadPlanner):
    """Megatron's, which would unpickle objects without limits; it shows how far it is."""

    shown: Progress
    done = 0

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        super().commit_tensor(read_item, tensor)
        self.done += 1
        self.shown.update(self.done)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, map_location="cpu", weights_only=True)


def load_state(path: Path, asked: dict[str, Any], *, is_partial: bool = False) -> dict[str, Any]:
    """What `megatron.core.dist_checkpointing.load` gives, but ranks agree on every outcome; every rank calls this.

    Megatron's own would leave the others waiting for a rank that cannot read a file, unpickles freely, casts data
    types and leaves out what nobody asks for.

    Args:
        path: a checkpoint folder.
        asked: nested, with Megatron's `ShardedTensor` and so on at its leaves.
        is_partial: the checkpoint may have more than what is asked for, and in other data types.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape or type, by name; or the table of contents
            names what it should not.
    """
    reader: list[StateReader] = []
    common: dict[str, Any] = {}

    def open_files() -> None:
        reader.append(StateReader(path / "state"))
        common.update(_common(path / "state" / "common.pt"))

    every_rank_does(open_files)
    force_all_tensors_to_non_fp8(asked)
    pieces, local, factories = load_preprocess(asked)
    merge(common, local)
    pieces, _ = extract_sharded_base(pieces)
    # What linears keep of FP8 may be missing: a run may have begun without.
    stored = reader[0].metadata.state_dict_metadata
    pieces, _ = extract_matching_values(pieces, lambda piece: _EXTRA not in piece.key or _key(piece) in stored)
    wanted: dict[str, list[ShardedBase]] = {}
    for piece in nested_values(pieces):
        wanted.setdefault(_key(piece), []).append(piece)
    _check_tensors(path, reader[0].metadata, wanted, is_partial)
    every_rank_does(lambda: reader[0].read(wanted))
    merge(common, dict_list_map_inplace(lambda piece: piece.data, pieces))
    return apply_factory_merges(common, factories)


def _key(piece: ShardedBase) -> str:
    return piece.unique_key if isinstance(piece, ShardedObject) else piece.key


def _common(path: Path) -> dict[str, Any]:
    """What is not of a tensor's size: settings of the optimizer's groups and so on."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file makes of unpickling may be anything
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds {type(found).__name__}, not a dictionary")
    return found


def _checked(table: Any) -> Metadata:
    """A table of contents whose parts have the types that they should have, and whose files are in its folder."""

    def require(is_so: bool, otherwise: str) -> None:
        # No assertion: python -O leaves those out, and here they keep the reader in its folder.
        if not is_so:
            raise CheckpointError(otherwise)

    require(isinstance(table, Metadata), f"it holds {type(table).__name__}")
    for name, one in table.state_dict_metadata.items():
        require(isinstance(name, str) and isinstance(one, (TensorStorageMetadata, BytesStorageMetadata)), repr(name))
        if isinstance(one, TensorStorageMetadata):
            is_tensor = isinstance(one.size, torch.Size) and isinstance(one.properties.dtype, torch.dtype)
            require(is_tensor, f"{name} has no shape or data type")
    for index, place in table.storage_data.items():
        require(index.fqn in table.state_dict_metadata, f"{index} is none of its tensors")
        is_inside = _FILE.fullmatch(place.relative_path) is not None
        require(is_inside, f"{index.fqn} is in a file named {place.relative_path!r}")
        require(0 <= place.offset and 0 <= place.length, f"{index.fqn} begins before its file")
    return table


def _check_tensors(path: Path, metadata: Metadata, wanted: dict[str, list[ShardedBase]], is_partial: bool) -> None:
    """Refuse a checkpoint that has not what all ranks together want, or more. Only what linears keep of FP8 may be
    there or not."""
    answers = every_rank_does(lambda: (_mismatches(metadata, wanted, is_partial), set(wanted)))
    lines = sorted({line for of_rank, _ in answers for line in of_rank})
    if not is_partial:
        unasked = set(metadata.state_dict_metadata).difference(*(keys for _, keys in answers))
        lines += [f"{key}: saved, but not part of this model" for key in sorted(unasked) if _EXTRA not in key]
    if lines:
        raise CheckpointError(f"the tensors of {path} are not those of this model:\n  " + "\n  ".join(lines[:20]))


def _mismatches(metadata: Metadata, wanted: dict[str, list[ShardedBase]], any_dtype: bool) -> list[str]:
    """What a checkpoint has not or has otherwise: name, and what is saved -> what is needed."""
    lines = []
    for key, (one, *_) in wanted.items():
        stored = metadata.state_dict_metadata.get(key)
        if stored is None:
            lines.append(f"{key}: not saved")
        elif isinstance(one, ShardedTensor) != isinstance(stored, TensorStorageMetadata):
            lines.append(f"{key}: {type(stored).__name__} -> {type(one).__name__}")
        elif isinstance(one, ShardedTensor):
            has, needs = [*stored.size], [*one.global_shape]
            if has != needs or (stored.properties.dtype != one.dtype and not any_dtype):
                lines.append(f"{key}: {has} {stored.properties.dtype} -> {needs} {one.dtype}")
    return lines
