"""Resume checkpoints: Megatron's distributed format inside a folder that becomes visible only when complete.

    RUN/checkpoints/step-00000500/state/         weights and optimizer, loadable into any layout
                                  run.json       step, configuration, architecture, fingerprints
                                  manifest.json  sizes and hashes of all of these files; makes the folder a checkpoint
    RUN/checkpoints/latest                       name of the newest complete folder; written last
    RUN/checkpoints/best                         the one of the best evaluation, if the run is evaluated

Random states are not stored: they follow from seed and step (docs/design.md). `saver` writes, this file reads: a
folder's content is compared with its hashes before any of it is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nvembed_mcore.checkpoint import folders, fp8_state, optimizer_state
from nvembed_mcore.checkpoint.averages import Weights, averaged, has_averages, name_of_average, takes_averages
from nvembed_mcore.checkpoint.best import BEST
from nvembed_mcore.checkpoint.manifest import MANIFEST, CheckpointError, faults, read_manifest
from nvembed_mcore.checkpoint.names import Entry, name_table
from nvembed_mcore.checkpoint.reader import StateReader, load_state
from nvembed_mcore.config import CheckpointConfig, LoraConfig, PoolingConfig
from nvembed_mcore.model.mistral import mistral_config
from nvembed_mcore.parallel.groups import every_rank_does, first_rank_does

log = logging.getLogger(__name__)

TEMPERATURE = "log_scale"
"""Name of the learned temperature among an encoder's parameters: the log of its inverse."""
# Megatron stores the norms of its local layers by the names that TransformerEngine's fused layers have, so that a
# checkpoint fits both.
_STORED_AS = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}
_METADATA = {"non_homogeneous_layers": True}


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder and what its `run.json` says."""

    path: Path
    step: int
    facts: dict[str, Any]


def find_checkpoint(path: str | Path) -> Checkpoint | None:
    """The checkpoint that `path` means: itself, the newest one of a run folder, or that of the best evaluation, where
    `path` is `RUN/checkpoints/best`; None when there is none.

    The content of its tensors' files is not read here but by what loads them.

    Raises:
        CheckpointError: that checkpoint is damaged; the message says what is wrong and names an older one to use.
    """
    path = Path(path)
    if path.name == BEST and folders.is_of_run(path) and not path.is_dir():
        best = folders.best_of(path.parent)
        return best and read_checkpoint(path.parent / folders.name_of(best.step))
    if (path / MANIFEST).is_file() or (path / "state").is_dir():
        return read_checkpoint(path)
    found = folders.candidates(folders.folder_of(path))
    return read_checkpoint(found[0]) if found else None


def newest_step(run_dir: str | Path) -> int | None:
    """Step of the newest checkpoint folder of a run, good or not; None when there is none."""
    found = folders.step_folders(folders.folder_of(run_dir))
    return folders.step_of(found[0]) if found else None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the facts of a checkpoint folder, as `find_checkpoint` does.

    Raises:
        CheckpointError: a file is missing, has another size, or `run.json` does not describe a model.
    """
    path = Path(path)
    try:
        folders.check_place(path)
        manifest = read_manifest(path)
        wrong = faults(path, manifest.files, [name for name in manifest.files if not name.endswith(".distcp")])
    except CheckpointError as error:
        wrong = [str(error)]
    if wrong:
        raise _damaged(path, wrong)
    return Checkpoint(path, manifest.step, _facts(path, manifest.step))


def newest_good(config: CheckpointConfig, run_dir: str | Path) -> Checkpoint | None:
    """The checkpoint to go on from, its content compared with its hashes; every rank calls this.

    First the one that the pointer names, then the others from new to old. What is wrong with those that are passed
    over is logged.

    Returns:
        None: the run has no checkpoint folder at all.

    Raises:
        CheckpointError: there are folders, but none is good, or there were; or the one found belongs to another user,
            or is not the one that `checkpoint.manifest_sha256` names.
    """
    refused = []
    for path in first_rank_does(lambda: folders.candidates(folders.folder_of(run_dir))):
        wrong = _wrong_together(path)
        if not wrong:
            first_rank_does(lambda path=path: _check_origin(config, path))
            return first_rank_does(lambda path=path: read_checkpoint(path))
        refused.append(f"{path}: {'; '.join(wrong)}")
        log.warning("passing over a damaged checkpoint, %s", refused[-1])
    if refused:
        raise CheckpointError(
            "no checkpoint of this run is good; remove them to start anew:\n  " + "\n  ".join(refused)
        )
    if config.manifest_sha256:
        raise CheckpointError(
            f"{run_dir} has no checkpoint, and checkpoint.manifest_sha256 asks for {config.manifest_sha256}"
        )
    return None


