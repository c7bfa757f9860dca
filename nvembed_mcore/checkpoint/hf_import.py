"""Weights from a Hugging Face folder, or random ones, into the encoder: streamed, and each rank reads only its slices.

Two sources have the same interface (`has`, `read`): `HfFolder` reads safetensors, `RandomWeights` draws each tensor
from a generator of its own. Both speak NV-Embed's names.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from nvembed_mcore.checkpoint.names import BACKBONE, HEAD, LORA_A, LORA_B, Entry, local_shard
from nvembed_mcore.config import PoolingConfig

if TYPE_CHECKING:
    from nvembed_mcore.checkpoint.peft import PeftFolder

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


class WeightsError(ValueError):
    """A folder of weights cannot be used; the message names the file, the tensor and both values."""


def list_tensors(file: Path) -> list[str]:
    """Names of a safetensors file's tensors; raises `WeightsError` where it cannot be read."""
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"cannot read {file}: {error}") from error


def open_slice(file: Path, name: str, shape: tuple[int, ...], opened: dict[Path, Any]) -> Any:
    """A safetensors slice of a tensor: nothing is read before it is indexed.

    Args:
        opened: files that stay open between calls.

    Raises:
        WeightsError: the tensor or its file is missing, damaged or of another shape.
    """
    try:
        if file not in opened:
            opened[file] = safe_open(file, framework="pt")
        tensor = opened[file].get_slice(name)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"cannot read tensor {name!r} from {file}: {error}") from error
    found = tuple(tensor.get_shape())
    if found != tuple(shape):
        raise WeightsError(f"{file}: tensor {name!r} has shape {list(found)}, the model needs {list(shape)}")
    return tensor


class HfFolder:
    """The tensors of a Hugging Face folder, by NV-Embed's names whatever prefix the folder has.

    An NV-Embed folder has `embedding_model.*` and `latent_attention_model.*`, a `MistralForCausalLM` has `model.*`, a
    `MistralModel` bare names; `lm_head.weight` is left alone.
    """

    may_lack = ("head", "adapters")

    def __init__(self, path: Path, files: dict[str, str]) -> None:
        """`files`: tensor name -> file name inside `path`."""
        self.path, self.files = path, files
        self.prefix = self._backbone_prefix()
        self._open: dict[Path, Any] = {}

    def _backbone_prefix(self) -> str:
        for prefix in (BACKBONE, "model.", ""):
            if f"{prefix}embed_tokens.weight" in self.files:
                return prefix
        some = ", ".join(sorted(self.files)[:3])
        raise WeightsError(
            f"{self.path} holds no Mistral backbone: embed_tokens.weight is missing under each of the prefixes "
            f"'embedding_model.', 'model.' and none; its tensors start with {some or 'nothing'}"
        )

    def _stored_name(self, hf_name: str) -> str:
        return self.prefix + hf_name[len(BACKBONE) :] if hf_name.startswith(BACKBONE) else hf_name

    def has(self, hf_name: str) -> bool:
        """Whether the folder has the tensor that NV-Embed calls `hf_name`."""
        return self._stored_name(hf_name) in self.files

    def read(self, hf_name: str, shape: tuple[int, ...]) -> Any:
        """A safetensors slice of a tensor: nothing is read before it is indexed.

        Raises:
            WeightsError: the tensor or its file is missing, damaged or of another shape.
        """
        stored = self._stored_name(hf_name)
        if stored not in self.files:
            raise WeightsError(f"{self.path} has no tensor {stored!r} of shape {list(shape)}")
        return open_slice(self.path / self.files[stored], stored, shape, self._open)


