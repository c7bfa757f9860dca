"""Adapters as a PEFT folder, out and in.

    adapter_config.json, adapter_model.safetensors    what `peft` loads on a plain Hugging Face `MistralModel`
    pooling_head.safetensors                          the trained head in NV-Embed's names, where it has weights
    nvembed.json                                      the base (its name and fingerprint), pooling and mask

Tensors have PEFT's names: `base_model.model.`, then the projection as its base has it, then `lora_A` or `lora_B`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import MistralConfig

from nvembed_mcore import redact
from nvembed_mcore.checkpoint.hf_export import DTYPES, written_aside
from nvembed_mcore.checkpoint.hf_folder import HfFolder, WeightsError, check_sums, read_header, read_json
from nvembed_mcore.checkpoint.hf_import import RandomWeights
from nvembed_mcore.checkpoint.hf_model import same_head
from nvembed_mcore.checkpoint.names import BACKBONE, HEAD, LORA_A, PROJECTIONS, Entry, name_table, to_hf
from nvembed_mcore.checkpoint.safetensors_stream import SUMS_FILE, write_safetensors
from nvembed_mcore.config import LoraConfig, ModelConfig, PoolingConfig

SETTINGS_FILE, ADAPTERS_FILE = "adapter_config.json", "adapter_model.safetensors"
HEAD_FILE, FACTS_FILE = "pooling_head.safetensors", "nvembed.json"
# A MistralModel's, a MistralForCausalLM's and an NV-Embed model's adapters.
_PREFIXES = ("base_model.model.", "base_model.model.model.", f"base_model.model.{BACKBONE}")
# Settings of PEFT that say nothing of what adapters compute, or are compared on their own. All others must be unset.
_READ_APART = {"r", "lora_alpha", "target_modules", "peft_type", "bias", "init_lora_weights"}
_HARMLESS = {
    *("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version"),
    *("lora_dropout", "layers_pattern", "megatron_config", "megatron_core", "qalora_group_size", "eva_config"),
    *("runtime_config", "ensure_weight_tying"),
}
# Other ways to begin change the base's own weights.
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


def open_peft_folder(model: ModelConfig, hf_config: MistralConfig, fingerprint: str) -> HfFolder:
    """Open `model.lora.init_from`, a folder of adapters.

    Args:
        fingerprint: of the backbone that the run starts with.

    Raises:
        WeightsError: the folder is missing or damaged; its adapters are of another kind, rank, scale or of other
            projections than `model.lora` says; or it has tensors that no adapter of this model has. Of folders written
            here more is known: the weights of the base, the head and the mask must be the same too.
    """
    lora = model.lora
    path = Path(lora.init_from)
    if not (path / SETTINGS_FILE).is_file():
        raise WeightsError(f"model.lora.init_from: no PEFT folder at {path} ({SETTINGS_FILE} is missing)")
    _check_settings(path / SETTINGS_FILE, lora)
    if not (path / ADAPTERS_FILE).is_file():
        pickled = " and adapter_model.bin, which can run code when loaded, is not read"
        has_pickled = (path / "adapter_model.bin").is_file()
        raise WeightsError(f"{path} has no {ADAPTERS_FILE}{pickled if has_pickled else ''}")
    if (path / FACTS_FILE).is_file():
        _check_facts(path, model, hf_config, fingerprint)
    check_sums(path, (ADAPTERS_FILE, HEAD_FILE))
    tensors = read_header(path / ADAPTERS_FILE)
    fitting = [prefix for prefix in _PREFIXES if all(name.startswith(f"{prefix}layers.") for name in tensors)]
    prefix = (fitting or _PREFIXES)[0]
    table = name_table(hf_config, model.pooling, lora)
    adapters, heads = ({name for one in table if one.part == part for name in one.hf} for part in ("adapters", "head"))
    for stored in tensors:
        if not stored.startswith(prefix) or BACKBONE + stored.removeprefix(prefix) not in adapters:
            raise WeightsError(
                f"{path / ADAPTERS_FILE}: tensor {stored!r} is no adapter of a model with "
                f"{hf_config.num_hidden_layers} layers and model.lora.targets {', '.join(lora.targets)}; those are "
                f"called {prefix}layers.0.{PROJECTIONS[lora.targets[0]]}{LORA_A} and so on"
            )
    if has_head(path):
        head = read_header(path / HEAD_FILE)
        if unknown := sorted(head.keys() - heads):
            raise WeightsError(
                f"{path / HEAD_FILE}: tensor {unknown[0]!r} is none of a head of kind {model.pooling.kind!r} "
                f"(model.pooling)"
            )
        tensors |= head
    return HfFolder(path, tensors, prefix, may_lack=("backbone", "head"))


def has_head(path: str | os.PathLike) -> bool:
    """Whether a PEFT folder brings a head with weights."""
    return (Path(path) / HEAD_FILE).is_file()


def _check_settings(file: Path, lora: LoraConfig) -> None:
    settings = read_json(file)
    for name, plain in (("peft_type", "LORA"), ("bias", "none")):
        if settings.get(name, plain) != plain:
            raise WeightsError(f"{file}: {name} is {settings[name]!r}; adapters here have {plain!r}")
    if settings.get("init_lora_weights") not in _STARTS:
        raise WeightsError(
            f"{file}: init_lora_weights is {settings['init_lora_weights']!r}, which changes the base's weights too"
        )
    for name, value in settings.items():
        if value and name not in _HARMLESS | _READ_APART:
            raise WeightsError(f"{file}: {name} is {value!r}; adapters here do not have it")
    targets = settings.get("target_modules")
    short = {long.rpartition(".")[2]: name for name, long in PROJECTIONS.items()}
    if not isinstance(targets, list) or not all(isinstance(one, str) and one in short for one in targets):
        raise WeightsError(f"{file}: target_modules is {targets!r}, it must list some of {', '.join(short)}")
    found = {
        "rank": settings.get("r"),
        "alpha": settings.get("lora_alpha"),
        "targets": sorted(short[target] for target in targets),
    }
    wanted = {"rank": lora.rank, "alpha": lora.alpha, "targets": sorted(lora.targets)}
    for name, value in wanted.items():
        if found[name] != value:
            raise WeightsError(f"{file}: {name} is {found[name]!r}, model.lora.{name} is {value!r}")


def _check_facts(path: Path, model: ModelConfig, hf_config: MistralConfig, fingerprint: str) -> None:
    file = path / FACTS_FILE
    facts = read_json(file)
    try:
        name, made_on = facts["base"]["name"], facts["base"]["fingerprint"]
        mask, pooling = facts["attention_mask"], PoolingConfig(**facts["pooling"])
    except (KeyError, TypeError) as error:
        raise WeightsError(f"cannot read {file}: {error!r}") from error
    if mask != model.attention_mask:
        raise WeightsError(f"{file}: attention_mask is {mask!r}, model.attention_mask is {model.attention_mask!r}")
    if has_head(path) and not same_head(pooling, model.pooling, hf_config.hidden_size):
        raise WeightsError(f"{file}: the head is {pooling}, model.pooling is {model.pooling}")
    if made_on != fingerprint:
        raise WeightsError(
            f"{file}: the adapters were trained on {name or 'a base'} with weights {made_on}, the weights of "
            f"{model.init_from or model.config} are {fingerprint} (so are those of a copy in bfloat16 or float32, but "
            f"not in float16)"
        )


Parts = Callable[[Entry], dict[str, torch.Tensor]]
"""The Hugging Face tensors of a parameter, or something of them that slices to a tensor."""


def parts_from(source: HfFolder | RandomWeights) -> Parts:
    """Out of what a run may start from."""
    return lambda entry: {name: source.read(name, shape) for name, shape in entry.hf.items()}


def parts_in(read_global: Callable[[str], torch.Tensor]) -> Parts:
    """Out of whole parameters by the encoder's names."""
    return lambda entry: to_hf(entry, read_global(entry.name))


