"""The loop of a run: build, restore, step, log, evaluate, save."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
import yaml
from transformers import MistralConfig, PreTrainedTokenizerFast

from nvembed_mcore import device, redact, resume
from nvembed_mcore.attempts import Attempt
from nvembed_mcore.build import build_model, read_architecture
from nvembed_mcore.checkpoint import store
from nvembed_mcore.checkpoint.best import Best
from nvembed_mcore.checkpoint.folders import folder_of
from nvembed_mcore.checkpoint.saver import Saver
from nvembed_mcore.config import ConfigError, RunConfig
from nvembed_mcore.config_data import DataConfig
from nvembed_mcore.data.batch import Batch
from nvembed_mcore.data.faults import DataError
from nvembed_mcore.data.source import BatchSource
from nvembed_mcore.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from nvembed_mcore.data.tokens import TokenStore
from nvembed_mcore.ema import averaged_weights
from nvembed_mcore.evaluation.encode import RetrievalEvaluation
from nvembed_mcore.exits import Preempted, StorageError
from nvembed_mcore.fault_injection import point
from nvembed_mcore.log import MetricLog, setup_logging
from nvembed_mcore.memory import peak_memory
from nvembed_mcore.metrics import PhaseTimer, StepMetrics, device_peak_flops
from nvembed_mcore.model import fp8_attention
from nvembed_mcore.nonfinite import NonFiniteLossError, reported
from nvembed_mcore.optim import build_optimizer, learning_rate, set_learning_rate
from nvembed_mcore.parallel.groups import Groups, first_rank_does, initialize
from nvembed_mcore.scaling.flops import pack_flops
from nvembed_mcore.schedule import packs_of_rank, plan_texts
from nvembed_mcore.step import ContrastiveStep, StepOutput
from nvembed_mcore.stop import BAD_DATA, StopRequests, refuse_if_stopped
from nvembed_mcore.stragglers import Stragglers
from nvembed_mcore.trackers import check_installed
from nvembed_mcore.watchdog import Watch

log = logging.getLogger(__name__)

RELEASE_EVERY_STEPS = 16
"""Packs differ in length from step to step, so on a CPU the heap fills with gaps and grows unless released."""


def train(config: RunConfig, stops: StopRequests | None = None) -> None:
    """Train one stage; every rank calls this.

    Args:
        stops: what listens for signals since the start of the process; None: from now on.

    Raises:
        ConfigError, DataError, CheckpointError: something that the user gave cannot work; raised on every rank
            before any step is taken (but `step.way: single` at the first batch that needs more than one pack).
        NonFiniteLossError: the loss of a step or its gradient is not a number; its samples are written to `run_dir`.
        StorageError: a checkpoint cannot be written, or has no room; raised on every rank.
        Preempted: somebody asked the run to stop, and what is to be saved is.
        LostRankError: another rank is gone. A hang ends the process (watchdog.py).
    """
    with stops or StopRequests() as stops, Attempt(config, stops.started) as attempt:
        groups = initialize(config.parallel)
        # Nothing watches the ranks yet, so none waits for another patiently.
        folder = first_rank_does(lambda: _prepare_run_dir(config, attempt), dist.group.WORLD)
        attempt.begin(folder, _layout_and_hardware(config, groups))
        setup_logging(groups.rank, attempt.folder)
        with Watch(groups, 60 * config.parallel.timeout_minutes, attempt.folder, attempt.hangs) as watch:
            run = _build(config, groups, stops, watch)
            # Not before: an older run's file must survive an attempt that was refused.
            first_rank_does(lambda: _write_config(config))
            attempt.starts_the_loop(run.done)
            with MetricLog(
                config.run_dir,
                config.log,
                is_writer=groups.rank == 0,
                total_steps=config.steps,
                start_step=run.done,
                description=f"stage {config.stage}",
                facts=run.facts["config"],
            ) as metric_log:
                _loop(run, metric_log, stops, attempt)
            attempt.used(peak_memory(run.memory_before))
        where = f"saved in {folder_of(config.run_dir)}" if config.checkpoint.every_steps else "not saved"
        log.info("step %d of %d is done and %s", run.done, config.steps, where)


def _build(config: RunConfig, groups: Groups, stops: StopRequests, watch: Watch) -> _Run:
    """The run, unless a scheduler's signal also ended processes that were reading the data for it."""
    try:
        return _Run(config, groups, watch)
    except DataError as error:
        if stops.signal is None:
            raise
        found = store.find_checkpoint(config.run_dir)
        raise Preempted(found.step if found else 0, f"{stops.signal} while the data were read") from error


