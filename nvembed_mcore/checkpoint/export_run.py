"""From a resume checkpoint to a Hugging Face folder, on one CPU process and without building the model."""

from __future__ import annotations

from typing import Any

from transformers import MistralConfig

from nvembed_mcore.checkpoint import store
from nvembed_mcore.checkpoint.adapters import merged
from nvembed_mcore.checkpoint.averages import Weights, has_averages, takes_averages
from nvembed_mcore.checkpoint.hf_export import ExportError, export
from nvembed_mcore.checkpoint.peft import export_peft
from nvembed_mcore.config import LoraConfig, PoolingConfig
from nvembed_mcore.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from nvembed_mcore.log import read_metrics


def export_run(
    source: str,
    output: str,
    *,
    dtype: str,
    instruction: str | None,
    format: str = "nv-embed",
    weights: Weights | None = None,
) -> None:
    """Export the newest checkpoint of a run folder, or one checkpoint folder, whatever layout wrote it.

    Args:
        source: run folder, checkpoint folder, or `RUN/checkpoints/best`.
        output: folder to write.
        dtype: `float32`, `bfloat16` or `float16`.
        instruction: query instruction; None takes that of the run's first data set, or of the folder that was
            imported.
        format: `nv-embed` or `mean`.
        weights: `ema`: the averaged ones (ema.py); `last`: those of the last step; None: averaged ones where the run
            has them.

    Raises:
        CheckpointError: there is no complete checkpoint, it has no averaged weights, it was imported without a
            tokenizer, or its tokenizer is another one by now.
        ExportError: `output` exists, or the format cannot hold the run's pooling.
    """
    found = _open(source)
    config = found.facts["config"]
    if config["data"]["tokenizer"] is None:
        raise store.CheckpointError(f"{found.path} knows no tokenizer; import it again with --tokenizer")
    if instruction is None:
        instruction = store.instruction_of(found.facts)
    hf_config = MistralConfig.from_dict(found.facts["hf_config"])
    pooling = PoolingConfig(**config["model"]["pooling"])
    read = store.open_weights(found, weights)
    if store.adapters_of(found.facts):
        read = merged(read, hf_config, pooling, LoraConfig(**config["model"]["lora"]))
    _check_tokenizer(found)
    export(
        read,
        hf_config,
        pooling,
        output,
        tokenizer_dir=config["data"]["tokenizer"],
        attention_mask=config["model"]["attention_mask"],
        format=format,
        dtype=dtype,
        max_tokens=max(config["data"]["max_query_tokens"], config["data"]["max_document_tokens"]),
        instruction=instruction,
        card_facts=_card_facts(found, weights),
    )


def _check_tokenizer(found: store.Checkpoint) -> None:
    """Raise a `CheckpointError` when the tokenizer's folder does not hold the one that the checkpoint had."""
    folder, had = found.facts["config"]["data"]["tokenizer"], found.facts["tokenizer"]
    has = tokenizer_fingerprint(load_tokenizer(folder))
    if had not in (None, has):
        raise store.CheckpointError(
            f"the tokenizer in {folder} is not the one of {found.path}: its fingerprint is {has}, {had} in run.json"
        )


def export_adapters(source: str, output: str, *, dtype: str, weights: Weights | None = None) -> None:
    """Write the adapters and the head of a run's newest checkpoint, or of a checkpoint folder, as a PEFT folder.

    Raises:
        CheckpointError: there is no complete checkpoint, or it has no averaged weights.
        ExportError: the run trained no adapters, or `output` exists.
    """
    found = _open(source)
    model = found.facts["config"]["model"]
    if not store.adapters_of(found.facts):
        raise ExportError(f"{found.path} has no adapters (model.lora.rank is 0), so there is no PEFT folder to write")
    export_peft(
        store.open_weights(found, weights),
        MistralConfig.from_dict(found.facts["hf_config"]),
        PoolingConfig(**model["pooling"]),
        LoraConfig(**model["lora"]),
        output,
        attention_mask=model["attention_mask"],
        base_name=_base_name(found),
        dtype=dtype,
    )


def _base_name(found: store.Checkpoint) -> str | None:
    """The Hugging Face folder whose backbone a run still has, through stages that did not train it."""
    seen: set[str] = set()
    facts = found.facts
    while "imported_from" in facts or store.adapters_of(facts):
        start = facts["config"]["model"]["init_from"]
        earlier = store.find_checkpoint(start) if start else None
        if earlier is None or start in seen:
            return start
        seen.add(start)
        facts = earlier.facts
    return None


def _open(source: str) -> store.Checkpoint:
    found = store.find_checkpoint(source)
    if found is None:
        raise store.CheckpointError(f"no complete checkpoint in {source}")
    return found


def _card_facts(found: store.Checkpoint, weights: Weights | None) -> dict[str, Any]:
    """What the model card says of the run."""
    config = found.facts["config"]
    if "imported_from" in found.facts:
        return {"Imported from": found.facts["imported_from"]}
    is_averaged = takes_averages(found, weights)
    facts: dict[str, Any] = {
        "Training": {
            "step": found.step,
            "weights": "exponential moving average" if is_averaged else "of the last step",
            **{key: config[key] for key in ("stage", "seed", "steps", "batch_size", "model", "loss", "optim")},
        },
        "Data": {
            **{f"set {number}": one for number, one in enumerate(config["data"]["datasets"], 1)},
            "fingerprint": found.facts["data"],
            "tokenizer": found.facts["tokenizer"],
        },
    }
    metrics = found.path.parent.parent / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.is_file() else []
    evaluations = [line for line in lines if "loss" not in line and line["step"] == found.step]
    if evaluations and is_averaged == has_averages(found):
        facts["Evaluation"] = evaluations[-1]
    return facts
