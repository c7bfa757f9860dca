"""One optimizer step over packed microbatches (docs/design.md).

Three phases, whatever the layout: embed every pack; gather all embeddings and score them; push the gradient of each
embedding back through its pack. The ways differ in what is kept between the phases. `retain` keeps the graphs of all
packs (`single` is its case of one pack). `cached` keeps that of one pack, and embeds the others again in the third
phase: the exact gradient of a batch of any size in the memory of one pack. With pipeline stages, where only `cached`
works, nothing is kept.

Letters: `N` texts of the global batch, `Q` queries among them, `n` texts of this rank, `D` embedding size, `W`
data-parallel size.
"""

from __future__ import annotations

import hashlib
import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from nvembed_mcore import device, nonfinite
from nvembed_mcore.config import ConfigError, LossConfig, StepConfig
from nvembed_mcore.data.batch import Batch
from nvembed_mcore.data.packing import Pack, Plan
from nvembed_mcore.distillation import is_distilled
from nvembed_mcore.ema import update_average
from nvembed_mcore.memory import retainable_tokens
from nvembed_mcore.metrics import PhaseTimer
from nvembed_mcore.model import fp8_step
from nvembed_mcore.nonfinite import NonFiniteLossError
from nvembed_mcore.optim import gradient_norm, update
from nvembed_mcore.parallel.gather import share_from_last_stage, sum_over_data_ranks
from nvembed_mcore.parallel.groups import Groups, seed_everything
from nvembed_mcore.parallel.stage_clock import communication_of_all, stage_clock
from nvembed_mcore.parallel.traffic import Traffic
from nvembed_mcore.schedule import Chunks, embed_packs, packs_of_rank, plan_texts, run_schedule
from nvembed_mcore.score import Scorer, Scores

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepOutput:
    """What a step reports, the same on every rank.

    `loss`: mean over the Q queries. `accuracy`: share of queries whose positive scores highest among its candidates.
    `grad_norm`: norm of the whole gradient before clipping. `temperature`: that of this step. Tokens are those of all
    ranks. `communication`: seconds by group, where they were measured (parallel/traffic.py). `divergence`: mean over
    the distilled queries, which the loss holds `loss.distillation.weight` times; None without distillation.
    """

    loss: float
    accuracy: float
    grad_norm: float
    temperature: float
    real_tokens: int
    padded_tokens: int
    num_microbatches: int
    way: str
    communication: dict[str, float]
    divergence: float | None = None


def microbatch_seed(seed: int, step: int, microbatch: int, chunk: int, groups: Groups) -> int:
    """Seed of one microbatch's dropout; tensor ranks share it (Megatron's tracker tells them apart)."""
    ranks = f"{groups.dp_rank} {groups.pp_rank} {chunk}" + (f" {groups.cp_rank}" if groups.cp_size > 1 else "")
    words = f"{seed} {step} {microbatch} {ranks}".encode()
    return int.from_bytes(hashlib.sha256(words).digest()[:4], "little") & 0x7FFFFFFF


def check_packs(config: StepConfig, plan: Plan, step: int) -> None:
    """Raise a `ConfigError` where `step.way` is `single` and a rank has more than one pack in step number `step`."""
    if config.way == "single" and plan.max_microbatches > 1:
        raise ConfigError(
            f"step.way 'single' needs one pack a rank, but the batch of step {step} needs {plan.max_microbatches} "
            f"of step.tokens_per_microbatch = {config.tokens_per_microbatch}. Use 'auto' or 'retain'"
        )


