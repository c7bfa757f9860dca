"""Resume checkpoints: Megatron's distributed format inside a folder that becomes visible only when complete.

    RUN/checkpoints/step-00000500/state/    weights and optimizer, loadable into any layout
                                  run.json  step, configuration, architecture, fingerprints
    RUN/checkpoints/latest                  name of the newest complete folder; written last

Random states are not stored: they follow from seed and step (docs/design.md).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
    CachedMetadataFileSystemReader,
)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nvembed_mcore.checkpoint.names import Entry, name_table
from nvembed_mcore.config import CheckpointConfig, LoraConfig, PoolingConfig
from nvembed_mcore.model.mistral import mistral_config

POINTER = "latest"
TEMPERATURE = "log_scale"
"""Name of the learned temperature among an encoder's parameters: the log of its inverse."""
# Megatron stores the norms of its local layers by the names that TransformerEngine's fused layers have, so that a
# checkpoint fits both.
_STORED_AS = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "non_homogeneous_layers": True}


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete or of another run; the message names the folder."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder and what its `run.json` says."""

    path: Path
    step: int
    facts: dict[str, Any]

    @property
    def state_dir(self) -> str:
        return str(self.path / "state")


def folder_of(run_dir: str | Path) -> Path:
    """Where a run's checkpoints live."""
    return Path(run_dir) / "checkpoints"


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the facts of a checkpoint folder.

    Raises:
        CheckpointError: the folder or its `run.json` is missing or unreadable, or does not describe a model.
    """
    path = Path(path)
    file = path / "run.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        found = Checkpoint(path, int(facts["step"]), facts)
        _table(found)
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: cannot use {file}: {error!r}") from error


def find_checkpoint(path: str | Path) -> Checkpoint | None:
    """The checkpoint that `path` means: itself, or the newest complete one of a run folder; None when there is none.

    Raises:
        CheckpointError: the pointer names a folder that is not a complete checkpoint.
    """
    path = Path(path)
    if (path / "state").is_dir():
        return read_checkpoint(path)
    pointer = folder_of(path) / POINTER
    if not pointer.is_file():
        return None
    return read_checkpoint(folder_of(path) / pointer.read_text(encoding="utf-8").strip())


def differences(saved: Any, now: Any, prefix: str = "") -> list[str]:
    """Fields in which two nested dictionaries differ, as `field: saved -> now`."""
    if isinstance(saved, dict) and isinstance(now, dict):
        lines = []
        for key in sorted({*saved, *now}, key=str):
            lines += differences(saved.get(key), now.get(key), f"{prefix}.{key}" if prefix else str(key))
        return lines
    return [] if saved == now else [f"{prefix}: {saved!r} -> {now!r}"]


def save_checkpoint(
    config: CheckpointConfig,
    run_dir: str | Path,
    step: int,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    facts: dict[str, Any],
) -> Path:
    """Write a checkpoint; every rank calls this. Returns its folder.

    Args:
        facts: JSON values stored beside the tensors; `step` is added.
    """
    root = folder_of(run_dir)
    final = root / f"step-{step:08d}"
    aside = root / f".writing-{final.name}"
    is_first = dist.get_rank() == 0
    if is_first:
        for leftover in root.glob(".writing-*"):
            shutil.rmtree(leftover)
        (aside / "state").mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(_sharded_state(chunks, optimizer, is_loading=False), str(aside / "state"))
    if is_first:
        _write_synced(aside / "run.json", json.dumps({"step": step, **facts}, indent=1, sort_keys=True))
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
        _write_synced(root / f"{POINTER}.new", final.name + "\n")
        os.replace(root / f"{POINTER}.new", root / POINTER)
        # Later steps are of a run that was set back by hand: they must not crowd out the folder just written.
        complete = sorted(path for path in root.glob("step-*") if path.is_dir() and path.name <= final.name)
        for old in complete[: -config.keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load_checkpoint(
    checkpoint: Checkpoint, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer
) -> None:
    """Fill weights and optimizer state from a checkpoint written in any layout; every rank calls this."""
    state = dist_checkpointing.load(_sharded_state(chunks, optimizer, is_loading=True), checkpoint.state_dir)
    for number, chunk in enumerate(chunks):
        chunk.module.load_state_dict(state["model"][str(number)])
    optimizer.load_state_dict(state["optimizer"])


def load_weights(checkpoint: Checkpoint, encoders: list[torch.nn.Module], but: Collection[str] = ()) -> None:
    """Fill encoders' weights only, as the next stage of a recipe does; every rank calls this.

    A learned temperature goes on where the stage before learned one, and otherwise starts anew.

    Args:
        but: global names of parameters that the checkpoint has not; they are left alone.
    """
    has_temperature = checkpoint.facts["config"]["loss"].get("learn_temperature", False)
    but = {*but} if has_temperature else {*but, TEMPERATURE}
    left = [encoder.local_names(but) for encoder in encoders]
    sharded = {
        str(number): {name: value for name, value in _tensors(_weights(encoder)).items() if name not in left[number]}
        for number, encoder in enumerate(encoders)
    }
    loaded = dist_checkpointing.load(sharded, checkpoint.state_dir)
    for number, encoder in enumerate(encoders):
        missing = _tensors(dict.fromkeys(encoder.load_state_dict(loaded[str(number)], strict=False).missing_keys))
        assert set(missing) <= left[number], missing


def adapters_of(facts: dict[str, Any]) -> dict[str, Any] | None:
    """Settings of the low-rank adapters that a checkpoint's run trains; None without."""
    lora = facts["config"]["model"].get("lora")
    return adapter_settings(lora) if lora and lora["rank"] else None


