"""Going on from a checkpoint: what a run says of itself, and restoring it."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from transformers import MistralConfig

from nvembed_mcore import device, redact
from nvembed_mcore.checkpoint import store
from nvembed_mcore.config import RunConfig
from nvembed_mcore.data.source import BatchSource
from nvembed_mcore.identity import logged_changes, refused_changes
from nvembed_mcore.model import fp8_attention
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
    """What a checkpoint says of its run, as JSON values, without secrets: a resumed run compares what is left."""
    return redact.tree(
        {
            "config": plain(config),
            "hf_config": hf_config.to_dict(),
            "data": source.fingerprint,
            "stores": [store.identity for store in source.stores],
            "tokenizer": tokenizer,
            "precision": str(device.default_dtype(config.precision.dtype)).removeprefix("torch."),
            "hardware": {"device": device.name(), "world_size": groups.world_size},
        }
    )


def decided(found: store.Checkpoint | None, facts: dict[str, Any], what: str) -> Any:
    """What an `auto` found by measuring before, so that a run resumed in the same layout goes on by bits; or None.

    Args:
        what: `retain_tokens` (of `step.way`) or `fp8_attention` (of `precision`).
    """
    if found is None:
        return None
    saved, now = found.facts, facts
    same = saved["hardware"] == now["hardware"] and all(
        saved["config"][key] == now["config"][key] for key in ("parallel", "step", "optim")
    )
    return saved.get(what) if same else None


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
        log.info("%s has no checkpoint: the run starts at step 1", config.run_dir)
        return None
    if not {"retain_tokens", "stores", "precision"} <= found.facts.keys():
        raise store.CheckpointError(
            f"{found.path} was written by an older version and lacks what a run needs to go on; give a new run_dir"
        )
    # Through JSON, so that what was stored and what is now have the same types.
    facts = json.loads(json.dumps(facts))
    changed = refused_changes(found.facts, facts)
    if changed:
        lines = "\n  ".join(changed)
        raise store.CheckpointError(
            f"{found.path} belongs to another run; changed (saved -> now):\n  {lines}\n"
            f"Set these back, or give a new run_dir"
        )
    for line in logged_changes(found.facts, facts):
        log.info("changed since step %d: %s", found.step, line)
    saved = decided(found, facts, "fp8_attention")
    if saved is not None:  # before its scales are loaded
        fp8_attention.settle([chunk.module for chunk in chunks], saved=saved)
    store.load_checkpoint(found, chunks, optimizer)
    log.info("going on after step %d from %s", found.step, found.path)
    return found
