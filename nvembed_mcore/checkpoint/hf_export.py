"""Write an encoder as a Hugging Face folder that transformers and sentence-transformers load.

The folder holds safetensors in NV-Embed's names, the modelling file, the tokenizer, sentence-transformers metadata and
a model card. It is written aside and renamed when complete, so a folder of that name is always whole.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import MistralConfig

from nvembed_mcore.checkpoint.export_metadata import (
    model_card,
    model_config,
    sentence_transformers_files,
    tokenizer_files,
)
from nvembed_mcore.checkpoint.names import name_table
from nvembed_mcore.checkpoint.safetensors_stream import MAX_SHARD_BYTES, write_weights
from nvembed_mcore.config import PoolingConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODELLING_FILE = "modeling_nvembed.py"


class ExportError(ValueError):
    """An export cannot be written; the message names the folder or the value that stands in the way."""


def export(
    read_global: Callable[[str], torch.Tensor],
    hf_config: MistralConfig,
    pooling: PoolingConfig,
    output_dir: str | os.PathLike,
    *,
    tokenizer_dir: str | os.PathLike,
    attention_mask: str,
    dtype: str = "float32",
    max_tokens: int,
    instruction: str = "",
    card_facts: dict[str, Any],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the folder `output_dir`; at most one parameter is in memory at a time.

    Args:
        read_global: parameter name of the encoder -> its whole tensor, on any device and of any floating dtype.
        hf_config: architecture of the backbone.
        pooling: the head.
        output_dir: must not exist.
        tokenizer_dir: folder of the fast tokenizer that the model was trained with.
        attention_mask: `bidirectional` or `causal`, as trained.
        dtype: `float32`, `bfloat16` or `float16`, of the written weights.
        max_tokens: where sentence-transformers cuts texts, special tokens included.
        instruction: one sentence; sentence-transformers gets it as the prompt named `query`. Empty: no prompt.
        card_facts: sections of the model card (recipe, metrics, data fingerprints, ...), title -> value or mapping.
        max_shard_bytes: largest weight file.

    Raises:
        ExportError: `output_dir` exists, `dtype` or `attention_mask` is unknown, or the tokenizer folder does not fit.
    """
    output_dir = Path(output_dir)
    if output_dir.exists():
        raise ExportError(f"export folder {output_dir} exists; choose another or remove it")
    if dtype not in DTYPES:
        raise ExportError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if attention_mask not in ("bidirectional", "causal"):
        raise ExportError(f"attention_mask must be 'bidirectional' or 'causal', got {attention_mask!r}")
    texts = {
        "config.json": model_config(
            hf_config, pooling, is_causal=attention_mask == "causal", dtype=dtype, instruction=instruction
        ),
        **_checked_tokenizer_files(Path(tokenizer_dir), hf_config, max_tokens),
        **sentence_transformers_files(hf_config.hidden_size, pooling, max_tokens, instruction),
        "README.md": model_card(output_dir.name, pooling, instruction, card_facts),
        MODELLING_FILE: modelling_source(),
    }
    aside = output_dir.with_name(f".{output_dir.name}.{os.getpid()}.partial")
    aside.mkdir(parents=True)
    try:
        write_weights(read_global, name_table(hf_config, pooling), aside, DTYPES[dtype], max_shard_bytes)
        for name, text in texts.items():
            file = aside / name
            file.parent.mkdir(exist_ok=True)
            content = text if isinstance(text, str) else json.dumps(text, indent=2, ensure_ascii=False) + "\n"
            file.write_text(content, encoding="utf-8")
        aside.rename(output_dir)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def modelling_source() -> str:
    """Text of the modelling file that travels with an export."""
    return (importlib.resources.files("nvembed_mcore.checkpoint.hf_files") / MODELLING_FILE).read_text("utf-8")


def _checked_tokenizer_files(tokenizer_dir: Path, hf_config: MistralConfig, max_tokens: int) -> dict[str, Any]:
    try:
        files = tokenizer_files(tokenizer_dir, max_tokens)
    except (OSError, KeyError, ValueError) as error:
        raise ExportError(f"cannot use the tokenizer in {tokenizer_dir}: {error!r}") from error
    vocabulary = files["tokenizer.json"]["model"]["vocab"].values()
    largest = max([*vocabulary, *(token["id"] for token in files["tokenizer.json"]["added_tokens"])])
    if largest >= hf_config.vocab_size:
        raise ExportError(
            f"the tokenizer in {tokenizer_dir} has ids up to {largest}, "
            f"the model's vocab_size is {hf_config.vocab_size}"
        )
    return files
