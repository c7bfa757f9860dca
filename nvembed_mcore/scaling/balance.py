"""How evenly a batch's texts lie on ranks and in packs, by the plan that the trainer itself makes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from nvembed_mcore.data.packing import Plan, make_plan
from nvembed_mcore.scaling.activations import pack_multiple

if TYPE_CHECKING:
    from nvembed_mcore.scaling.layout import Layout
    from nvembed_mcore.scaling.workload import Workload


@dataclass(frozen=True)
class Balance:
    """Of the sampled steps.

    Attributes:
        imbalance: tokens of the fullest rank over those of the mean one; the mean over steps.
        worst_imbalance: of the worst step.
        microbatches: packs of the rank with the most of them; the mean over steps.
        tokens_per_rank: mean tokens of a data-parallel rank in a step.
        padding: share of tokens that only fill packs up.
        empty_ranks: data-parallel ranks without any text; the mean over steps.
        fullest: for each step, the tokens of each pack of the fullest rank, with what fills them up.
    """

    imbalance: float
    worst_imbalance: float
    microbatches: float
    tokens_per_rank: float
    padding: float
    empty_ranks: float
    fullest: list[list[int]]


def balance_of(workload: Workload, layout: Layout) -> Balance:
    """Balance of the sampled batches in a layout."""
    imbalances, microbatches, padded, empty, fullest = [], [], 0, [], []
    multiple, real = pack_multiple(workload, layout), 0
    for step in range(len(workload.lengths)):
        lengths, plan = workload.texts(step), plan_of(workload, layout, step)
        ranks = plan.tokens_per_rank(lengths)
        sizes = [[_filled(int(lengths[pack].sum()), multiple) for pack in packs] for packs in plan.packs]
        imbalances.append(ranks.max() / ranks.mean())
        microbatches.append(plan.max_microbatches)
        empty.append(int((ranks == 0).sum()))
        fullest.append(sizes[int(ranks.argmax())])
        real += int(lengths.sum())
        padded += sum(map(sum, sizes))
    return Balance(
        imbalance=float(np.mean(imbalances)),
        worst_imbalance=float(np.max(imbalances)),
        microbatches=float(np.mean(microbatches)),
        tokens_per_rank=workload.tokens_per_step / layout.dp,
        padding=1 - real / padded,
        empty_ranks=float(np.mean(empty)),
        fullest=fullest,
    )


def _filled(tokens: int, multiple: int) -> int:
    return tokens + -tokens % multiple if tokens else multiple


def plan_of(workload: Workload, layout: Layout, step: int) -> Plan:
    """The trainer's plan of a sampled step: a pack of a context-parallel group holds `cp` times the budget."""
    budget = layout.tokens_per_microbatch * layout.cp
    return _plan(workload.texts(step).tobytes(), layout.dp, budget, layout.pp if layout.chunks > 1 else 1)


@lru_cache(maxsize=512)
def _plan(lengths: bytes, ranks: int, budget: int, multiple: int) -> Plan:
    """Kept, because many layouts of a plan share it."""
    return make_plan(np.frombuffer(lengths, dtype=np.int64), ranks, budget, multiple=multiple)