def _loop(run: _Run, metric_log: MetricLog, stops: StopRequests, attempt: Attempt) -> None:
    """From the steps done to the last one, or to where somebody asks to stop."""
    config = run.config
    last = config.stop_at or config.steps
    _stop_if_asked(run, stops, attempt, last)
    if run.done == 0 or _is_due(run.done, config.eval.every_steps, last):
        # A run that was stopped after a step may have been saved before its evaluation.
        if not first_rank_does(lambda: metric_log.has_evaluation(run.done)):
            _evaluate(run, metric_log, attempt)
    while run.done < last:
        line = _step(run, attempt)
        _saving(run, attempt, run.saver.poll)
        if _is_due(run.done, config.log.every_steps, last):
            metric_log.log(run.done, line)
        _stop_if_asked(run, stops, attempt, last)
        if _is_due(run.done, config.eval.every_steps, last):
            _evaluate(run, metric_log, attempt)
        if _is_due(run.done, config.checkpoint.every_steps, last):
            _saving(run, attempt, run.save)
    _saving(run, attempt, run.saver.wait)


def _stop_if_asked(run: _Run, stops: StopRequests, attempt: Attempt, last: int) -> None:
    """Save and raise `Preempted` on all ranks if any was asked to; after the last step only save, for it is done.

    A rank that has lost its data asks too: then it is a `StorageError`, with everything saved.
    """
    trouble = run.data.source.trouble()
    reason = stops.agreed(run.config, run.groups.rank, run.groups.world_size, trouble is not None)
    if reason:
        _saving(run, attempt, run.save)
        _saving(run, attempt, run.saver.wait)
        if run.done < last and reason.startswith(BAD_DATA):
            raise trouble or StorageError(reason)
        if run.done < last:
            raise Preempted(run.done, reason, is_saved=run.saved == run.done)


def _step(run: _Run, attempt: Attempt) -> dict[str, float]:
    """The next step's line. What an asynchronous save holds of an earlier one is kept where this one is no number."""
    try:
        with attempt.does("productive", run.done + 1):
            return run.advance()
    except NonFiniteLossError:
        # All ranks are here, so they can finish it together.
        try:
            run.saver.wait()
        except StorageError as error:
            log.warning("%s", error)
        attempt.has_saved(run.saver.published)
        raise


def _evaluate(run: _Run, metric_log: MetricLog, attempt: Attempt) -> None:
    """Evaluate, save what is the best so far, and log, in this order: a run that is killed before the line is in the
    file evaluates again when it goes on from what was saved."""
    with attempt.does("evaluation", run.done):
        scores = run.evaluate()
    if scores:
        if best := run.best_so_far(scores):
            _saving(run, attempt, lambda: run.save(best))
        metric_log.log_eval(run.done, scores)


def _saving(run: _Run, attempt: Attempt, work: Callable[[], None]) -> None:
    """Do something for which the run may have to wait for the disk, and tell of a checkpoint that is complete then."""
    run.watch.enter("checkpoint", run.done)
    with attempt.does("save_stall", run.done):
        work()
    attempt.has_saved(run.saver.published)
    run.watch.enter("end")


