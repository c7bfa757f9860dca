"""What model a Hugging Face folder holds: its `config.json` against the headers of its weights, before any is read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from transformers import MistralConfig

from nvembed_mcore.checkpoint.export_metadata import SENTENCE_MODULE
from nvembed_mcore.checkpoint.hf_folder import HfFolder, WeightsError, open_hf_folder, read_json
from nvembed_mcore.checkpoint.names import BACKBONE, Entry, name_table
from nvembed_mcore.config import PoolingConfig
from nvembed_mcore.model.mistral import read_mistral_config

PUBLISHED_LATENT_ATTENTION = {"num_latents_value": 512, "num_cross_heads": 8, "cross_dim_head": 4096}
"""What the published NV-Embed's `latent_attention_config` means by what it leaves out: defaults of its class."""
NOT_NEEDED = ("lm_head.weight", "rotary_emb.inv_freq")
"""Ends of names that a Mistral checkpoint may have and an encoder has not."""
SENTENCE_MODULES = ("Transformer", "Pooling", "Normalize")
"""Modules of sentence-transformers that compute what an encoder of ours computes."""
KINDS = get_args(get_type_hints(PoolingConfig)["kind"])
_SAMPLE = 4096


@dataclass(frozen=True)
class HfModel:
    """A folder whose configuration and tensors agree.

    Attributes:
        hf_config: the backbone.
        pooling: the head and how it pools; None where the folder does not say, as a base model's.
        attention_mask: `bidirectional` or `causal`.
        architecture: the first of `architectures`.
    """

    folder: HfFolder
    hf_config: MistralConfig
    pooling: PoolingConfig | None
    attention_mask: str
    architecture: str

    @property
    def path(self) -> Path:
        return self.folder.path

    def entries(self) -> list[Entry]:
        """The name table's part that the folder holds."""
        return name_table(self.hf_config, self.pooling or PoolingConfig(kind="mean"))

    def fingerprint(self) -> str:
        """SHA-256 of `config.json` and of each tensor's name, shape, dtype and first numbers: two versions of a model
        differ in it. It says nothing of the numbers behind those."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for entry in self.entries():
            for name, shape in entry.hf.items():
                rows = -(-_SAMPLE // max(1, torch.Size(shape[1:]).numel()))
                numbers = self.folder.read(name, shape)[:rows].contiguous()
                digest.update(f"{name} {shape} {numbers.dtype}".encode())
                digest.update(memoryview(numbers.view(-1)[:_SAMPLE].view(torch.uint8).numpy()))
        return digest.hexdigest()


def open_hf_model(path: str | os.PathLike) -> HfModel:
    """Open a folder of a Mistral base model, of NV-Embed, or of one of our exports, and check all that headers tell.

    Raises:
        ConfigError: `config.json` describes another architecture, or contradicts itself.
        WeightsError: weights are missing, unreadable, unknown, or of other shapes than `config.json` says.
    """
    folder = open_hf_folder(path)
    hf_config = read_mistral_config(path)
    check_modules(folder.path / "modules.json")
    file = folder.path / "config.json"
    raw = read_json(file)
    check_implementations(raw, file)
    pooling = _pooling(raw, folder.path)
    is_causal = raw.get("is_causal", raw.get("model_type") == "mistral")
    if not isinstance(is_causal, bool):
        raise WeightsError(f"{file}: is_causal must be true or false, got {is_causal!r}")
    mask = "causal" if is_causal else "bidirectional"
    model = HfModel(folder, hf_config, pooling, mask, architecture_of(raw, file))
    _check_tensors(model)
    return model


def architecture_of(config: dict[str, Any], file: Path) -> str | None:
    """The first of `architectures`; where there is none, `model_type`. `file`, for messages, holds `config`."""
    named = config.get("architectures") or [config.get("model_type")]
    if not isinstance(named, list):
        raise WeightsError(f"{file}: architectures must be a list of names, got {named!r}")
    return named[0]


def same_head(one: PoolingConfig, other: PoolingConfig, hidden: int) -> bool:
    """Whether weights of one head are weights of the other: the same parameters, used in the same way."""
    return _head_facts(one, hidden) == _head_facts(other, hidden)


def check_pooling(model: HfModel, pooling: PoolingConfig) -> None:
    """Raise a `WeightsError` when the folder has a head that is not the one of the run's `model.pooling`."""
    has_head = any(entry.is_head for entry in model.entries())
    if has_head and not same_head(model.pooling, pooling, model.hf_config.hidden_size):
        found, wanted = dataclasses.asdict(model.pooling), dataclasses.asdict(pooling)
        lines = [f"\n  {key}: {found[key]!r} -> {wanted[key]!r}" for key in wanted if found[key] != wanted[key]]
        raise WeightsError(f"{model.path} has another head than model.pooling (folder -> now):{''.join(lines)}")


def _head_facts(pooling: PoolingConfig, hidden: int) -> dict[str, Any]:
    """What makes a head's weights what they are."""
    facts = dataclasses.asdict(pooling) | {"head_width": pooling.head_width or hidden}
    del facts["initializer_range"]
    if pooling.kind in ("mean", "last"):
        return {}
    if pooling.kind != "latent":
        del facts["num_latents"]
    return facts


def _pooling(raw: dict[str, Any], path: Path) -> PoolingConfig | None:
    if raw.get("model_type") == "nvembed":
        return _nv_embed_pooling(raw, path / "config.json")
    modules = path / "1_Pooling" / "config.json"  # sentence-transformers'
    if not modules.is_file():
        return None
    modes = read_json(modules)
    # Since version 6 one field, before one for each mode.
    mode = modes.get("pooling_mode") or [name for name, value in modes.items() if value is True and "_mode_" in name]
    if mode in ("mean", ["pooling_mode_mean_tokens"]):
        # The library's default is true; without prompts it means nothing.
        if modes.get("include_prompt", True) is not False and _has_prompts(path):
            raise WeightsError(
                f"{modules} has include_prompt true: it pools the tokens of prompts, which are masked here"
            )
        return PoolingConfig(kind="mean")
    if mode in ("lasttoken", ["pooling_mode_lasttoken"]):
        return PoolingConfig(kind="last")
    raise WeightsError(f"{modules} asks for neither the mean of the tokens nor the last token: {mode}")


