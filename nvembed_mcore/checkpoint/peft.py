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
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import MistralConfig

from nvembed_mcore.checkpoint.hf_export import DTYPES, ExportError
from nvembed_mcore.checkpoint.hf_import import HfFolder, WeightsError, list_tensors, open_slice
from nvembed_mcore.checkpoint.names import BACKBONE, HEAD, PROJECTIONS, name_table, to_hf
from nvembed_mcore.config import LoraConfig, PoolingConfig

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


class PeftFolder:
    """The tensors of a PEFT folder by NV-Embed's names; a source for `hf_import.load_weights`."""

    may_lack = ("backbone", "head")

    def __init__(self, path: Path, places: dict[str, tuple[Path, str]]) -> None:
        """`places`: NV-Embed's name -> file and the tensor's name in it."""
        self.path, self.places = path, places
        self._open: dict[Path, Any] = {}

    def has(self, hf_name: str) -> bool:
        """Whether the folder has the tensor."""
        return hf_name in self.places

    def read(self, hf_name: str, shape: tuple[int, ...]) -> Any:
        """A safetensors slice; raises `WeightsError` where the tensor is missing, damaged or of another shape."""
        if hf_name not in self.places:
            raise WeightsError(f"{self.path} has no tensor for {hf_name!r} of shape {list(shape)}")
        file, stored = self.places[hf_name]
        return open_slice(file, stored, shape, self._open)


def open_peft_folder(
    path: str | os.PathLike, lora: LoraConfig, hf_config: MistralConfig, base: HfFolder | None
) -> PeftFolder:
    """Open a folder of adapters for `lora` on a model of this architecture.

    Args:
        base: the Hugging Face folder that the backbone comes from, if it comes from one.

    Raises:
        WeightsError: the folder is missing or damaged; its adapters are of another kind, rank, scale or of other
            projections than `lora` says; it has tensors that no adapter of this model has; or it was made on another
            base (known for folders written here, which hold the base's fingerprint).
    """
    path = Path(path)
    if not (path / SETTINGS_FILE).is_file():
        raise WeightsError(f"model.lora.init_from: no PEFT folder at {path} ({SETTINGS_FILE} is missing)")
    _check_settings(path / SETTINGS_FILE, lora)
    if not (path / ADAPTERS_FILE).is_file():
        pickled = " and adapter_model.bin, which can run code when loaded, is not read"
        has_pickled = (path / "adapter_model.bin").is_file()
        raise WeightsError(f"{path} has no {ADAPTERS_FILE}{pickled if has_pickled else ''}")
    _check_base(path / FACTS_FILE, hf_config, base)
    wanted = {name for entry in name_table(hf_config, PoolingConfig(), lora) if entry.is_adapter for name in entry.hf}
    places = {}
    for stored in list_tensors(path / ADAPTERS_FILE):
        name = BACKBONE + _within_backbone(stored)
        if name not in wanted:
            raise WeightsError(
                f"{path / ADAPTERS_FILE}: tensor {stored!r} is no adapter of a model with "
                f"{hf_config.num_hidden_layers} layers and model.lora.targets {', '.join(lora.targets)}"
            )
        places[name] = (path / ADAPTERS_FILE, stored)
    if (path / HEAD_FILE).is_file():
        places |= {name: (path / HEAD_FILE, name) for name in list_tensors(path / HEAD_FILE)}
    return PeftFolder(path, places)


def _within_backbone(stored: str) -> str:
    """A PEFT tensor's name without the prefix that its base's class gives it."""
    for prefix in reversed(_PREFIXES):
        if stored.startswith(prefix):
            return stored.removeprefix(prefix)
    return stored


def _check_settings(file: Path, lora: LoraConfig) -> None:
    settings = _read_json(file)
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


def _check_base(file: Path, hf_config: MistralConfig, base: HfFolder | None) -> None:
    made_on = _read_json(file).get("base") if file.is_file() else None
    if not made_on or base is None:
        return
    found = base_fingerprint(base, hf_config)
    if made_on["fingerprint"] != found:
        raise WeightsError(
            f"{file}: the adapters were trained on {made_on['name']} with weights {made_on['fingerprint']}, "
            f"model.init_from {base.path} has {found}"
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


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
    if output_dir.exists():
        raise ExportError(f"export folder {output_dir} exists; choose another or remove it")
    tensors: dict[str, dict[str, torch.Tensor]] = {"adapters": {}, "head": {}}
    for entry in name_table(hf_config, pooling, lora):
        if entry.part in tensors:
            parts = to_hf(entry, read_global(entry.name).detach().to("cpu", DTYPES[dtype]))
            tensors[entry.part] |= parts
    adapters = {_PREFIXES[0] + name.removeprefix(BACKBONE): tensor for name, tensor in tensors["adapters"].items()}
    facts = {"base": base, "pooling": dataclasses.asdict(pooling), "attention_mask": attention_mask}
    texts = {
        SETTINGS_FILE: json.dumps(_settings(lora, base), indent=2),
        FACTS_FILE: json.dumps(facts, indent=2),
        "README.md": _card(output_dir.name, pooling, attention_mask, base),
    }
    aside = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.partial")
    aside.mkdir(parents=True)
    try:
        save_file(adapters, aside / ADAPTERS_FILE, metadata={"format": "pt"})
        if tensors["head"]:
            save_file(tensors["head"], aside / HEAD_FILE, metadata={"format": "pt"})
        for name, text in texts.items():
            (aside / name).write_text(text + "\n", encoding="utf-8")
        aside.rename(output_dir)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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
