"""The loop of a run: build, restore, step, log, evaluate, save."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import yaml
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from transformers import MistralConfig

from nvembed_mcore import device
from nvembed_mcore.build import build_model, read_architecture
from nvembed_mcore.checkpoint import store
from nvembed_mcore.config import ConfigError, RunConfig
from nvembed_mcore.data.batch import Batch
from nvembed_mcore.data.source import BatchSource
from nvembed_mcore.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from nvembed_mcore.data.tokens import TokenStore
from nvembed_mcore.evaluation.encode import RetrievalEvaluation
from nvembed_mcore.log import MetricLog, setup_logging
from nvembed_mcore.metrics import PhaseTimer, StepMetrics, device_peak_flops, pack_flops
from nvembed_mcore.optim import build_optimizer, learning_rate, set_learning_rate
from nvembed_mcore.parallel.groups import Groups, first_rank_does, initialize
from nvembed_mcore.step import ContrastiveStep, StepOutput

log = logging.getLogger(__name__)

RELEASE_EVERY_STEPS = 16
"""Packs differ in length from step to step, so on a CPU the heap fills with gaps and grows unless released."""


def train(config: RunConfig) -> None:
    """Train one stage; every rank calls this.

    Raises:
        ConfigError, DataError, CheckpointError: something that the user gave cannot work; raised on every rank
            before any step is taken (but `step.way: single` at the first batch that needs more than one pack).
        NonFiniteLossError: the loss of a step is not a number.
    """
    groups = initialize(config.parallel)
    first_rank_does(lambda: _prepare_run_dir(config))
    setup_logging(groups.rank, Path(config.run_dir) / "logs")
    hf_config = read_architecture(config.model)
    data = open_data(config, hf_config)
    chunks = build_model(config, hf_config, groups)
    optimizer = build_optimizer(config.optim, chunks)
    facts = _facts(config, hf_config, data, groups)
    found = _resume(config, chunks, optimizer, facts)
    done = found.step if found else 0
    # Not before: an older run's file must survive an attempt that was refused.
    first_rank_does(lambda: _write_config(config))
    how = dict(step=config.step, loss=config.loss, seed=config.seed)
    step = ContrastiveStep(chunks, optimizer, groups, **how, retain_tokens=_retain_tokens(found, facts))
    timer = PhaseTimer(device.synchronize)
    last = config.stop_at or config.steps
    with MetricLog(
        config.run_dir,
        config.log,
        is_writer=groups.rank == 0,
        total_steps=config.steps,
        start_step=done,
        description=f"stage {config.stage}",
    ) as metric_log:
        if data.evaluation and done == 0:
            metric_log.log_eval(0, data.evaluation(chunks, groups, config.step.tokens_per_microbatch))
        while done < last:
            timer.lap()
            with timer("data"):
                batch = data.source.batch(done)
            done += 1
            rate = learning_rate(config.optim, done, config.steps)
            set_learning_rate(optimizer, rate)
            output = step(batch, done, timer)
            if done % RELEASE_EVERY_STEPS == 0:
                device.release_unused_memory()
            seconds = timer.lap()
            if _is_due(done, config.log.every_steps, last):
                metric_log.log(done, _metrics(config, hf_config, groups, batch, output, done, rate, seconds))
            # Before saving, so that a kill between the two loses neither: a repeated line replaces the first.
            if data.evaluation and _is_due(done, config.eval.every_steps, last):
                metric_log.log_eval(done, data.evaluation(chunks, groups, config.step.tokens_per_microbatch))
            if _is_due(done, config.checkpoint.every_steps, last):
                facts["retain_tokens"] = step.retain_tokens
                store.save_checkpoint(config.checkpoint, config.run_dir, done, chunks, optimizer, facts)
    log.info("step %d of %d is done and saved in %s", done, config.steps, store.folder_of(config.run_dir))


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


@dataclasses.dataclass(frozen=True)
class _Data:
    """What a run reads: batches by step, the test set if any, and the tokenizer's fingerprint."""

    source: BatchSource
    evaluation: RetrievalEvaluation | None
    tokenizer: str


def _prepare_run_dir(config: RunConfig) -> None:
    """Make the run folder; refuse what must not be mixed with an older run."""
    found = store.find_checkpoint(config.run_dir)
    if config.checkpoint.resume == "never" and found:
        raise ConfigError(f"checkpoint.resume is 'never', but {config.run_dir} has a checkpoint of step {found.step}")
    if config.checkpoint.resume == "must" and not found:
        raise ConfigError(f"checkpoint.resume is 'must', but {config.run_dir} has no complete checkpoint")
    os.makedirs(config.run_dir, exist_ok=True)


def _write_config(config: RunConfig) -> None:
    """The resolved configuration, in the run folder."""
    text = yaml.safe_dump(_plain(config), sort_keys=False)
    (Path(config.run_dir) / "config.yaml").write_text(text, encoding="utf-8")


