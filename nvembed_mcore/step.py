"""One optimizer step over packed microbatches (docs/design.md).

Three phases, whatever the layout: embed every pack; gather all embeddings and score them; push the gradient of each
embedding back through its pack. `single` keeps the graph of the one pack between the phases. `cached` embeds without
a graph, and embeds again in the third phase: the exact gradient of a batch of any size in the memory of one pack.

Letters: `N` texts of the global batch, `Q` queries among them, `n` texts of this rank, `D` embedding size, `W`
data-parallel size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nvembed_mcore import device
from nvembed_mcore.config import ConfigError, LossConfig, StepConfig
from nvembed_mcore.data.batch import Batch
from nvembed_mcore.data.packing import Pack, Plan, Text, make_pack, make_plan
from nvembed_mcore.loss import Targets, info_nce
from nvembed_mcore.metrics import PhaseTimer
from nvembed_mcore.parallel.gather import gather_embeddings, share_from_last_stage, sum_over_data_ranks
from nvembed_mcore.parallel.groups import Groups, seed_everything


class NonFiniteLossError(RuntimeError):
    """The loss of a step, or its gradient, is not a number; nothing of the step is saved."""


@dataclass(frozen=True)
class StepOutput:
    """What a step reports, the same on every rank.

    `loss`: mean over the Q queries. `accuracy`: share of queries whose positive scores highest among its candidates.
    `grad_norm`: norm of the whole gradient before clipping. Tokens are those of all ranks.
    """

    loss: float
    accuracy: float
    grad_norm: float
    real_tokens: int
    padded_tokens: int
    num_microbatches: int


def microbatch_seed(seed: int, step: int, microbatch: int, groups: Groups) -> int:
    """Seed of one microbatch's dropout; tensor ranks share it (Megatron's tracker tells them apart)."""
    words = f"{seed} {step} {microbatch} {groups.dp_rank} {groups.pp_rank}".encode()
    return int.from_bytes(hashlib.sha256(words).digest()[:4], "little") & 0x7FFFFFFF


def pack_multiple(model: DistributedDataParallel) -> int:
    """A pack's token count is a multiple of this: under sequence parallelism each tensor rank takes an equal part."""
    config = model.config
    return config.tensor_model_parallel_size if config.sequence_parallel else 1


def packs_of_rank(texts: list[Text], plan: Plan, groups: Groups, multiple: int) -> list[Pack]:
    """This data-parallel rank's packs."""
    return [make_pack([texts[number] for number in numbers], multiple) for numbers in plan.packs[groups.dp_rank]]


def run_schedule(
    model: DistributedDataParallel,
    packs: list[Pack],
    on_output: Callable[[int, Tensor], Tensor],
    *,
    forward_only: bool,
    before_forward: Callable[[int], None] = lambda index: None,
) -> None:
    """Send packs through Megatron's pipeline schedule.

    Args:
        on_output: called on the last stage with a pack's index and its embeddings; returns the scalar whose gradient
            is wanted. Results are keyed by index, because a schedule need not call in order.
        forward_only: no backward. This alone does not switch autograd off.
        before_forward: called with the index before each forward on every stage.
    """

    def forward_step(data: Iterator[tuple[int, Pack]], chunk: torch.nn.Module):
        index, pack = next(data)
        before_forward(index)
        return chunk(pack), lambda embeddings: (on_output(index, embeddings), {})

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(enumerate(packs)),
        model=[model],
        num_microbatches=len(packs),
        seq_length=max(len(pack.token_ids) for pack in packs),
        micro_batch_size=1,
        forward_only=forward_only,
    )


@torch.no_grad()
def embed_packs(
    model: DistributedDataParallel, packs: list[Pack], before_forward: Callable[[int], None] = lambda index: None
) -> list[Tensor]:
    """Embeddings of each pack, float32 [texts of the pack, D], without a graph; empty off the last stage."""
    found: dict[int, Tensor] = {}

    def keep(index: int, embeddings: Tensor) -> Tensor:
        found[index] = embeddings
        return embeddings.new_zeros(())

    run_schedule(model, packs, keep, forward_only=True, before_forward=before_forward)
    return [found[index] for index in sorted(found)]


@torch.no_grad()
def embed_texts(model: DistributedDataParallel, groups: Groups, texts: list[Text], token_budget: int) -> Tensor | None:
    """Embeddings of many texts by all ranks together, for evaluation.

    Returns:
        float32 [len(texts), D] in the given order on the last pipeline stage, None elsewhere.
    """
    plan = make_plan([len(text) for text in texts], groups.dp_size, token_budget)
    was_training = model.training
    model.eval()
    embeddings = embed_packs(model, packs_of_rank(texts, plan, groups, pack_multiple(model)))
    model.train(was_training)
    if not groups.is_last_stage:
        return None
    return gather_embeddings(torch.cat(embeddings), plan.owned(), groups.dp)


