"""One optimizer step over packed microbatches (docs/design.md).

Three phases, whatever the layout: embed every pack; gather all embeddings and score them; push the gradient of each
embedding back through its pack. The ways differ in what is kept between the phases. `retain` keeps the graphs of all
packs (`single` is its case of one pack). `cached` keeps that of one pack, and embeds the others again in the third
phase: the exact gradient of a batch of any size in the memory of one pack. With pipeline stages, where only `cached`
works, nothing is kept.

With R-Drop (r_drop.py) a rank's packs stand in the list twice: seeds of dropout go by number, so the second half draws
others. With FGM (adversarial.py) the three phases come twice before the one update.

Letters: `N` texts of the global batch, `Q` queries among them, `n` texts of this rank, `D` embedding size, `W`
data-parallel size.
"""

from __future__ import annotations

import hashlib
import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from nvembed_mcore import device, nonfinite
from nvembed_mcore.adversarial import Adversary
from nvembed_mcore.config import ConfigError, LossConfig, StepConfig
from nvembed_mcore.data.batch import Batch
from nvembed_mcore.data.packing import Pack, Plan
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
from nvembed_mcore.score import Scorer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepOutput:
    """What a step reports, the same on every rank.

    `loss`: mean over the Q queries of all that is trained on. `accuracy`: share of queries whose positive scores
    highest among its candidates. `grad_norm`: norm of the whole gradient before clipping. `temperature`: that of this
    step. Tokens are those of all ranks. `communication`: seconds by group, where they were measured
    (parallel/traffic.py). `terms`: of distillation, R-Drop and FGM, where they are on, before their weights:
    `teacher_divergence`, `r_drop_divergence` and `moved_loss`, means over the queries.
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
    terms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Walk:
    """One walk of a step through its packs.

    Attributes:
        packs: of this rank; with R-Drop each stands in both halves of the list.
        weight: of its loss.
        is_last: gradients are reduced behind it, and the temperature gets its own.
        pull_before: what the walks before say of a learned temperature.
    """

    batch: Batch
    plan: Plan
    packs: list[Pack]
    step: int
    timer: PhaseTimer
    way: str
    weight: float = 1.0
    is_last: bool = True
    pull_before: Tensor | float = 0.0


@dataclass(frozen=True)
class _Sums:
    """What a walk found on this rank: `Scores.totals` (zeros off the last stage), the temperature, and the gradient to
    log(1 / temperature) with that of the walks before."""

    totals: Tensor
    temperature: float
    grad_log_scale: Tensor | float


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
        self.adversary = Adversary(chunks[0].module, groups, step.fgm_epsilon) if step.fgm_epsilon else None
        terms = {"teacher_divergence": loss.distillation.is_on, "r_drop_divergence": loss.r_drop_weight}
        self.terms = [name for name, is_on in (terms | {"moved_loss": step.fgm_epsilon}).items() if is_on]
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
            sums = self._walks(_Walk(batch, plan, packs * self.scorer.views, step, timer, way))
            loss, accuracy, *more, real, padded, temperature = self._share(sums, packs)
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
            terms={name: total / batch.num_queries for name, total in zip(self.terms, more, strict=True)},
        )

    def _walks(self, whole: _Walk) -> _Sums:
        """One walk, or with FGM a second one over the moved texts, whose loss is the last of the totals."""
        walk = self._pipelined if self.groups.pp_size > 1 else self._one_stage
        if self.adversary is None:
            return walk(whole)
        weight = self.config.fgm_weight
        with self.adversary.keeps_gradients():
            found = walk(replace(whole, is_last=False))
        with self.adversary.moves_texts():
            moved = walk(replace(whole, weight=weight, pull_before=found.grad_log_scale))
        loss, others = found.totals[:1] + weight * moved.totals[:1], found.totals[1:]
        return replace(moved, totals=torch.cat([loss, others, moved.totals[:1]]))

    def _share(self, found: _Sums, packs: list[Pack]) -> list[float]:
        """Sums over data-parallel ranks and the last stage's temperature, on every rank."""
        tokens = [float(sum(pack.real_tokens for pack in packs)), float(sum(pack.padded_tokens for pack in packs))]
        totals = found.totals.double()
        sums = torch.cat([totals, torch.tensor(tokens, dtype=torch.float64, device=totals.device)])
        sums = sum_over_data_ranks(sums, self.groups)
        last = torch.tensor([found.temperature], dtype=torch.float64, device=totals.device)
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
            embeddings=embed_packs(self.chunks, packs, lambda index, chunk: self._begin(step, index, chunk)),
            parameters=[named for chunk in self.chunks for named in chunk.module.named_parameters()],
            groups=self.groups,
            moves_texts=self.adversary is not None,
        )

    def _way(self, plan: Plan, lengths: np.ndarray, packs: list[Pack], step: int) -> str:
        """`single`, `retain` or `cached`; every rank decides alike, because all know the whole plan."""
        way, stages = self.config.way, self.groups.pp_size
        views = self.scorer.views
        is_single = plan.max_microbatches * views == 1 and stages == 1
        assert stages == 1 or way in ("auto", "cached"), (stages, way)
        check_packs(self.config, plan, step)
        if way != "auto":
            return way
        most = views * int(plan.tokens_per_rank(lengths).max())
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
        adversary = self.adversary
        with adversary.keeps_gradients() if adversary else nullcontext():
            return retainable_tokens(
                lambda: chunk(packs[0]),
                packs[0].real_tokens,
                list(chunk.module.parameters()),
                self.optimizer,
                bool(self.ema_decay),
                adversary.bytes_per_token if adversary else 0.0,
            )

    def _reseed(self, step: int, index: int, chunk: int) -> None:
        seed_everything(microbatch_seed(self.seed, step, index, chunk, self.groups))

    def _begin(self, step: int, index: int, chunk: int) -> None:
        """Before each forward pass of a pack."""
        self._reseed(step, index, chunk)
        if self.adversary:
            self.adversary.select(index)

    def _score(self, walk: _Walk, embeddings: list[Tensor]) -> tuple[_Sums, list[Tensor], Tensor | None]:
        """What the walk found; `dL/dE` of each pack; the gradient of a learned temperature, in the last walk.

        `embeddings`: float32 [texts of a pack, D] each.
        """
        log_scale = self.chunks[-1].module.log_scale
        temperature = self.loss_config.temperature
        if log_scale is not None:
            low, high = self.loss_config.temperature_range
            temperature = min(max(math.exp(-log_scale.item()), low), high)
        local, views = torch.cat([part.detach() for part in embeddings]), self.scorer.views
        local = local.unflatten(0, (views, len(local) // views))
        scores = self.scorer(walk.batch, walk.plan.owned(), local, temperature)
        grads, pull = scores.grad.flatten(0, 1), scores.grad_log_scale
        if walk.weight != 1:
            grads, pull = grads * walk.weight, pull * walk.weight
        sums = _Sums(scores.totals, temperature, pull + walk.pull_before)
        pull = self._pull(sums.grad_log_scale) if walk.is_last else None
        return sums, list(grads.split([len(part) for part in embeddings])), pull

    def _pull(self, grad_log_scale: Tensor) -> Tensor | None:
        """Gradient of the learned temperature, [1]; zero where it would lead further out of its range."""
        log_scale = self.chunks[-1].module.log_scale
        if log_scale is None:
            return None
        low, high = self.loss_config.temperature_range
        grad = grad_log_scale.reshape(1)
        # A step goes against the gradient, so a positive one warms up.
        is_out = ((log_scale <= -math.log(high)) & (grad > 0)) | ((log_scale >= -math.log(low)) & (grad < 0))
        return grad.masked_fill(is_out, 0.0)

    def _one_stage(self, walk: _Walk) -> _Sums:
        """The graphs of the last packs are kept (of all, or of one); the others are embedded again, one at a time.

        The kept ones are done with first, so there are never more than these.
        """
        (chunk,) = self.chunks
        num_again = len(walk.packs) - 1 if walk.way == "cached" else 0
        embeddings = []
        with walk.timer("embed"):
            for index, pack in enumerate(walk.packs):
                self._begin(walk.step, index, 0)
                with torch.no_grad() if index < num_again else nullcontext():
                    embeddings.append(chunk(pack))
        with walk.timer("score"):
            sums, grads, pull = self._score(walk, embeddings)
        with walk.timer("backward"):
            for index in reversed(range(len(walk.packs))):
                if index < num_again:
                    self._begin(walk.step, index, 0)
                    embeddings[index] = chunk(walk.packs[index])
                roots, upstream = [embeddings[index]], [grads[index]]
                if index == 0 and pull is not None:
                    roots, upstream = [*roots, chunk.module.log_scale], [*upstream, pull]
                with nullcontext() if index == 0 and walk.is_last else chunk.no_sync():
                    torch.autograd.backward(roots, upstream)
                embeddings[index] = None  # its graph is done with
            if walk.is_last:
                finalize_model_grads(self.chunks)
        return sums

    def _pipelined(self, walk: _Walk) -> _Sums:
        """Embed without graphs, score, then embed again with them, both under Megatron's schedule."""
        packs = walk.packs

        def begin(index: int, chunk: int) -> None:
            self._begin(walk.step, index, chunk)

        with walk.timer("embed"):
            embeddings = embed_packs(self.chunks, packs, begin)
        nothing = torch.zeros(self.scorer.num_totals, device=device.current())
        sums, grads, pull = _Sums(nothing, self.loss_config.temperature, 0.0), [], None
        if self.groups.is_last_stage:
            with walk.timer("score"):
                sums, grads, pull = self._score(walk, embeddings)

        def surrogate(index: int, again: Tensor) -> Tensor:
            value = (again * grads[index]).sum()
            if pull is not None:
                value = value + (self.chunks[-1].module.log_scale * pull).sum() / len(packs)
            # The schedule divides by this rank's number of microbatches, which may differ from other ranks', and
            # multiplies by the context-parallel size, which sum_over_context has done.
            return value * len(packs) / self.groups.cp_size

        with walk.timer("backward"):
            run_schedule(self.chunks, packs, surrogate, forward_only=False, reduces=walk.is_last, before_forward=begin)
        return sums
