"""What a folder holds, told from its headers: a Hugging Face model, PEFT adapters, or a run or checkpoint of ours."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table

from nvembed_mcore.checkpoint import folders, fp8_state, store
from nvembed_mcore.checkpoint.averages import has_averages
from nvembed_mcore.checkpoint.best import BEST
from nvembed_mcore.checkpoint.hf_folder import (
    StoredTensor,
    WeightsError,
    read_header,
    read_headers,
    read_index,
    read_json,
)
from nvembed_mcore.checkpoint.hf_model import architecture_of
from nvembed_mcore.checkpoint.peft import ADAPTERS_FILE, FACTS_FILE, HEAD_FILE, SETTINGS_FILE
from nvembed_mcore.checkpoint.safetensors_stream import INDEX_FILE, SUMS_FILE
from nvembed_mcore.model.config_json import text_config

EMBEDDINGS = ("embed_tokens.", "embedding.word_embeddings.")
HEADS = ("latent_attention_model.", "pooling.")
_FILES = {  # what each kind should have besides its weights
    "model": ("config.json", "tokenizer.json", "tokenizer_config.json"),
    "adapters": (SETTINGS_FILE,),
}
_LAYER = re.compile(r"\blayers\.(\d+)\.")


def inspect_folder(path: str | os.PathLike) -> dict[str, Any]:
    """Describe a folder; no tensor is read.

    Returns:
        JSON values. `kind` (`Hugging Face model`, `PEFT adapters` or `checkpoint`), `path`, `architecture`, `tensors`
        (name -> `shape`, `dtype`), `parameters` (by part), `dtypes`, `bytes`, `files` (weights, with their bytes),
        `missing` (files, or parts of them, that such a folder should have), `about` (what else it says of itself,
        field -> value), `trained_from` (the folder it began with, that folder's, and so on).

    Raises:
        ConfigError, WeightsError, CheckpointError: there is no such folder, or it is neither kind, or damaged.
    """
    path = Path(path)
    if not path.is_dir() and path.name != BEST:
        raise WeightsError(f"no folder at {path}")
    if (path / SETTINGS_FILE).is_file():
        return _adapters(path)
    if (path / "config.json").is_file():
        return _model(path)
    checkpoint = store.find_checkpoint(path)
    if checkpoint is None:
        raise WeightsError(
            f"{path} is neither a Hugging Face folder (config.json, adapter_config.json) nor a run or checkpoint with "
            f"a complete checkpoint (manifest.json, checkpoints/)"
        )
    return _checkpoint(checkpoint)


def tables(found: dict[str, Any], *, all_tensors: bool = False) -> list[Table]:
    """What `inspect_folder` found, to be printed: the folder, its files, its tensors.

    Args:
        all_tensors: a line for each tensor; otherwise those that all layers have share one.
    """
    return [_overview(found), _file_table(found), _tensor_table(found["tensors"], all_tensors)]


def _overview(found: dict[str, Any]) -> Table:
    table = Table(title=f"{found['kind']}: {found['path']}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("architecture", str(found["architecture"]))
    for part, numbers in found["parameters"].items():
        if numbers:
            table.add_row(f"parameters, {part}", f"{numbers:,}")
    for dtype, numbers in found["dtypes"].items():
        table.add_row(f"numbers in {dtype}", f"{numbers:,}")
    for name, value in found["about"].items():
        table.add_row(name.replace("_", " "), value if isinstance(value, str) else json.dumps(value))
    if found["trained_from"]:
        table.add_row("trained from", "\n".join(found["trained_from"]))
    table.add_row("missing", ", ".join(found["missing"]) or "nothing")
    return table


def _file_table(found: dict[str, Any]) -> Table:
    table = Table("weight file", "MB")
    for name, size in found["files"].items():
        table.add_row(name, f"{size / 1e6:,.3f}")
    table.add_row("all", f"{found['bytes'] / 1e6:,.3f}")
    return table


def _tensor_table(tensors: dict[str, dict[str, Any]], all_tensors: bool) -> Table:
    groups: dict[tuple[str, str, str], int] = {}
    for name, tensor in tensors.items():
        shown = name if all_tensors else _LAYER.sub("layers.*.", name)
        key = (shown, " x ".join(map(str, tensor["shape"])), tensor["dtype"])
        groups[key] = groups.get(key, 0) + 1
    table = Table(Column("tensor", overflow="fold"), "shape", "dtype", "how many")
    for (name, shape, dtype), count in groups.items():
        table.add_row(name, shape, dtype, str(count))
    return table


def _model(path: Path) -> dict[str, Any]:
    config = read_json(path / "config.json")
    tensors, missing = _tensors(path)
    backbone = text_config(config, path / "config.json")
    fields = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "max_position_embeddings sliding_window rope_theta rope_parameters"
    ).split()
    about = {name: backbone[name] for name in fields if backbone.get(name) is not None}
    about |= {name: config[name] for name in ("pooling", "is_causal", "query_prompt") if name in config}
    if "latent_attention_config" in config:
        about["latent_attention_config"] = config["latent_attention_config"]
    if (path / SUMS_FILE).is_file():
        about["sums"] = SUMS_FILE
    architecture = architecture_of(config, path / "config.json")
    described = _described("Hugging Face model", path, architecture, tensors, "model")
    return described | {"missing": missing + described["missing"], "about": about, "trained_from": []}


def _tensors(path: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors of a model folder, and those of its weight files that are not there."""
    if not (path / INDEX_FILE).is_file():
        return read_headers(path), []
    files = sorted(set(read_index(path / INDEX_FILE).values()))
    missing = [file for file in files if not (path / file).is_file()]
    if not missing:
        return read_headers(path), []
    found: dict[str, StoredTensor] = {}
    for file in files:
        found |= {} if file in missing else read_header(path / file)
    return found, missing


def _adapters(path: Path) -> dict[str, Any]:
    config = read_json(path / SETTINGS_FILE)
    if not (path / ADAPTERS_FILE).is_file():
        raise WeightsError(f"{path} has no {ADAPTERS_FILE}")
    tensors = read_header(path / ADAPTERS_FILE)
    if (path / HEAD_FILE).is_file():
        tensors |= read_header(path / HEAD_FILE)
    fields = "peft_type r lora_alpha lora_dropout target_modules bias task_type".split()
    about = {name: config[name] for name in fields if config.get(name) is not None}
    about |= read_json(path / FACTS_FILE) if (path / FACTS_FILE).is_file() else {}
    return _described("PEFT adapters", path, config.get("peft_type"), tensors, "adapters") | {
        "about": about,
        "trained_from": _chain(config.get("base_model_name_or_path")),
    }


def _checkpoint(checkpoint: store.Checkpoint) -> dict[str, Any]:
    facts = checkpoint.facts
    config, model = facts["config"], facts["config"]["model"]
    stored = {store.parameter_name(name): one for name, one in store.stored_tensors(checkpoint).items()}
    files = {file.name: file.stat().st_size for file in sorted((checkpoint.path / "state").glob("*.distcp"))}
    histories = {name for name in stored if fp8_state.MARK in name}
    optimizer = {name for name in stored if name.startswith(("optimizer.", "chained_"))}
    described = _counted({name: one for name, one in stored.items() if name not in histories | optimizer})
    about = {"step": checkpoint.step}
    about |= {name: config[name] for name in ("stage", "steps", "seed", "precision", "parallel") if name in config}
    about |= {name: model[name] for name in ("pooling", "attention_mask", "lora") if model.get(name) is not None}
    about |= {name: facts[name] for name in ("hardware", "data", "tokenizer", "imported_from") if facts.get(name)}
    about["optimizer tensors"] = len(optimizer)
    if has_averages(checkpoint):
        about["weights averaged, decay"] = config["optim"]["ema_decay"]
    best = folders.best_of(checkpoint.path.parent)
    if best is not None and folders.is_of_run(checkpoint.path):
        about["best"] = f"step {best.step}, {best.metric} {best.value:.4f}"
    about |= {"tensors of FP8 histories": len(histories)} if histories else {}
    return {
        "kind": "checkpoint",
        "path": str(checkpoint.path),
        "architecture": facts.get("imported_from", {}).get("architecture", "Mistral encoder"),
        **described,
        "bytes": sum(files.values()),
        "files": files,
        "missing": [],  # a checkpoint that lacks something was refused
        "about": about,
        "trained_from": _chain(model.get("init_from") or model.get("config")),
    }


def _described(
    kind: str, path: Path, architecture: str, tensors: dict[str, StoredTensor], needed: str
) -> dict[str, Any]:
    files = {name: (path / name).stat().st_size for name in sorted({tensor.file for tensor in tensors.values()})}
    return {
        "kind": kind,
        "path": str(path),
        "architecture": architecture,
        **_counted({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}),
        "bytes": sum(files.values()),
        "files": files,
        "missing": [name for name in _FILES[needed] if not (path / name).is_file()],
    }


def _counted(tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Any]:
    """`tensors`, `parameters` by part and `dtypes`, of (shape, dtype) by name."""
    parts = dict.fromkeys(("embedding", "layers", "head", "adapters", "other"), 0)
    dtypes: dict[str, int] = {}
    listed = {}
    for name in sorted(tensors, key=_with_numbers):
        shape, dtype = tensors[name]
        numbers, kind = torch.Size(shape).numel(), str(dtype).removeprefix("torch.")
        parts[_part_of(name)] += numbers
        dtypes[kind] = dtypes.get(kind, 0) + numbers
        listed[name] = {"shape": list(shape), "dtype": kind}
    return {"tensors": listed, "parameters": {**parts, "all": sum(parts.values())}, "dtypes": dtypes}


def _with_numbers(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 10 behind layer 9."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in name.split(".")]


def _part_of(name: str) -> str:
    if "lora_" in name:
        return "adapters"
    if name.startswith(HEADS):
        return "head"
    if any(one in name for one in EMBEDDINGS):
        return "embedding"
    return "layers" if _LAYER.search(name) else "other"


def _chain(start: str | None) -> list[str]:
    """The folder that something was trained from, what that one was trained from, and so on, as far as they exist."""
    found: list[str] = []
    while start and start not in found:
        found.append(start)
        try:
            checkpoint = store.find_checkpoint(start)
        except store.CheckpointError:
            break
        model = checkpoint.facts["config"]["model"] if checkpoint else {}
        start = model.get("init_from") or model.get("config")
    return found