def _check_origin(config: CheckpointConfig, path: Path) -> None:
    if not config.any_owner:
        folders.check_owner(path)
    has = fingerprint(Checkpoint(path, 0, {}))
    if config.manifest_sha256 not in (None, has):
        raise CheckpointError(
            f"{path / MANIFEST} has SHA-256 {has}, checkpoint.manifest_sha256 asks for {config.manifest_sha256}"
        )


def check_content(checkpoint: Checkpoint) -> None:
    """Compare all files of a checkpoint with their hashes. Every rank calls this, if there are several.

    Raises:
        CheckpointError: it is damaged.
    """
    if not dist.is_initialized():
        _check_alone(checkpoint.path)
    elif wrong := _wrong_together(checkpoint.path):
        # On one rank: looking for a good one reads all that is older.
        raise first_rank_does(lambda: _damaged(checkpoint.path, wrong))


def _check_alone(path: Path) -> None:
    wrong = _wrong_with(path)
    if wrong:
        raise _damaged(path, wrong)


def _wrong_together(path: Path) -> list[str]:
    """What is wrong with a folder; ranks share its files, the largest first."""
    parts = every_rank_does(lambda: _wrong_with(path, dist.get_rank(), dist.get_world_size()))
    return list(dict.fromkeys(line for lines in parts for line in lines))