def adapter_settings(lora: dict[str, Any]) -> dict[str, Any]:
    """All of `model.lora` but where the adapters started; targets in the order of their names, which says nothing."""
    return {name: value for name, value in lora.items() if name != "init_from"} | {"targets": sorted(lora["targets"])}


def instruction_of(facts: dict[str, Any]) -> str:
    """Instruction of the queries: of a run's first data set, or what an imported folder knew; empty without."""
    imported = facts.get("imported_from", {}).get("instruction", "")
    return next((one["instruction"] for one in facts["config"]["data"]["datasets"]), imported)


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of `run.json`, and of the sizes and samples of the tensors' files: two checkpoints differ in it.

    It says nothing of the numbers between the samples.
    """
    digest = hashlib.sha256((checkpoint.path / "run.json").read_bytes())
    for name, size in stored_files(checkpoint).items():
        digest.update(f"{name} {size}".encode())
        with open(Path(checkpoint.state_dir) / name, "rb") as file:
            for place in range(_SAMPLES):
                file.seek(size * place // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def open_weights(checkpoint: Checkpoint) -> Callable[[str], torch.Tensor]:
    """A function that reads one global tensor by name, for one process and without building the model.

    Raises:
        CheckpointError: a tensor has another shape than `run.json` says; and, by the function, it cannot be read.
    """
    reader = _reader(checkpoint)
    stored = reader.read_metadata().state_dict_metadata
    for entry in _table(checkpoint):
        name = stored_name(entry.name)
        if name in stored and tuple(stored[name].size) != entry.shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name!r} has shape {list(stored[name].size)}, the model of its run.json "
                f"needs {list(entry.shape)}"
            )

    def read(name: str) -> torch.Tensor:
        name = stored_name(name)
        if not isinstance(stored.get(name), TensorStorageMetadata):
            raise CheckpointError(f"{checkpoint.path} has no tensor {name!r}")
        tensor = torch.empty(stored[name].size, dtype=stored[name].properties.dtype)
        try:
            # Not Megatron's load, which reads the metadata again for each call.
            torch_checkpoint.load({name: tensor}, storage_reader=reader, no_dist=True)
        except CheckpointException as error:  # not an `Exception`
            (cause, _), *_ = error.failures.values()
            raise CheckpointError(f"cannot read tensor {name!r} of {checkpoint.path}: {cause!r}") from error
        return tensor

    return read


def _table(checkpoint: Checkpoint) -> list[Entry]:
    """The name table of the model that `run.json` describes."""
    model = checkpoint.facts["config"]["model"]
    lora = LoraConfig(**(model.get("lora") or {}))
    hf_config = mistral_config(checkpoint.facts["hf_config"], checkpoint.path / "run.json")
    return name_table(hf_config, PoolingConfig(**model["pooling"]), lora if lora.rank else None)


def stored_files(checkpoint: Checkpoint) -> dict[str, int]:
    """The files of all tensors, each with the number of bytes that it must have; only the metadata is read."""
    needed: dict[str, int] = {}
    for one in _reader(checkpoint).read_metadata().storage_data.values():
        needed[one.relative_path] = max(needed.get(one.relative_path, 0), one.offset + one.length)
    return dict(sorted(needed.items()))


def stored_tensors(checkpoint: Checkpoint) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of a checkpoint, the optimizer's too; only its metadata is read."""
    found = _reader(checkpoint).read_metadata().state_dict_metadata
    return {
        name: (tuple(one.size), one.properties.dtype)
        for name, one in found.items()
        if isinstance(one, TensorStorageMetadata)
    }


def stored_name(name: str) -> str:
    """The name in a checkpoint of one of the encoder's parameters."""
    for ours, stored in _STORED_AS.items():
        name = name.replace(ours, stored)
    return name


def parameter_name(stored: str) -> str:
    """The encoder's parameter of a name in a checkpoint."""
    for ours, theirs in _STORED_AS.items():
        stored = stored.replace(theirs, ours)
    return stored


def _reader(checkpoint: Checkpoint) -> CachedMetadataFileSystemReader:
    """Of the tensors' files.

    Raises:
        CheckpointError: they are not there in Megatron's format.
    """
    if not dist_checkpointing.check_is_distributed_checkpoint(checkpoint.state_dir):
        raise CheckpointError(f"{checkpoint.path} has no tensors in Megatron's distributed format")
    reader = CachedMetadataFileSystemReader(checkpoint.state_dir)
    try:
        reader.read_metadata()
    except Exception as error:  # what a damaged file makes of unpickling may be anything
        raise CheckpointError(f"cannot read the metadata of {checkpoint.path}: {error!r}") from error
    return reader


def _weights(encoder: torch.nn.Module) -> dict:
    return encoder.sharded_state_dict(metadata=dict(_METADATA))


def _tensors(state: dict) -> dict:
    """Without what linears keep of FP8 beside their weights: an imported checkpoint has none, a stage starts anew."""
    return {name: value for name, value in state.items() if not name.endswith("._extra_state")}


def _sharded_state(chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, *, is_loading: bool) -> dict:
    weights = {str(number): _weights(chunk.module) for number, chunk in enumerate(chunks)}
    state = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=dict(_METADATA))
    return {"model": weights, "optimizer": state}


def _write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
