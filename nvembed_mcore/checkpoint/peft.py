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
from safetensors.torch import save_file
from transformers import MistralConfig

from nvembed_mcore.checkpoint.hf_export import DTYPES, written_aside
from nvembed_mcore.checkpoint.hf_folder import HfFolder, WeightsError, read_header, read_json
from nvembed_mcore.checkpoint.hf_model import same_head
from nvembed_mcore.checkpoint.names import BACKBONE, HEAD, PROJECTIONS, name_table, to_hf
from nvembed_mcore.config import LoraConfig, ModelConfig, PoolingConfig

SETTINGS_FILE, ADAPTERS_FILE = "adapter_config.json", "adapter_model.safetensors"
HEAD_FILE, FACTS_FILE = "pooling_head.safetensors", "nvembed.json"
# A MistralModel's, a MistralForCausalLM's and an NV-Embed model's adapters.
_PREFIXES = ("base_model.model.", "base_model.model.model.", f"base_model.model.{BACKBONE}")
# Settings of PEFT that change what adapters compute, with the one value that means what ours compute.
_PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "use_rslora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layers_to_transform": None,
}


def open_peft_folder(model: ModelConfig, hf_config: MistralConfig, base: HfFolder | None) -> HfFolder:
    """Open `model.lora.init_from`, a folder of adapters.

    Args:
        base: the Hugging Face folder that the backbone comes from, if it comes from one.

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
        _check_facts(path, model, hf_config, base)
    tensors = read_header(path / ADAPTERS_FILE)
    fitting = [prefix for prefix in _PREFIXES if all(name.startswith(f"{prefix}layers.") for name in tensors)]
    prefix = (fitting or _PREFIXES)[0]
    table = name_table(hf_config, PoolingConfig(kind="mean"), lora)
    wanted = {name for entry in table if entry.is_adapter for name in entry.hf}
    for stored in tensors:
        if BACKBONE + stored.removeprefix(prefix) not in wanted:
            raise WeightsError(
                f"{path / ADAPTERS_FILE}: tensor {stored!r} is no adapter of a model with "
                f"{hf_config.num_hidden_layers} layers and model.lora.targets {', '.join(lora.targets)}"
            )
    if (path / HEAD_FILE).is_file():
        tensors |= read_header(path / HEAD_FILE)
    return HfFolder(path, tensors, prefix, may_lack=("backbone", "head"))


def _check_settings(file: Path, lora: LoraConfig) -> None:
    settings = read_json(file)
    for name, plain in _PLAIN.items():
        found = settings.get(name, plain)
        if found != plain and (found or plain):
            raise WeightsError(f"{file}: {name} is {found!r}; adapters here have {plain!r}")
    targets = settings.get("target_modules")
    short = {long.rpartition(".")[2]: name for name, long in PROJECTIONS.items()}
    if not isinstance(targets, list) or not set(targets) <= set(short):
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


def _check_facts(path: Path, model: ModelConfig, hf_config: MistralConfig, base: HfFolder | None) -> None:
    file = path / FACTS_FILE
    facts = read_json(file)
    try:
        made_on, mask, pooling = facts["base"], facts["attention_mask"], PoolingConfig(**facts["pooling"])
    except (KeyError, TypeError) as error:
        raise WeightsError(f"cannot read {file}: {error!r}") from error
    if mask != model.attention_mask:
        raise WeightsError(f"{file}: attention_mask is {mask!r}, model.attention_mask is {model.attention_mask!r}")
    if (path / HEAD_FILE).is_file() and not same_head(pooling, model.pooling, hf_config.hidden_size):
        raise WeightsError(f"{file}: the head is {pooling}, model.pooling is {model.pooling}")
    if made_on and base and made_on["fingerprint"] != (found := base_fingerprint(base, hf_config)):
        raise WeightsError(
            f"{file}: the adapters were trained on {made_on['name']} with weights {made_on['fingerprint']}, "
            f"model.init_from {base.path} has {found}"
        )


def base_fingerprint(base: HfFolder, hf_config: MistralConfig) -> str:
    """Short hash of a backbone: of every tensor's name and first row, in bfloat16, so that it is that of a copy in
    another dtype. It reads a thousandth of the folder, tells models apart, and proves no integrity."""
    digest = hashlib.sha256()
    for entry in name_table(hf_config, PoolingConfig(kind="mean")):
        for name, shape in entry.hf.items():
            row = base.read(name, shape)[:1].bfloat16().contiguous()
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
    base: dict[str, str] | None,
    dtype: str = "float32",
) -> None:
    """Write the adapters and the head; the folder appears whole or not at all.

    Args:
        read_global: parameter name of the encoder -> its whole tensor.
        base: `name` and `fingerprint` of the Hugging Face folder that the backbone came from, if it came from one.
        dtype: `float32`, `bfloat16` or `float16`, of the written tensors.

    Raises:
        ExportError: `output_dir` exists.
    """
    output_dir = Path(output_dir)
    facts = {"base": base, "pooling": dataclasses.asdict(pooling), "attention_mask": attention_mask}
    texts = {
        SETTINGS_FILE: json.dumps(_settings(lora, base), indent=2),
        FACTS_FILE: json.dumps(facts, indent=2),
        "README.md": _card(output_dir.name, pooling, attention_mask, base),
    }
    with written_aside(output_dir) as aside:
        tensors: dict[str, dict[str, torch.Tensor]] = {"adapters": {}, "head": {}}
        for entry in name_table(hf_config, pooling, lora):
            if entry.part in tensors:
                parts = to_hf(entry, read_global(entry.name).detach().to("cpu", DTYPES[dtype]))
                tensors[entry.part] |= parts
        prefix, adapters = _PREFIXES[0], tensors["adapters"]
        adapters = {prefix + name.removeprefix(BACKBONE): tensor for name, tensor in adapters.items()}
        save_file(adapters, aside / ADAPTERS_FILE, metadata={"format": "pt"})
        if tensors["head"]:
            save_file(tensors["head"], aside / HEAD_FILE, metadata={"format": "pt"})
        for name, text in texts.items():
            (aside / name).write_text(text + "\n", encoding="utf-8")


def _settings(lora: LoraConfig, base: dict[str, str] | None) -> dict[str, Any]:
    """`adapter_config.json`."""
    return {
        **{name: value for name, value in _PLAIN.items() if name not in ("use_dora", "use_rslora", "lora_bias")},
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": base["name"] if base else None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": [PROJECTIONS[name].rpartition(".")[2] for name in lora.targets],
        "inference_mode": True,
    }


def _card(name: str, pooling: PoolingConfig, attention_mask: str, base: dict[str, str] | None) -> str:
    is_causal = attention_mask == "causal"
    from_base = json.dumps(base["name"] if base else "the base model's folder")
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

Its last hidden states are those of the trained model. The embedding of a text is what the head makes of them: for
`mean`, their mean over the text's tokens, divided by its length; other heads have their weights in
`{HEAD_FILE}`, under the names of a full export (`{HEAD}*`)."""