def _wrong_with(path: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a folder, of whose files every `parts`-th is read."""
    try:
        folders.check_place(path)
        manifest = read_manifest(path)
        by_size = sorted(manifest.files, key=manifest.files.__getitem__, reverse=True)
        wrong = faults(path, manifest.files, by_size[part::parts])
        if not wrong:
            _facts(path, manifest.step)
        return wrong
    except CheckpointError as error:
        return [str(error)]


def _damaged(path: Path, wrong: list[str]) -> CheckpointError:
    """The error for a damaged folder; it names the newest good one before it of the same run."""
    if not folders.is_of_run(path):
        hint = ""
    else:
        all = folders.step_folders(path.parent)
        older = all[all.index(path) + 1 :] if path in all else []
        good = next((one for one in older if not _wrong_with(one)), None)
        hint = f"; the newest good one before it is {good}" if good else "; the run has no good one before it"
    return CheckpointError(f"{path} is damaged: {'; '.join(wrong)}{hint}")


def _facts(path: Path, step: int) -> dict[str, Any]:
    """What `run.json` says.

    Raises:
        CheckpointError: it does not describe a model, or another step.
    """
    file = path / "run.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        if type(facts["step"]) is not int or facts["step"] != step:
            raise ValueError(f"its step is {facts['step']!r}, {MANIFEST} says {step}")
        if not isinstance(facts["config"]["loss"], dict):
            raise ValueError("config.loss has no fields")
        _table(Checkpoint(path, step, facts))
        return facts
    except Exception as error:  # what a damaged file makes of reading it may be anything
        raise CheckpointError(f"{path} is not a complete checkpoint: cannot use {file}: {error!r}") from error


def differences(saved: Any, now: Any, prefix: str = "") -> list[str]:
    """Fields in which two nested dictionaries differ, as `field: saved -> now`."""
    if isinstance(saved, dict) and isinstance(now, dict):
        lines = []
        for key in sorted({*saved, *now}, key=str):
            lines += differences(saved.get(key), now.get(key), f"{prefix}.{key}" if prefix else str(key))
        return lines
    return [] if saved == now else [f"{prefix}: {saved!r} -> {now!r}"]


def load_checkpoint(
    checkpoint: Checkpoint, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer
) -> None:
    """Fill weights and optimizer state from a checkpoint written in any layout; every rank calls this.

    Its content is not compared with its hashes: `newest_good` did.

    Raises:
        CheckpointError: it has not the tensors that are needed, or others besides.
    """
    asked = sharded_state(chunks, optimizer, is_loading=True, has_average=has_averages(checkpoint))
    state = load_state(checkpoint.path, asked)
    for number, chunk in enumerate(chunks):
        missing = chunk.module.load_state_dict(state["model"][str(number)], strict=False).missing_keys
        assert not _tensors(dict.fromkeys(missing)), missing
        fp8_state.load(chunk, state.get("fp8", {}).get(str(number), {}))
    optimizer_state.load(optimizer, weights_of_chunks(chunks), state["optimizer"])


def load_weights(checkpoint: Checkpoint, encoders: list[torch.nn.Module], but: Collection[str] = ()) -> None:
    """Fill encoders' weights only, as the next stage of a recipe does; every rank calls this.

    They are the averaged ones where the run has them. A learned temperature goes on where the stage before learned
    one, and otherwise starts anew. Numbers are converted to the encoders' data type.

    Args:
        but: global names of parameters that the checkpoint has not; they are left alone.

    Raises:
        CheckpointError: it is damaged, or has not the tensors that are needed.
    """
    check_content(checkpoint)
    has_temperature = checkpoint.facts["config"]["loss"].get("learn_temperature", False)
    but = {*but} if has_temperature else {*but, TEMPERATURE}
    left = [encoder.local_names(but) for encoder in encoders]
    sharded = {
        str(number): {name: value for name, value in weights_of(encoder).items() if name not in left[number]}
        for number, encoder in enumerate(encoders)
    }
    if has_averages(checkpoint):
        stored = stored_tensors(checkpoint)
        for state in sharded.values():
            state |= {name: averaged(value, stored) for name, value in state.items()}
    loaded = load_state(checkpoint.path, sharded, is_partial=True)
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
    """SHA-256 of `manifest.json`, which has a hash of every other file."""
    return hashlib.sha256((checkpoint.path / MANIFEST).read_bytes()).hexdigest()


def open_weights(checkpoint: Checkpoint, weights: Weights | None = None) -> Callable[[str], torch.Tensor]:
    """A function that reads one global tensor by name, for one process and without building the model.

    Args:
        weights: `ema`: averaged weights; `last`: those of the last step; None: averaged ones where there are some.

    Raises:
        CheckpointError: the checkpoint is damaged, it has no averages that are asked for, or a tensor has another
            shape than `run.json` says; and, by the function, there is no such tensor.
    """
    _check_alone(checkpoint.path)
    are_averaged = takes_averages(checkpoint, weights)
    reader = StateReader(checkpoint.path / "state")
    stored = reader.metadata.state_dict_metadata
    for entry in _table(checkpoint):
        name = stored_name(entry.name)
        if name in stored and tuple(stored[name].size) != entry.shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name!r} has shape {list(stored[name].size)}, the model of its run.json "
                f"needs {list(entry.shape)}"
            )

    def read(name: str) -> torch.Tensor:
        name = stored_name(name)
        name = name_of_average(name, stored) if are_averaged else name
        if not isinstance(stored.get(name), TensorStorageMetadata):
            raise CheckpointError(f"{checkpoint.path} has no tensor {name!r}")
        return reader.read_tensor(name)

    return read


def _table(checkpoint: Checkpoint) -> list[Entry]:
    """The name table of the model that `run.json` describes."""
    model = checkpoint.facts["config"]["model"]
    lora = LoraConfig(**(model.get("lora") or {}))
    hf_config = mistral_config(checkpoint.facts["hf_config"], checkpoint.path / "run.json")
    return name_table(hf_config, PoolingConfig(**model["pooling"]), lora if lora.rank else None)


def stored_tensors(checkpoint: Checkpoint) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of a checkpoint, the optimizer's too; only its metadata is read."""
    found = StateReader(checkpoint.path / "state").metadata.state_dict_metadata
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


def weights_of(encoder: torch.nn.Module) -> dict[str, Any]:
    """An encoder's parameters as Megatron describes them to its checkpoints."""
    return _tensors(encoder.sharded_state_dict(metadata=dict(_METADATA)))


def sharded_state(
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    *,
    is_loading: bool,
    has_average: bool = False,
) -> dict[str, Any]:
    """Weights, optimizer and histories of delayed FP8 scaling, likewise; arguments as in `optimizer_state`."""
    weights = weights_of_chunks(chunks)
    return {
        "model": weights,
        "optimizer": optimizer_state.sharded_state(optimizer, weights, is_loading=is_loading, has_average=has_average),
        "fp8": {str(number): fp8_state.sharded_state(chunk) for number, chunk in enumerate(chunks)},
    }


def weights_of_chunks(chunks: list[DistributedDataParallel]) -> dict[str, Any]:
    """Those of a stage's chunks, by their number."""
    return {str(number): weights_of(chunk.module) for number, chunk in enumerate(chunks)}


def _tensors(state: dict) -> dict:
    """Without what TransformerEngine's and Megatron's modules keep beside their weights, as pickled objects."""
    return {name: value for name, value in state.items() if not name.endswith("._extra_state")}