class _Run:
    """What a run is made of, and the steps it has done.

    Attributes:
        done: optimizer steps done, those before a resume included.
        saved: those of the newest save; before the first save of a fresh run 0, of which nothing is to be saved.
        memory_before: bytes that this process held before it built the model.
    """

    def __init__(self, config: RunConfig, groups: Groups, watch: Watch) -> None:
        self.config, self.groups, self.watch = config, groups, watch
        self.hf_config = read_architecture(config.model)
        self.data = open_data(config, self.hf_config)
        self.memory_before = device.memory_bytes()
        self.chunks = build_model(config, self.hf_config, groups)
        self.optimizer = build_optimizer(config.optim, self.chunks)
        self.facts = resume.facts_of(config, self.hf_config, self.data.source, self.data.tokenizer, groups)
        found = resume.restore(config, self.chunks, self.optimizer, self.facts)
        self.done = self.saved = found.step if found else 0
        self.facts["fp8_attention"] = fp8_attention.settle(
            [chunk.module for chunk in self.chunks],
            self._lengths_of_a_pack,
            saved=resume.decided(found, self.facts, "fp8_attention"),
        )
        self.step = ContrastiveStep(
            self.chunks,
            self.optimizer,
            groups,
            step=config.step,
            loss=config.loss,
            seed=config.seed,
            retain_tokens=resume.decided(found, self.facts, "retain_tokens"),
            time_communication_every=config.log.time_communication_every,
            ema_decay=config.optim.ema_decay,
        )
        self.saver = Saver(config.checkpoint, config.run_dir, groups, averages=config.optim.averages)
        self.saver.prepare(self.chunks, found and found.path)
        self.timer = PhaseTimer(device.synchronize, watch.enter)
        self.stragglers = Stragglers(config.log.straggler_window, groups)

    def _lengths_of_a_pack(self) -> np.ndarray:
        """Of the sequences of this rank's first pack of the next step."""
        batch = self.data.source.batch(min(self.done, self.config.steps - 1))
        plan = plan_texts(batch.lengths, self.chunks, self.groups, self.config.step.tokens_per_microbatch)
        return packs_of_rank(batch.texts, plan, self.chunks, self.groups)[0].lengths

    def advance(self) -> dict[str, float]:
        """Take the next step; returns its line of `metrics.jsonl`."""
        self.timer.lap()
        self.watch.enter("begin", self.done + 1)
        point("step_begin", self.done + 1)
        with self.timer("data"):
            point("data", self.done + 1)
            batch = self.data.source.batch(self.done)
        rate = learning_rate(self.config.optim, self.done + 1, self.config.steps)
        set_learning_rate(self.optimizer, rate)
        try:
            output = self.step(batch, self.done + 1, self.timer)
        except NonFiniteLossError as error:
            raise reported(error, self.config, self.data.source, batch) from None
        self.done += 1
        if self.done % RELEASE_EVERY_STEPS == 0:
            device.release_unused_memory()
        seconds = self.timer.lap()
        self.watch.enter("end")
        point("step_end", self.done)
        self.stragglers.add(seconds)
        return _metrics(self.config, self.hf_config, self.groups, batch, output, self.done, rate, seconds)

    def evaluate(self) -> dict[str, float]:
        """Score the test sets, with averaged weights if there are any; nothing where there are no sets."""
        self.watch.enter("evaluation", self.done)
        if not self.data.evaluation:
            return {}
        averages = self.config.optim.averages and self.done > 0
        with averaged_weights(self.chunks, self.optimizer) if averages else nullcontext():
            return self.data.evaluation(self.chunks, self.groups, self.config.step.tokens_per_microbatch)

    def best_so_far(self, scores: dict[str, float]) -> Best | None:
        """What makes the checkpoint of this step the best one, if it is to be kept as such."""
        config, metric = self.config.checkpoint, self.config.eval.metric
        if not (self.done and config.keep_best and config.every_steps):
            return None
        best = Best(self.done, metric, scores[metric], self.data.evaluation.fingerprint)
        return best if self.saver.beats(best) else None

    def save(self, best: Best | None = None) -> None:
        """Write a checkpoint of the steps done, unless there is one or none is wanted.

        Args:
            best: the evaluation that makes it the best so far.
        """
        if not self.config.checkpoint.every_steps:
            return
        self.facts["retain_tokens"] = self.step.retain_tokens
        if self.saved != self.done:
            self.saver.save(self.done, self.chunks, self.optimizer, self.facts, best)
            self.saved = self.done
        elif best:
            self.saver.keep_best(best)


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


@dataclasses.dataclass(frozen=True)
class _Data:
    """What a run reads: batches by step, the test sets if any, and the tokenizer's fingerprint."""

    source: BatchSource
    evaluation: RetrievalEvaluation | None
    tokenizer: str