def _plain(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON values."""
    tree = dataclasses.asdict(config)
    tree["optim"]["betas"] = list(config.optim.betas)
    tree["loss"]["temperature_range"] = list(config.loss.temperature_range)
    return tree


def open_data(config: RunConfig, hf_config: MistralConfig) -> _Data:
    """Tokenise what is not yet tokenised (rank 0), then open it on every rank."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    if len(tokenizer) > hf_config.vocab_size:
        raise ConfigError(
            f"the tokenizer {config.data.tokenizer} has {len(tokenizer)} ids, the model's vocab_size is "
            f"{hf_config.vocab_size}"
        )
    how = dict(
        max_query_tokens=config.data.max_query_tokens,
        max_document_tokens=config.data.max_document_tokens,
        cache_dir=config.data.cache_dir,
        max_bad_records=config.data.max_bad_records,
    )

    def build() -> list[str]:
        return [str(TokenStore.build(dataset, tokenizer, **how).folder) for dataset in config.data.datasets]

    # First what is short: tokenising may take hours.
    evaluation = RetrievalEvaluation(config.eval, config.data, tokenizer) if config.eval.path else None
    stores = [TokenStore.open(folder) for folder in first_rank_does(build)]
    source = BatchSource(config.data, stores, batch_size=config.batch_size, seed=config.seed, stage=config.stage)
    return _Data(source, evaluation, tokenizer_fingerprint(tokenizer))


def _facts(config: RunConfig, hf_config: MistralConfig, data: _Data, groups: Groups) -> dict[str, Any]:
    """What a checkpoint says of its run, as JSON values."""
    return {
        "config": _plain(config),
        "hf_config": hf_config.to_dict(),
        "data": data.source.fingerprint,
        "stores": [store.identity for store in data.source.stores],
        "tokenizer": data.tokenizer,
        "hardware": {"device": device.name(), "world_size": groups.world_size},
    }


def _retain_tokens(found: store.Checkpoint | None, facts: dict[str, Any]) -> int | None:
    """What `step.way: auto` decided before, so that a run resumed in the same layout goes on by bits."""
    if found is None:
        return None
    saved, now = found.facts, facts
    same = saved["hardware"] == now["hardware"] and all(
        saved["config"][key] == now["config"][key] for key in ("parallel", "step")
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
        **{key: config[key] for key in ("stage", "seed", "steps", "batch_size", "loss", "optim")},
        "data.datasets": datasets,
        **{f"data.{key}": config["data"][key] for key in of_all},
        "model.attention_mask": config["model"]["attention_mask"],
        "model.pooling": config["model"]["pooling"],
        "model.lora": store.adapters_of(facts),
        "hf_config": {key: value for key, value in facts["hf_config"].items() if key != "transformers_version"},
        "tokenizer": facts["tokenizer"],
    }


def _changes(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What a resumed run may not change and did change, one line each: `field: saved -> now`."""
    names = [[one["path"] for one in facts["config"]["data"]["datasets"]] for facts in (saved, now)]
    if len(names[0]) != len(names[1]):
        return [f"data.datasets: {names[0]} -> {names[1]}"]
    lines = store.differences(_identity(saved), _identity(now))
    for number, path in enumerate(names[1]):
        content = f"data.datasets.{number}.data: "
        lines = [f"{line} (the content of {path})" if line.startswith(content) else line for line in lines]
    return lines


def _resume(
    config: RunConfig, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, facts: dict[str, Any]
) -> store.Checkpoint | None:
    """Restore the run's newest checkpoint, if there is one, and return it.

    Raises:
        CheckpointError: the checkpoint is of a run that would go on differently, or of an older version.
    """
    found = store.find_checkpoint(config.run_dir)
    if not found:
        return None
    if not {"retain_tokens", "stores"} <= found.facts.keys():
        raise store.CheckpointError(
            f"{found.path} was written by an older version and lacks what a run needs to go on; give a new run_dir"
        )
    # Through JSON, so that what was stored and what is now have the same types.
    changed = _changes(found.facts, json.loads(json.dumps(facts)))
    if changed:
        lines = "\n  ".join(changed)
        raise store.CheckpointError(
            f"{found.path} belongs to another run; changed (saved -> now):\n  {lines}\n"
            f"Set these back, or give a new run_dir"
        )
    store.load_checkpoint(found, chunks, optimizer)
    log.info("going on after step %d from %s", found.step, found.path)
    return found


def _metrics(
    config: RunConfig,
    hf_config: MistralConfig,
    groups: Groups,
    batch: Batch,
    output: StepOutput,
    step: int,
    rate: float,
    seconds: dict[str, float],
) -> dict[str, float]:
    """The line of `metrics.jsonl` for a step."""
    peak = device_peak_flops(device.name(), device.default_dtype(config.model.precision))
    how = {"causal": config.model.attention_mask == "causal", "lora": config.model.adapters}
    line = StepMetrics(
        step=step,
        loss=output.loss,
        grad_norm=output.grad_norm,
        lr=rate,
        real_tokens=output.real_tokens,
        padded_tokens=output.padded_tokens,
        seconds=seconds,
        flops=pack_flops(hf_config, config.model.pooling, batch.lengths.tolist(), **how),
        peak_flops=None if peak is None else peak * groups.world_size,
    ).as_dict()
    line |= {"accuracy": output.accuracy, "microbatches": output.num_microbatches}
    return line | ({"temperature": output.temperature} if config.loss.learn_temperature else {})
