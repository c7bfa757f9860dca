"""Going on from a checkpoint: what a run says of itself, what a resumed run may not change, and restoring it."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from transformers import MistralConfig

from nvembed_mcore import device
from nvembed_mcore.checkpoint import store
from nvembed_mcore.config import RunConfig
from nvembed_mcore.data.source import BatchSource
from nvembed_mcore.parallel.groups import Groups

log = logging.getLogger(__name__)


def plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON values."""
    tree = dataclasses.asdict(config)
    tree["optim"]["betas"] = list(config.optim.betas)
    tree["loss"]["temperature_range"] = list(config.loss.temperature_range)
    return tree


def facts_of(
    config: RunConfig, hf_config: MistralConfig, source: BatchSource, tokenizer: str, groups: Groups
) -> dict[str, Any]:
    """What a checkpoint says of its run, as JSON values."""
    return {
        "config": plain(config),
        "hf_config": hf_config.to_dict(),
        "data": source.fingerprint,
        "stores": [store.identity for store in source.stores],
        "tokenizer": tokenizer,
        "hardware": {"device": device.name(), "world_size": groups.world_size},
    }


def retained_tokens(found: store.Checkpoint | None, facts: dict[str, Any]) -> int | None:
    """What `step.way: auto` decided before, so that a run resumed in the same layout goes on by bits."""
    if found is None:
        return None
    saved, now = found.facts, facts
    same = saved["hardware"] == now["hardware"] and all(
        saved["config"][key] == now["config"][key] for key in ("parallel", "step", "optim")
    )
    return saved["retain_tokens"] if same else None


def _identity(facts: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's facts that a resumed run may not change: what fixes its samples and its arithmetic."""
    config = facts["config"]
    settings = ("task", "weight", "max_records", "in_batch_negatives", "num_positives", "num_negatives")
    of_all = ("max_query_tokens", "max_document_tokens", "blend_temperature", "one_dataset_batches")
    contents = ("format", "query_prompt", "document_prompt", "rejected")
    datasets = {
        number: {key: dataset[key] for key in settings}
        | {key: tokens[key] for key in contents}
        | {"data": tokens["data"][:16]}
        for number, (dataset, tokens) in enumerate(zip(config["data"]["datasets"], facts["stores"], strict=True))
    }
    return {
        **{key: config[key] for key in ("stage", "seed", "steps", "batch_size", "loss")},
        # Whether its state is sharded is a matter of the layout.
        "optim": {key: value for key, value in config["optim"].items() if key != "distributed"},
        "data.datasets": datasets,
        **{f"data.{key}": config["data"][key] for key in of_all},
        "model.attention_mask": config["model"]["attention_mask"],
        "model.pooling": config["model"]["pooling"],
        "model.lora": store.adapters_of(facts),
        "hf_config": {key: value for key, value in facts["hf_config"].items() if key != "transformers_version"},
        "tokenizer": facts["tokenizer"],
    }


def changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a resumed run may not change and did change, one line each: `field: saved -> now`."""
    names = [[one["path"] for one in facts["config"]["data"]["datasets"]] for facts in (saved, now)]
    if len(names[0]) != len(names[1]):
        return [f"data.datasets: {names[0]} -> {names[1]}"]
    lines = store.differences(_identity(saved), _identity(now))
    for number, path in enumerate(names[1]):
        content = f"data.datasets.{number}.data: "
        lines = [f"{line} (the content of {path})" if line.startswith(content) else line for line in lines]
    return lines


def restore(
    config: RunConfig, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, facts: dict[str, Any]
) -> store.Checkpoint | None:
    """Restore the run's newest good checkpoint, if there is one, and return it; every rank calls this.

    Raises:
        CheckpointError: the checkpoint is of a run that would go on differently, or of an older version; or there are
            checkpoints, but none may be used (`store.newest_good`).
    """
    found = store.newest_good(config.checkpoint, config.run_dir)
    if not found:
        return None
    if not {"retain_tokens", "stores"} <= found.facts.keys():
        raise store.CheckpointError(
            f"{found.path} was written by an older version and lacks what a run needs to go on; give a new run_dir"
        )
    # Through JSON, so that what was stored and what is now have the same types.
    changed = changes(found.facts, json.loads(json.dumps(facts)))
    if changed:
        lines = "\n  ".join(changed)
        raise store.CheckpointError(
            f"{found.path} belongs to another run; changed (saved -> now):\n  {lines}\n"
            f"Set these back, or give a new run_dir"
        )
    store.load_checkpoint(found, chunks, optimizer)
    log.info("going on after step %d from %s", found.step, found.path)
    return found