def base_fingerprint(parts: Parts, hf_config: MistralConfig) -> str:
    """Short hash of a backbone: of every tensor's name and first row in bfloat16, so that it is that of a copy in
    bfloat16 or float32 too. It tells models apart, and proves no integrity."""
    digest = hashlib.sha256()
    for entry in name_table(hf_config, PoolingConfig(kind="mean")):
        for name, tensor in parts(entry).items():
            row = tensor[:1].bfloat16().contiguous()
            digest.update(name.encode() + row.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def export_peft(
    read_global: Callable[[str], torch.Tensor],
    hf_config: MistralConfig,
    pooling: PoolingConfig,
    lora: LoraConfig,
    output_dir: str | os.PathLike,
    *,
    attention_mask: str,
    base_name: str | None,
    dtype: str = "float32",
) -> None:
    """Write the adapters and the head; the folder appears whole or not at all.

    Args:
        read_global: parameter name of the encoder -> its whole tensor; of the backbone too, whose fingerprint goes in.
        base_name: the Hugging Face folder that has this backbone, if one is known.
        dtype: `float32`, `bfloat16` or `float16`, of the written tensors.

    Raises:
        ExportError: `output_dir` exists.
        ValueError: a number is not finite, or does not fit `dtype`.
    """
    output_dir, base_name = Path(output_dir), redact.tree(base_name)
    with written_aside(output_dir) as aside:
        table, sums = name_table(hf_config, pooling, lora), ""
        for part, file in (("adapters", ADAPTERS_FILE), ("head", HEAD_FILE)):
            entries = [entry for entry in table if entry.part == part]
            if entries:
                shapes = {_peft_name(name): shape for entry in entries for name, shape in entry.hf.items()}
                tensors = (
                    (_peft_name(name), tensor)
                    for entry in entries
                    for name, tensor in to_hf(entry, read_global(entry.name)).items()
                )
                sums += f"{write_safetensors(aside / file, shapes, DTYPES[dtype], tensors)}  {file}\n"
        base = {"name": base_name, "fingerprint": base_fingerprint(parts_in(read_global), hf_config)}
        facts = {"base": base, "pooling": dataclasses.asdict(pooling), "attention_mask": attention_mask}
        texts = {
            SETTINGS_FILE: json.dumps(_settings(lora, base_name), indent=2) + "\n",
            FACTS_FILE: json.dumps(facts, indent=2) + "\n",
            SUMS_FILE: sums,
            "README.md": _card(output_dir.name, pooling, attention_mask, base_name),
        }
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8")


def _peft_name(hf_name: str) -> str:
    """As `peft` has it on a MistralModel; the head keeps its names."""
    return _PREFIXES[0] + hf_name.removeprefix(BACKBONE) if hf_name.startswith(BACKBONE) else hf_name


def _settings(lora: LoraConfig, base_name: str | None) -> dict[str, Any]:
    """`adapter_config.json`."""
    return {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": base_name,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": [PROJECTIONS[name].rpartition(".")[2] for name in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _card(name: str, pooling: PoolingConfig, attention_mask: str, base_name: str | None) -> str:
    is_causal = attention_mask == "causal"
    from_base = json.dumps(base_name or "folder of an export of the stage before")
    return f"""---
library_name: peft
---

# {name}

Low-rank adapters of a text embedding model with `{pooling.kind}` pooling, trained with nvembed_mcore.

```python
from peft import PeftModel
from transformers import AutoConfig, AutoModel
config = AutoConfig.from_pretrained({from_base})
config.is_causal = {is_causal}  # obeyed by transformers 5
model = PeftModel.from_pretrained(AutoModel.from_pretrained({from_base}, config=config), "{name}").eval()
```

The base is taken as a plain `MistralModel`; of a model in NV-Embed's form it is the part `embedding_model`, with
`embedding_model.config.is_causal = {is_causal}`. The last hidden states are those of the trained model. The embedding
of a text is what the head makes of them: for `mean`, their mean over the text's tokens, divided by its length; other
heads have their weights in `{HEAD_FILE}`, under the names of a full export (`{HEAD}*`).
"""
