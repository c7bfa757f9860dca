"""Write an encoder as a Hugging Face folder that transformers and sentence-transformers load.

The folder holds safetensors, the tokenizer, sentence-transformers metadata and a model card. In the format `nv-embed`
weights have NV-Embed's names and the modelling file comes with them; the format `mean` is a plain `MistralModel`. A
folder is written aside and renamed when complete, so one of that name is always whole.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import MistralConfig

from nvembed_mcore.checkpoint.export_metadata import (
    SENTENCE_MODULE,
    mean_config,
    model_card,
    nv_embed_config,
    sentence_transformers_files,
    tokenizer_files,
)
from nvembed_mcore.checkpoint.hf_model import largest_token_id
from nvembed_mcore.checkpoint.names import BACKBONE, Entry, name_table
from nvembed_mcore.checkpoint.safetensors_stream import (
    MAX_SHARD_BYTES,
    NotFiniteError,
    sync_files,
    write_weights,
)
from nvembed_mcore.config import PoolingConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = ("nv-embed", "mean")
MODELLING_FILE = "modeling_nvembed.py"
SENTENCE_FILE = f"{SENTENCE_MODULE.partition('.')[0]}.py"


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
    format: str = "nv-embed",
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
        format: `nv-embed`, or `mean`: a plain `MistralModel` without code of its own, for `mean` pooling.
        dtype: `float32`, `bfloat16` or `float16`, of the written weights.
        max_tokens: where sentence-transformers cuts texts, special tokens included.
        instruction: one sentence; sentence-transformers gets it as the prompt named `query`. Empty: no prompt.
        card_facts: sections of the model card (recipe, metrics, data fingerprints, ...), title -> value or mapping.
        max_shard_bytes: largest weight file.

    Raises:
        ExportError: `output_dir` exists, `dtype`, `format` or `attention_mask` is unknown, the format cannot hold this
            pooling, the tokenizer folder cannot be used or does not fit, or a weight does not fit `dtype`.
    """
    output_dir = Path(output_dir)
    _check_choices(format, dtype, attention_mask, pooling.kind)
    is_mean, is_causal = format == "mean", attention_mask == "causal"
    entries = name_table(hf_config, pooling)
    config = nv_embed_config(hf_config, pooling, is_causal=is_causal, dtype=dtype, instruction=instruction)
    if is_mean:
        config = mean_config(hf_config, is_causal=is_causal, dtype=dtype)
        entries = [_with_bare_names(entry) for entry in entries]
    texts = {
        "config.json": config,
        **_checked_tokenizer_files(Path(tokenizer_dir), hf_config, max_tokens),
        **sentence_transformers_files(hf_config.hidden_size, pooling, max_tokens, instruction, is_mean=is_mean),
        "README.md": model_card(
            output_dir.name, pooling, instruction, card_facts, is_mean=is_mean, is_causal=is_causal
        ),
        **({} if is_mean else code_files(pooling)),
    }
    with written_aside(output_dir) as aside:
        try:
            write_weights(read_global, entries, aside, DTYPES[dtype], max_shard_bytes)
        except NotFiniteError as error:
            raise ExportError(f"cannot write {output_dir}: {error}") from error
        _write_texts(texts, aside)


@contextmanager
def written_aside(output_dir: Path) -> Iterator[Path]:
    """A folder to write into that gets its name when the block ends and its files are on the disk.

    Nothing is left of one that fails; what a killed process left is removed by the next one.

    Raises:
        ExportError: `output_dir` exists.
    """
    if output_dir.exists():
        raise ExportError(f"export folder {output_dir} exists; choose another or remove it")
    aside = output_dir.with_name(f".{output_dir.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        sync_files(aside)
        aside.rename(output_dir)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_texts(texts: dict[str, Any], folder: Path) -> None:
    """Files by their path in the folder; what is no text is written as JSON."""
    for name, text in texts.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        content = text if isinstance(text, str) else json.dumps(text, indent=2, ensure_ascii=False) + "\n"
        file.write_text(content, encoding="utf-8")


def code_files(pooling: PoolingConfig) -> dict[str, str]:
    """File name -> text of the code that travels with an export in the format `nv-embed`."""
    names = [MODELLING_FILE] + ([SENTENCE_FILE] if pooling.kind == "multi_layer" else [])
    folder = importlib.resources.files("nvembed_mcore.checkpoint.hf_files")
    return {name: (folder / name).read_text("utf-8") for name in names}


def _check_choices(format: str, dtype: str, attention_mask: str, kind: str) -> None:
    if dtype not in DTYPES:
        raise ExportError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if attention_mask not in ("bidirectional", "causal"):
        raise ExportError(f"attention_mask must be 'bidirectional' or 'causal', got {attention_mask!r}")
    if format not in FORMATS:
        raise ExportError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "mean" and kind != "mean":
        raise ExportError(f"format 'mean' holds models with 'mean' pooling, this one has {kind!r} pooling")


def _with_bare_names(entry: Entry) -> Entry:
    """The same parameter under `MistralModel`'s own names."""
    return dataclasses.replace(entry, hf={name.removeprefix(BACKBONE): shape for name, shape in entry.hf.items()})


def _checked_tokenizer_files(tokenizer_dir: Path, hf_config: MistralConfig, max_tokens: int) -> dict[str, Any]:
    try:
        files = tokenizer_files(tokenizer_dir, max_tokens)
        largest = largest_token_id(tokenizer_dir)
        fits = largest < hf_config.vocab_size
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ExportError(f"cannot use the tokenizer in {tokenizer_dir}: {error!r}") from error
    if not fits:
        raise ExportError(
            f"the tokenizer in {tokenizer_dir} has ids up to {largest}, "
            f"the model's vocab_size is {hf_config.vocab_size}"
        )
    return files
