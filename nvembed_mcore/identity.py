"""What a resumed run may change. Every field of the configuration is in one class; the test of this list knows all.

identity     fixes the samples or the arithmetic: a change is refused
content      a path, or words that stand for something else: what it says is compared, not how
resumable    how the work is shared or computed: the same numbers within rounding (dropout draws other elements). A
             change is logged
free         places, limits, evaluation, logging, saving, and what only the first start reads
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from nvembed_mcore.checkpoint import store

Kind = Literal["identity", "content", "resumable", "free"]

_KINDS: dict[Kind, str] = {
    "identity": """
        stage seed steps batch_size loss optim
        data.blend_temperature data.one_dataset_batches data.max_query_tokens data.max_document_tokens
        data.datasets.task data.datasets.weight data.datasets.max_records data.datasets.in_batch_negatives
        data.datasets.num_positives data.datasets.num_negatives data.datasets.distill
        model.attention_mask model.pooling step.fgm_epsilon step.fgm_weight
    """,
    "content": """
        data.tokenizer data.max_bad_records
        data.datasets.path data.datasets.instruction data.datasets.instruct_documents
        model.config model.init_from precision.dtype model.lora
    """,
    "resumable": "parallel step optim.distributed model.backend precision",
    "free": """
        run_dir stop_at max_minutes data.cache_dir model.pooling.initializer_range model.lora.init_from
        parallel.timeout_minutes checkpoint eval log
    """,
}
"""A name stands for all fields under it but those that are named themselves."""
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}

ARCHITECTURE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "attention_dropout",
)
"""Of a `config.json`, what the trainer reads; the rest changes with each version of transformers."""


def kind_of(field: str) -> Kind:
    """The class of a field of the configuration, as `data.datasets.weight`.

    Raises:
        KeyError: it is in none.
    """
    name = field
    while name not in _KIND_OF and "." in name:
        name = name.rpartition(".")[0]
    return _KIND_OF[name]


def refused_changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a resumed run may not change and did change, one line each: `field: saved -> now`.

    Args:
        saved, now: facts of a run (`resume.facts_of`), as JSON values.
    """
    paths = [[one["path"] for one in facts["config"]["data"]["datasets"]] for facts in (saved, now)]
    if len(paths[0]) != len(paths[1]):
        return [f"data.datasets: {paths[0]} -> {paths[1]}"]
    lines = store.differences(_identity(saved), _identity(now))
    origins = {"data.tokenizer: ": now["config"]["data"]["tokenizer"]}
    origins |= {f"data.datasets.{number}.data: ": path for number, path in enumerate(paths[1])}
    for field, path in origins.items():
        lines = [f"{line} (the content of {path})" if line.startswith(field) else line for line in lines]
    return lines


def logged_changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a resumed run may change, and did: `field: saved -> now`."""

    def resumable(facts: dict[str, Any]) -> dict[str, Any]:
        found = {name: value for field, name, value in _fields(facts["config"]) if kind_of(field) == "resumable"}
        return found | {"device": facts["hardware"]["device"], "processes": facts["hardware"]["world_size"]}

    return store.differences(resumable(saved), resumable(now))


def _identity(facts: dict[str, Any]) -> dict[str, Any]:
    """All that is compared, by field."""
    found = {name: value for field, name, value in _fields(facts["config"]) if kind_of(field) == "identity"}
    for number, tokens in enumerate(facts["stores"]):
        # The prompts are the instruction as the data set's texts got it; records may have their own.
        for name in ("format", "query_prompt", "document_prompt", "rejected"):
            found[f"data.datasets.{number}.{name}"] = tokens[name]
        found[f"data.datasets.{number}.data"] = tokens["data"][:16]
    found |= {f"hf_config.{name}": facts["hf_config"].get(name) for name in ARCHITECTURE}
    return found | {
        "data.tokenizer": facts["tokenizer"][:16],
        "precision.dtype": facts["precision"],
        "model.lora": store.adapters_of(facts),
    }


def _fields(tree: dict[str, Any], field: str = "", name: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every field with its name and value; a data set's name has its number, which the field has not."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{field}{key}.", f"{name}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for number, one in enumerate(value):
                yield from _fields(one, f"{field}{key}.", f"{name}{key}.{number}.")
        else:
            yield f"{field}{key}", f"{name}{key}", value