class ContrastiveStep:
    """Computes and applies the gradient of one global batch, equal in every layout to that of one process."""

    def __init__(
        self,
        chunks: Chunks,
        optimizer: ChainedOptimizer,
        groups: Groups,
        *,
        step: StepConfig,
        loss: LossConfig,
        seed: int,
        retain_tokens: int | None = None,
        time_communication_every: int = 0,
        ema_decay: float | None = None,
    ) -> None:
        """
        Args:
            chunks: this stage's model.
            retain_tokens: tokens of a rank whose graphs `auto` keeps; None: measured when it is first needed.
            time_communication_every: steps; 0: never.
            ema_decay: of the average of the weights; None or 0: none is kept.
        """
        self.chunks, self.optimizer, self.groups = chunks, optimizer, groups
        self.config, self.loss_config, self.seed = step, loss, seed
        self.retain_tokens = retain_tokens
        self.time_communication_every, self.ema_decay = time_communication_every, ema_decay
        self.scorer = Scorer(loss, groups, step.gradient_exchange, chunks[-1].module.backend.dtype)
        self._is_first = True
        self._logged: set[str] = set()

    def __call__(self, batch: Batch, step: int, timer: PhaseTimer) -> StepOutput:
        """Take optimizer step number `step`.

        Raises:
            ConfigError: `step.way` is `single`, and the batch needs more than one pack.
            NonFiniteLossError: the loss or the gradient is not a number, and nothing was updated; on every rank.
        """
        plan = plan_texts(batch.lengths, self.chunks, self.groups, self.config.tokens_per_microbatch)
        packs = packs_of_rank(batch.texts, plan, self.chunks, self.groups)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        way = self._way(plan, batch.lengths, packs, step)
        encoders = [chunk.module for chunk in self.chunks]
        fp8_step.begin_step(encoders)
        every = self.time_communication_every
        is_timed = every > 0 and step % every == 0
        traffic = Traffic(self.groups, is_timed) if self._is_first or is_timed else nullcontext()
        with traffic, stage_clock(self.chunks) if is_timed else nullcontext() as clock:
            if self.groups.pp_size > 1:
                totals, temperature = self._pipelined(batch, plan, packs, step, timer)
            else:
                num_kept = 1 if way == "cached" else len(packs)
                totals, temperature = self._one_stage(batch, plan, packs, step, timer, num_kept)
            loss, accuracy, *more, real, padded, temperature = self._share(totals, packs, temperature)
            loss, accuracy = loss / batch.num_queries, accuracy / batch.num_queries
            with timer("optimizer"):
                grad_norm = gradient_norm(self.optimizer)
                # Only here, so that ranks meet in all collectives before the first one stops: what is not a number in
                # one rank's loss is in the norm on all.
                if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                    raise NonFiniteLossError(self._finding(step, loss, grad_norm, batch, plan, packs))
                update(self.optimizer, grad_norm)
                if self.ema_decay:
                    update_average(self.optimizer, self.ema_decay, step)
                fp8_step.end_step(encoders, [self.groups.tp, self.groups.dp_cp])
        if self._is_first:
            self._is_first = False
            log.info("collectives of step %d on this rank (way %s):\n%s", step, way, traffic.table())
        return StepOutput(
            loss=loss,
            accuracy=accuracy,
            grad_norm=grad_norm,
            temperature=temperature,
            real_tokens=int(real),
            padded_tokens=int(padded),
            num_microbatches=plan.max_microbatches,
            way=way,
            communication=communication_of_all(traffic, clock) if is_timed else {},
            divergence=more[0] / max(1, int(is_distilled(batch).sum())) if more else None,
        )

    def _share(self, totals: Tensor, packs: list[Pack], temperature: float) -> list[float]:
        """Sums over data-parallel ranks and the last stage's temperature, on every rank."""
        tokens = [float(sum(pack.real_tokens for pack in packs)), float(sum(pack.padded_tokens for pack in packs))]
        sums = torch.cat([totals.double(), torch.tensor(tokens, dtype=torch.float64, device=totals.device)])
        sums = sum_over_data_ranks(sums, self.groups)
        last = torch.tensor([temperature], dtype=torch.float64, device=totals.device)
        return share_from_last_stage(torch.cat([sums, last]), self.groups).tolist()

    def _finding(
        self, step: int, loss: float, grad_norm: float, batch: Batch, plan: Plan, packs: list[Pack]
    ) -> nonfinite.Finding:
        """What is not finite in this step, which has not changed a weight yet."""
        return nonfinite.find(
            step,
            loss,
            grad_norm,
            batch=batch,
            plan=plan,
            embeddings=embed_packs(self.chunks, packs, lambda index, chunk: self._reseed(step, index, chunk)),
            parameters=[named for chunk in self.chunks for named in chunk.module.named_parameters()],
            groups=self.groups,
        )

    def _way(self, plan: Plan, lengths: np.ndarray, packs: list[Pack], step: int) -> str:
        """`single`, `retain` or `cached`; every rank decides alike, because all know the whole plan."""
        way, stages = self.config.way, self.groups.pp_size
        is_single = plan.max_microbatches == 1 and stages == 1
        assert stages == 1 or way in ("auto", "cached"), (stages, way)
        check_packs(self.config, plan, step)
        if way != "auto":
            return way
        most = int(plan.tokens_per_rank(lengths).max())
        if is_single:
            way, why = "single", "one pack a rank and one pipeline stage"
        elif stages > 1:
            way, why = "cached", f"{stages} pipeline stages"
        else:
            if self.retain_tokens is None:
                self.retain_tokens = self._measure(packs)
            fits = most <= self.retain_tokens
            way, why = ("retain" if fits else "cached"), f"graphs of {self.retain_tokens} tokens a rank fit"
        if way not in self._logged:
            self._logged.add(way)
            log.info("step.way auto: %s (%s; this batch has %d tokens a rank at most)", way, why, most)
        return way

    def _measure(self, packs: list[Pack]) -> int:
        (chunk,) = self.chunks
        return retainable_tokens(
            lambda: chunk(packs[0]),
            packs[0].real_tokens,
            list(chunk.module.parameters()),
            self.optimizer,
            bool(self.ema_decay),
        )

    def _reseed(self, step: int, index: int, chunk: int) -> None:
        seed_everything(microbatch_seed(self.seed, step, index, chunk, self.groups))

    def _score(self, batch: Batch, plan: Plan, embeddings: list[Tensor]) -> tuple[Scores, list[Tensor], float]:
        """Scores, `dL/dE` of each pack, and the temperature. `embeddings`: float32 [texts of a pack, D] each."""
        log_scale = self.chunks[-1].module.log_scale
        temperature = self.loss_config.temperature
        if log_scale is not None:
            low, high = self.loss_config.temperature_range
            temperature = min(max(math.exp(-log_scale.item()), low), high)
        scores = self.scorer(batch, plan.owned(), torch.cat([part.detach() for part in embeddings]), temperature)
        return scores, list(scores.grad.split([len(part) for part in embeddings])), temperature

    def _pull(self, scores: Scores) -> Tensor | None:
        """Gradient of the learned temperature, [1]; zero where it would lead further out of its range."""
        log_scale = self.chunks[-1].module.log_scale
        if log_scale is None:
            return None
        low, high = self.loss_config.temperature_range
        grad = scores.grad_log_scale.reshape(1)
        # A step goes against the gradient, so a positive one warms up.
        is_out = ((log_scale <= -math.log(high)) & (grad > 0)) | ((log_scale >= -math.log(low)) & (grad < 0))
        return grad.masked_fill(is_out, 0.0)

    def _one_stage(
        self, batch: Batch, plan: Plan, packs: list[Pack], step: int, timer: PhaseTimer, num_kept: int
    ) -> tuple[Tensor, float]:
        """The graphs of the last `num_kept` packs are kept; the others are embedded again, one at a time.

        The kept ones are done with first, so there are never more than `num_kept` graphs.
        """
        (chunk,) = self.chunks
        embeddings = []
        with timer("embed"):
            for index, pack in enumerate(packs):
                self._reseed(step, index, 0)
                with nullcontext() if index >= len(packs) - num_kept else torch.no_grad():
                    embeddings.append(chunk(pack))
        with timer("score"):
            scores, grads, temperature = self._score(batch, plan, embeddings)
            pull = self._pull(scores)
        with timer("backward"):
            for index in reversed(range(len(packs))):
                if index < len(packs) - num_kept:
                    self._reseed(step, index, 0)
                    embeddings[index] = chunk(packs[index])
                roots, upstream = [embeddings[index]], [grads[index]]
                if index == 0 and pull is not None:
                    roots, upstream = [*roots, chunk.module.log_scale], [*upstream, pull]
                with nullcontext() if index == 0 else chunk.no_sync():
                    torch.autograd.backward(roots, upstream)
                embeddings[index] = None  # its graph is done with
            finalize_model_grads(self.chunks)
        return scores.totals, temperature

    def _pipelined(
        self, batch: Batch, plan: Plan, packs: list[Pack], step: int, timer: PhaseTimer
    ) -> tuple[Tensor, float]:
        """Embed without graphs, score, then embed again with them, both under Megatron's schedule."""

        def reseed(index: int, chunk: int) -> None:
            self._reseed(step, index, chunk)

        with timer("embed"):
            embeddings = embed_packs(self.chunks, packs, reseed)
        totals = torch.zeros(self.scorer.num_totals, device=device.current())
        temperature = self.loss_config.temperature
        grads, pull = [], None
        if self.groups.is_last_stage:
            with timer("score"):
                scores, grads, temperature = self._score(batch, plan, embeddings)
                totals, pull = scores.totals, self._pull(scores)

        def surrogate(index: int, again: Tensor) -> Tensor:
            value = (again * grads[index]).sum()
            if pull is not None:
                value = value + (self.chunks[-1].module.log_scale * pull).sum() / len(packs)
            # The schedule divides by this rank's number of microbatches, which may differ from other ranks', and
            # multiplies by the context-parallel size, which sum_over_context has done.
            return value * len(packs) / self.groups.cp_size

        with timer("backward"):
            run_schedule(self.chunks, packs, surrogate, forward_only=False, before_forward=reseed)
        return totals, temperature