def _nv_embed_pooling(raw: dict[str, Any], file: Path) -> PoolingConfig:
    """The head of `config.json`; what the published class does otherwise when told so, ours cannot do."""
    kind = raw.get("pooling", "latent")
    if kind not in KINDS:
        raise WeightsError(f"{file}: pooling is {kind!r}, known are {', '.join(KINDS)}")
    given = raw.get("latent_attention_config") or {}
    if not isinstance(given, dict):
        raise WeightsError(f"{file}: latent_attention_config must be an object, got {given!r}")
    for name, holder in (("is_mask_instruction", raw), ("output_normalize", given)):
        if holder.get(name, True) is not True:
            raise WeightsError(f"{file}: {name} is {holder[name]!r}, this trainer's models have true")
    latent = PUBLISHED_LATENT_ATTENTION | given
    for name in PUBLISHED_LATENT_ATTENTION:
        if type(latent[name]) is not int or latent[name] < 1:
            raise WeightsError(
                f"{file}: latent_attention_config.{name} must be an integer of at least 1, got {latent[name]!r}"
            )
    return PoolingConfig(
        kind=kind,
        num_latents=latent["num_latents_value"],
        num_heads=latent["num_cross_heads"],
        head_width=latent["cross_dim_head"],
    )


def _has_prompts(path: Path) -> bool:
    """Whether sentence-transformers would put a prompt in front of some texts."""
    file = path / "config_sentence_transformers.json"
    prompts = read_json(file).get("prompts") if file.is_file() else None
    return any(prompts.values()) if isinstance(prompts, dict) else bool(prompts)


def check_modules(file: Path) -> bool:
    """Whether there is a `modules.json`; one that would make sentence-transformers run foreign code, or a module that
    changes what is pooled (`Dense`), is refused: what it does with vectors would be lost."""
    if not file.is_file():
        return False
    try:
        types = [module["type"] for module in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"cannot read {file}: {error!r}") from error
    for number, name in enumerate(types):
        library, _, kind = str(name).rpartition(".")
        is_known = library.split(".")[0] == "sentence_transformers" and kind in SENTENCE_MODULES
        if name != SENTENCE_MODULE and not is_known:
            raise WeightsError(
                f"{file}: module {number} is of type {name!r}; types {', '.join(SENTENCE_MODULES)} of "
                f"sentence_transformers and {SENTENCE_MODULE!r} are accepted"
            )
    return True


def check_implementations(values: Any, file: Path, name: str = "") -> None:
    """Refuse a `config.json` that names code on a hub: transformers fetches and runs what stands as `owner/name` under
    `attn_implementation` and its like, whatever else it was told (CVE-2026-4372)."""
    if isinstance(values, dict):
        for key, value in values.items():
            check_implementations(value, file, name if "_implementation" in name else str(key))
    elif "_implementation" in name and "/" in str(values):
        raise WeightsError(f"{file}: {name} is {values!r}, which is code on a hub; nothing of it is fetched or run")


def _check_tensors(model: HfModel) -> None:
    folder = model.folder
    embedding = folder.tensors[folder.stored_name(f"{BACKBONE}embed_tokens.weight")]
    if embedding.shape[:1] != (model.hf_config.vocab_size,):
        raise WeightsError(
            f"{folder.path / embedding.file}: tensor 'embed_tokens.weight' has shape {list(embedding.shape)}, "
            f"{folder.path / 'config.json'} says vocab_size is {model.hf_config.vocab_size}"
        )
    known = set()
    for entry in model.entries():
        for name, shape in entry.hf.items():
            folder.check(name, shape)
            known.add(folder.stored_name(name))
    unknown = sorted(name for name in folder.tensors if name not in known and not name.endswith(NOT_NEEDED))
    if unknown:
        file = folder.path / folder.tensors[unknown[0]].file
        raise WeightsError(
            f"{file} holds tensor {unknown[0]!r}, which the model of {folder.path / 'config.json'} does not have "
            f"(one of {len(unknown)} such tensors)"
        )


def check_token_ids(tokenizer_dir: str | os.PathLike, model: HfModel) -> bool:
    """Whether the folder has a `tokenizer.json`; raises a `WeightsError` when it has ids that the model has not."""
    largest, size = largest_token_id(tokenizer_dir), model.hf_config.vocab_size
    if largest is not None and largest >= size:
        raise WeightsError(
            f"{Path(tokenizer_dir) / 'tokenizer.json'} has ids up to {largest}, {model.path / 'config.json'} says "
            f"vocab_size is {size}"
        )
    return largest is not None


def largest_token_id(tokenizer_dir: str | os.PathLike) -> int | None:
    """The largest id of a folder's `tokenizer.json`; None where there is no such file.

    Raises:
        WeightsError: the file cannot be read, or has no ids.
    """
    file = Path(tokenizer_dir) / "tokenizer.json"
    if not file.is_file():
        return None
    backend = read_json(file)
    try:
        vocabulary = backend["model"]["vocab"]
        ids: Iterable[int] = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        return max(map(operator.index, [*ids, *(token["id"] for token in backend["added_tokens"])]))
    except (KeyError, TypeError, ValueError) as error:  # the last: there are none
        raise WeightsError(f"cannot read {file}: {error!r}") from error