def _prepare_run_dir(config: RunConfig, attempt: Attempt) -> Path:
    """Make the run folder and that of this attempt's logs; refuse what must not be mixed with an older run."""
    refuse_if_stopped(config)
    check_installed(config.log)
    found = store.newest_step(config.run_dir)
    if config.checkpoint.resume == "never" and found is not None:
        raise ConfigError(f"checkpoint.resume is 'never', but {config.run_dir} has a checkpoint of step {found}")
    if config.checkpoint.resume == "must" and found is None:
        raise ConfigError(f"checkpoint.resume is 'must', but {config.run_dir} has no complete checkpoint")
    return attempt.take()


def _layout_and_hardware(config: RunConfig, groups: Groups) -> dict[str, Any]:
    """What `run.json` says of an attempt."""
    parallel = config.parallel
    layout = {"tp": groups.tp_size, "pp": groups.pp_size, "cp": groups.cp_size, "dp": groups.dp_size}
    return {
        "world_size": groups.world_size,
        "layout": layout | {"chunks_per_stage": parallel.chunks_per_stage},
        "hardware": {"device": device.name(), "cores": os.cpu_count()},
    }


def _write_config(config: RunConfig) -> None:
    """The resolved configuration, in the run folder."""
    text = yaml.safe_dump(redact.tree(resume.plain(config)), sort_keys=False)
    (Path(config.run_dir) / "config.yaml").write_text(text, encoding="utf-8")


def open_data(config: RunConfig, hf_config: MistralConfig) -> _Data:
    """Tokenise what is not yet tokenised (rank 0), then open it on every rank."""
    tokenizer = open_tokenizer(config.data, hf_config)
    # First what is short: tokenising may take hours.
    evaluation = RetrievalEvaluation(config.eval, config.data, tokenizer) if config.eval.test_sets else None
    with_scores = config.loss.distillation.is_on
    stores = first_rank_does(lambda: [str(one.folder) for one in build_stores(config.data, tokenizer, with_scores)])
    return _Data(batch_source(config, map(TokenStore.open, stores)), evaluation, tokenizer_fingerprint(tokenizer))


def open_tokenizer(data: DataConfig, hf_config: MistralConfig) -> PreTrainedTokenizerFast:
    """The run's tokenizer; a `ConfigError` where the model has fewer rows than it has ids."""
    tokenizer = load_tokenizer(data.tokenizer)
    if len(tokenizer) > hf_config.vocab_size:
        raise ConfigError(
            f"the tokenizer {data.tokenizer} has {len(tokenizer)} ids, the model's vocab_size is "
            f"{hf_config.vocab_size}"
        )
    return tokenizer


def build_stores(data: DataConfig, tokenizer: PreTrainedTokenizerFast, with_scores: bool = False) -> list[TokenStore]:
    """Tokenise what is not yet tokenised, on one process; `with_scores`: for a run that distils."""
    how = dict(
        max_query_tokens=data.max_query_tokens,
        max_document_tokens=data.max_document_tokens,
        cache_dir=data.cache_dir,
        max_bad_records=data.max_bad_records,
    )
    return [TokenStore.build(one, tokenizer, **how, with_scores=with_scores and one.distill) for one in data.datasets]


def batch_source(config: RunConfig, stores: Iterable[TokenStore]) -> BatchSource:
    """The run's batches, from the stores of its data sets."""
    return BatchSource(config.data, [*stores], batch_size=config.batch_size, seed=config.seed, stage=config.stage)


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
    peak = device_peak_flops(device.name(), device.default_dtype(config.precision.dtype))
    how = {"causal": config.model.attention_mask == "causal", "lora": config.model.adapters}
    line = StepMetrics(
        step=step,
        loss=output.loss,
        grad_norm=output.grad_norm,
        lr=rate,
        real_tokens=output.real_tokens,
        padded_tokens=output.padded_tokens,
        texts=len(batch.lengths),
        seconds=seconds,
        communication=output.communication,
        flops=config.embeddings_of_a_text * pack_flops(hf_config, config.model.pooling, batch.lengths.tolist(), **how),
        peak_flops=None if peak is None else peak * groups.world_size,
    ).as_dict()
    line |= {"accuracy": output.accuracy, "microbatches": output.num_microbatches, **output.terms}
    return line | ({"temperature": output.temperature} if config.loss.learn_temperature else {})