class ContrastiveStep:
    """Computes and applies the gradient of one global batch, equal in every layout to that of one process."""

    def __init__(
        self,
        model: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        groups: Groups,
        *,
        step: StepConfig,
        loss: LossConfig,
        seed: int,
    ) -> None:
        self.model, self.optimizer, self.groups = model, optimizer, groups
        self.config, self.loss_config, self.seed = step, loss, seed

    def __call__(self, batch: Batch, step: int, timer: PhaseTimer) -> StepOutput:
        """Take optimizer step number `step`.

        Raises:
            ConfigError: `step.way` is `single` but the batch needs several packs a rank or the layout has stages.
            NonFiniteLossError: the loss (before any update) or the gradient is not a number; raised on every rank.
        """
        plan = make_plan(batch.lengths, self.groups.dp_size, self.config.tokens_per_microbatch)
        packs = packs_of_rank(batch.texts, plan, self.groups, pack_multiple(self.model))
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        way = self._single if self._way(plan) == "single" else self._cached
        totals = way(batch, plan, packs, lambda index: self._reseed(step, index), timer)
        tokens = [float(sum(pack.real_tokens for pack in packs)), float(sum(len(pack.token_ids) for pack in packs))]
        totals = torch.cat([totals.detach(), torch.tensor(tokens, device=totals.device)])
        totals = share_from_last_stage(sum_over_data_ranks(totals.double(), self.groups), self.groups).tolist()
        loss = totals[0] / batch.num_queries
        if not np.isfinite(loss):
            raise NonFiniteLossError(f"step {step}: the loss is {loss}; no weight was changed by this step")
        with timer("optimizer"):
            _, grad_norm, _ = self.optimizer.step()
        if not np.isfinite(grad_norm):
            raise NonFiniteLossError(
                f"step {step}: the loss is {loss}, but the norm of its gradient is {grad_norm}; the weights in memory "
                f"are spoiled, those of the newest checkpoint are not"
            )
        return StepOutput(
            loss=loss,
            accuracy=totals[1] / batch.num_queries,
            grad_norm=float(grad_norm),
            real_tokens=int(totals[2]),
            padded_tokens=int(totals[3]),
            num_microbatches=plan.max_microbatches,
        )

    def _way(self, plan: Plan) -> str:
        """`single` or `cached`; every rank decides alike, because all know the whole plan."""
        fits = plan.max_microbatches == 1 and self.groups.pp_size == 1
        if self.config.way == "single" and not fits:
            raise ConfigError(
                f"step.way 'single' needs one pack a rank and one pipeline stage; this batch needs "
                f"{plan.max_microbatches} pack(s) of {self.config.tokens_per_microbatch} tokens on "
                f"{self.groups.pp_size} stage(s). Use 'auto' or 'cached', or raise step.tokens_per_microbatch"
            )
        return self.config.way if self.config.way != "auto" else ("single" if fits else "cached")

    def _reseed(self, step: int, index: int) -> None:
        seed_everything(microbatch_seed(self.seed, step, index, self.groups))

    def _single(self, batch: Batch, plan: Plan, packs: list[Pack], reseed: Callable, timer: PhaseTimer) -> Tensor:
        totals: list[Tensor] = []

        def score(_: int, embeddings: Tensor) -> Tensor:
            loss, counts = self._score(batch, plan, embeddings)
            totals.append(counts)
            return loss

        with timer("forward_backward"):
            run_schedule(self.model, packs, score, forward_only=False, before_forward=reseed)
        return totals[0]

    def _cached(self, batch: Batch, plan: Plan, packs: list[Pack], reseed: Callable, timer: PhaseTimer) -> Tensor:
        with timer("embed"):
            embeddings = embed_packs(self.model, packs, reseed)
        grads: tuple[Tensor, ...] = ()
        totals = torch.zeros(2, device=device.current())
        if self.groups.is_last_stage:
            with timer("score"):
                joined = torch.cat(embeddings).requires_grad_()
                loss, totals = self._score(batch, plan, joined)
                (grad,) = torch.autograd.grad(loss, joined)
                grads = grad.split([len(part) for part in embeddings])

        def surrogate(index: int, again: Tensor) -> Tensor:
            # The schedule divides by this rank's number of microbatches, which may differ from other ranks'.
            return (again * grads[index]).sum() * len(packs)

        with timer("forward_backward"):
            run_schedule(self.model, packs, surrogate, forward_only=False, before_forward=reseed)
        return totals

    def _score(self, batch: Batch, plan: Plan, local: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's share of the loss, and [sum of its rows' losses, rows whose positive is first].

        `local` float32 [n, D]: embeddings of this rank's texts in the order of `plan.owned()`.
        """
        owned = plan.owned()
        everything = gather_embeddings(local, owned, self.groups.dp)
        mine = owned[self.groups.dp_rank]
        rows = np.sort(mine[mine < batch.num_queries])
        queries = everything[torch.as_tensor(rows, device=local.device)]
        loss, correct = info_nce(
            queries,
            everything[batch.num_queries :],
            self._targets(batch, rows, local.device),
            self.loss_config.temperature,
        )
        totals = torch.stack([loss.detach(), correct])
        # The one place where W appears (docs/design.md): data parallelism divides by it.
        return loss * (self.groups.dp_size / batch.num_queries), totals

    def _targets(self, batch: Batch, rows: np.ndarray, where: torch.device) -> Targets:
        def tensor(values: np.ndarray) -> Tensor:
            return torch.as_tensor(values).to(where)

        return Targets(
            query=tensor(rows),
            positive=tensor(batch.positive[rows]),
            in_batch=tensor(batch.in_batch[rows]),
            positive_ids=tensor(batch.positive_ids[rows]),
            passage_query=tensor(batch.passage_query),
            passage_ids=tensor(batch.passage_ids),
            mask_same_document=self.loss_config.mask_same_document,
        )