class RandomWeights:
    """Initial weights that depend on the seed and on a tensor's Hugging Face name alone, not on the layout.

    Backbone: normal(0, `initializer_range`) for the embedding and linears. Head: latents and the embedding of layers
    normal(0, 1) and linears as torch makes them (uniform within 1/sqrt(inputs), weights and biases), which is what
    NV-Embed's code does; with `pooling.initializer_range` set, linears and the embedding of layers are normal with
    that deviation and biases zero. Norms are one, and zero where they have a bias. Adapters as PEFT makes them: A like
    torch's linears, B zero.
    """

    may_lack = ()

    def __init__(self, entries: Iterable[Entry], seed: int, initializer_range: float, pooling: PoolingConfig) -> None:
        self.shapes = {name: shape for entry in entries for name, shape in entry.hf.items()}
        self.seed, self.initializer_range, self.pooling = seed, initializer_range, pooling

    def has(self, hf_name: str) -> bool:
        """Whether the table names this tensor."""
        return hf_name in self.shapes

    def read(self, hf_name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The whole tensor, float32 on the CPU."""
        if hf_name.endswith(LORA_B):  # so that the model starts as its base
            return torch.zeros(shape)
        module, kind = hf_name.rsplit(".", 1)
        if "norm" in module.rsplit(".", 1)[-1]:
            return torch.ones(shape) if kind == "weight" else torch.zeros(shape)
        if kind == "latents":
            return torch.randn(shape, generator=self._generator(hf_name))
        deviation = self.pooling.initializer_range if hf_name.startswith(HEAD) else self.initializer_range
        if module.endswith(".layer_embedding"):
            return self._normal(hf_name, shape, 1.0 if deviation is None else deviation)
        if deviation is not None and not hf_name.endswith(LORA_A):
            is_bias = kind == "bias"
            return torch.zeros(shape) if is_bias else self._normal(hf_name, shape, deviation)
        bound = 1 / math.sqrt(self.shapes[f"{module}.weight"][1])
        return torch.empty(shape).uniform_(-bound, bound, generator=self._generator(hf_name))

    def _normal(self, hf_name: str, shape: tuple[int, ...], deviation: float) -> torch.Tensor:
        return torch.empty(shape).normal_(0.0, deviation, generator=self._generator(hf_name))

    def _generator(self, hf_name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}:{hf_name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def open_hf_folder(path: str | os.PathLike) -> HfFolder:
    """Open a folder with `config.json` and either `model.safetensors` or shards with their index.

    Raises:
        WeightsError: the folder, its configuration or its weights are missing or unreadable, or the weights are only
            there as pickled `.bin` files, which are never loaded.
    """
    path = Path(path)
    if not path.is_dir():
        raise WeightsError(f"no Hugging Face folder at {path}")
    if not (path / "config.json").is_file():
        raise WeightsError(f"{path} has no config.json")
    if (path / INDEX_FILE).is_file():
        return HfFolder(path, _read_index(path))
    if (path / SINGLE_FILE).is_file():
        return HfFolder(path, dict.fromkeys(list_tensors(path / SINGLE_FILE), SINGLE_FILE))
    if any(path.glob("*.bin")):
        raise WeightsError(
            f"{path} has only pickled weights (.bin), which can run code when loaded; convert them to safetensors"
        )
    raise WeightsError(f"{path} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def _read_index(path: Path) -> dict[str, str]:
    """`weight_map` of the index; every file it names lies in the folder itself."""
    index = path / INDEX_FILE
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"cannot read {index}: {error!r}") from error
    if not isinstance(files, dict):
        raise WeightsError(f"{index}: weight_map must map tensors to files, got {type(files).__name__}")
    for file in sorted({str(file) for file in files.values()}):
        if file != os.path.basename(file) or not file.endswith(".safetensors"):
            raise WeightsError(f"{index} names {file!r}, which is not a safetensors file of the folder")
        if not (path / file).is_file():
            raise WeightsError(f"{index} names {file}, which is not in the folder")
    return files


def load_weights(
    source: HfFolder | PeftFolder | RandomWeights,
    entries: Iterable[Entry],
    assign: Callable[[str, torch.Tensor], None],
    tp_rank: int,
    tp_size: int,
) -> set[str]:
    """Hand each wanted parameter's local tensor to `assign`, one after the other.

    Args:
        entries: what this rank holds (its pipeline stage's part of the name table).
        assign: called with the parameter's name and its local tensor, in the source's dtype.

    Returns:
        Names of the parameters that the source does not have; `assign` was not called for them. They are those of
        whole parts (backbone, head, adapters) that it may lack; some of a part and not all is an error.

    Raises:
        WeightsError: a tensor of a part that the source has or must have is missing, or it has the wrong shape.
    """
    entries = list(entries)
    has = {entry.part for entry in entries if any(source.has(name) for name in entry.hf)}
    missing = set()
    for entry in entries:
        if entry.part not in has and entry.part in source.may_lack:
            missing.add(entry.name)
            continue
        assign(entry.name, local_shard(entry, lambda name, e=entry: source.read(name, e.hf[name]), tp_rank, tp_size))
    return missing


def load_hf_weights(
    path: str | os.PathLike,
    entries: Iterable[Entry],
    assign: Callable[[str, torch.Tensor], None],
    tp_rank: int = 0,
    tp_size: int = 1,
) -> set[str]:
    """`load_weights` from a Hugging Face folder."""
    return load_weights(open_hf_folder(path), entries, assign, tp_rank, tp_size)
