"""From a Hugging Face folder to a checkpoint of weights, without building the model."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nvembed_mcore import device, redact
from nvembed_mcore.checkpoint.hf_export import DTYPES
from nvembed_mcore.checkpoint.hf_folder import WeightsError, read_json
from nvembed_mcore.checkpoint.hf_import import verify_sums
from nvembed_mcore.checkpoint.hf_model import HfModel, check_token_ids, open_hf_model
from nvembed_mcore.checkpoint.names import copy_shard
from nvembed_mcore.checkpoint.weights_store import check_new, save_weights
from nvembed_mcore.config import ParallelConfig, PoolingConfig, PrecisionConfig
from nvembed_mcore.data.prompts import query_prompt
from nvembed_mcore.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from nvembed_mcore.parallel.groups import every_rank_does, initialize

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Imported:
    """What an import did. `checked_files`: those whose SHA-256 the folder lists, and which have it."""

    architecture: str
    num_tensors: int
    num_parameters: int
    num_bytes: int
    checked_files: int
    seconds: float


def import_hf(source: str, output: str, *, tokenizer: str | None = None, dtype: str | None = None) -> Imported:
    """Write the checkpoint folder `output`, which `model.init_from` loads and `export-hf` exports.

    Under torchrun the ranks share the tensors. A rank holds one parameter at a time, and the pages of the tensor that
    it is made of.

    Args:
        source: folder of a Mistral base model, of NV-Embed, or of one of our exports.
        output: must not exist.
        tokenizer: folder of its tokenizer; None: `source`, if it has one.
        dtype: `float32`, `bfloat16` or `float16`; None keeps each tensor's own.

    Raises:
        ConfigError, WeightsError: the folder cannot be used; nothing is written unless it is only its numbers that
            are not finite, and then nothing is left.
        FileExistsError: `output` exists.
    """
    start = time.perf_counter()
    check_new(output)
    initialize(ParallelConfig())
    model = every_rank_does(lambda: open_hf_model(source))[dist.get_rank()]
    facts = redact.tree(describe(model, tokenizer))
    num_checked = verify_sums(model.folder)
    entries = {entry.name: entry for entry in model.entries()}
    tensors = {name: (entry.shape, _dtype(model, list(entry.hf), dtype)) for name, entry in entries.items()}

    def make(name: str) -> torch.Tensor:
        shape, wanted = tensors[name]
        entry = entries[name]
        whole = torch.empty(shape, dtype=wanted)
        copy_shard(entry, lambda hf_name: model.folder.read(hf_name, entry.hf[hf_name]), whole, 0, 1)
        model.folder.check_finite(entry.hf, whole)
        return whole

    save_weights(output, tensors, make, facts)
    sizes = [(torch.Size(shape).numel(), one.itemsize) for shape, one in tensors.values()]
    return Imported(
        model.architecture,
        sum(len(entry.hf) for entry in entries.values()),
        sum(torch.Size(shape).numel() for entry in entries.values() for shape in entry.hf.values()),
        sum(numbers * itemsize for numbers, itemsize in sizes),
        num_checked,
        time.perf_counter() - start,
    )


def _dtype(model: HfModel, hf_names: list[str], wanted: str | None) -> torch.dtype:
    if wanted:
        return DTYPES[wanted]
    found = [model.folder.tensors[model.folder.stored_name(name)].dtype for name in hf_names]
    widest = found[0]
    for one in found[1:]:
        widest = torch.promote_types(widest, one)
    return torch.float32 if widest == torch.float64 else widest


def describe(model: HfModel, tokenizer: str | None = None) -> dict[str, Any]:
    """What `run.json` says of a Hugging Face folder: as of a run, as far as the folder tells.

    Args:
        tokenizer: folder of the tokenizer; None: the model's own, if it has one.

    Raises:
        WeightsError: the tokenizer does not fit the model, or the folder's metadata cannot be read.
    """
    tokenizer_dir, fingerprint = _tokenizer(model, tokenizer)
    limit = _max_tokens(model)
    return {
        "step": 0,
        "config": {
            "model": {
                "config": None,
                "init_from": os.path.abspath(model.path),
                "attention_mask": model.attention_mask,
                "pooling": dataclasses.asdict(model.pooling or PoolingConfig(kind="mean")),
            },
            "precision": dataclasses.asdict(PrecisionConfig()),
            "loss": {},
            "data": {
                "tokenizer": tokenizer_dir,
                "datasets": [],
                "max_query_tokens": limit,
                "max_document_tokens": limit,
            },
        },
        "hf_config": model.hf_config.to_dict(),
        "tokenizer": fingerprint,
        "hardware": {"device": device.name(), "world_size": dist.get_world_size()},
        "imported_from": {
            "folder": model.path.resolve().name,
            "architecture": model.architecture,
            "fingerprint": model.fingerprint(),
            "instruction": _instruction(model),
        },
    }


def _tokenizer(model: HfModel, given: str | None) -> tuple[str | None, str | None]:
    """Folder and fingerprint of the tokenizer, which must fit the vocabulary; None twice where there is none."""
    folder = given or model.path
    if not check_token_ids(folder, model):
        if given:
            raise WeightsError(f"{given} has no tokenizer.json")
        return None, None
    return os.path.abspath(folder), tokenizer_fingerprint(load_tokenizer(str(folder)))


def _instruction(model: HfModel) -> str:
    """The task of the queries, out of sentence-transformers' prompt named `query`; nothing where there is none, or
    where it has not the form of ours and no instruction would give it again."""
    file = model.path / "config_sentence_transformers.json"
    prompts = read_json(file).get("prompts") if file.is_file() else None
    prompt = (prompts.get("query") if isinstance(prompts, dict) else None) or ""
    instruction = str(prompt).removeprefix("Instruct: ").removesuffix("\nQuery: ")
    if query_prompt(instruction) == prompt:
        return instruction
    log.warning("%s: the prompt named 'query' is %r and not 'Instruct: ...\\nQuery: '; it is not kept", file, prompt)
    return ""


def _max_tokens(model: HfModel) -> int:
    """Where texts are cut: as sentence-transformers does it with this folder, otherwise a run's default."""
    file = model.path / "sentence_bert_config.json"
    limit = read_json(file).get("max_seq_length") if file.is_file() else None
    if limit is None:
        return 512
    if type(limit) is not int or limit < 1:
        raise WeightsError(f"{file}: max_seq_length must be an integer of at least 1, got {limit!r}")
    return limit
