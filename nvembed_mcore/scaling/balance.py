"""How evenly a batch's texts lie on ranks and in packs, by the plan that the trainer itself makes.

Letters: `W` data-parallel size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from nvembed_mcore.data.packing import Split, make_plan

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
    plans = [plan_of(workload, layout, step) for step in range(len(workload.lengths))]
    ratios = [float(plan.tokens.max() / plan.tokens.mean()) for plan in plans]
    real, padded = (sum(int(getattr(plan, name).sum()) for plan in plans) for name in ("tokens", "filled"))
    return Balance(
        imbalance=float(np.mean(ratios)),
        worst_imbalance=max(ratios),
        microbatches=float(np.mean([max(len(packs) for packs in plan.packs) for plan in plans])),
        tokens_per_rank=workload.tokens_per_step / layout.dp,
        padding=1 - real / padded,
        empty_ranks=float(np.mean([(plan.tokens == 0).sum() for plan in plans])),
        fullest=[
            [filled_tokens(pack, plan.multiple, layout.cp) for pack in plan.lengths(int(plan.tokens.argmax()))]
            for plan in plans
        ],
    )


@dataclass(frozen=True, eq=False)
class Planned:
    """The plan of one batch, and what is asked of it for every rank.

    Attributes:
        packs: for each rank and pack int64 text numbers, as `data.packing.Plan`.
        sizes: int64 [N], tokens of each text.
        multiple: tokens of a rank's part of a pack are a multiple of this.
        texts, queries, tokens, filled, largest: int64 [W], of each rank its texts, the queries among them, their
            tokens, those with what fills packs up, and the tokens of its largest pack.
    """

    packs: list[list[np.ndarray]]
    sizes: np.ndarray
    multiple: int
    texts: np.ndarray
    queries: np.ndarray
    tokens: np.ndarray
    filled: np.ndarray
    largest: np.ndarray

    def lengths(self, rank: int) -> list[np.ndarray]:
        """Tokens of the texts of each of a rank's packs."""
        return [self.sizes[pack] for pack in self.packs[rank]]

    def owned(self, rank: int) -> np.ndarray:
        """Numbers of a rank's texts."""
        return np.concatenate(self.packs[rank])

    @property
    def holders(self) -> np.ndarray:
        """The rank of each text, int64 [N]."""
        found = np.empty(len(self.sizes), dtype=np.int64)
        for rank in range(len(self.packs)):
            found[self.owned(rank)] = rank
        return found


def plan_of(workload: Workload, layout: Layout, step: int) -> Planned:
    """The trainer's plan of a sampled step."""
    packs = layout.pp if layout.chunks > 1 else 1
    shape = (layout.dp, layout.tokens_per_microbatch, packs, layout.cp, pack_multiple(workload, layout))
    return _planned(workload.texts(step).tobytes(), workload.num_queries, *shape)


def pack_multiple(workload: Workload, layout: Layout) -> int:
    """Tokens of a context-parallel rank's part of a pack are a multiple of this, as `schedule.pack_multiple`."""
    is_split = layout.splits_tokens or workload.alignment > 1
    return workload.alignment * (layout.tp if is_split else 1)


def filled_tokens(lengths: np.ndarray, multiple: int, cp: int) -> int:
    """Tokens of a pack of texts of these lengths with all that fills it, on its CP ranks together (`make_pack`)."""
    whole = cp * (multiple if cp == 1 else math.lcm(2, multiple))
    total = int(Split(size=cp).filled(lengths).sum())
    return total + -total % whole if total else whole


@lru_cache(maxsize=1024)
def _planned(
    lengths: bytes, num_queries: int, ranks: int, budget: int, multiple_of_packs: int, cp: int, multiple: int
) -> Planned:
    """Kept, because many layouts of a plan share it."""
    sizes = np.frombuffer(lengths, dtype=np.int64)
    packs = make_plan(sizes, ranks, budget, multiple=multiple_of_packs, cp=cp).packs
    of_packs = [[int(sizes[pack].sum()) for pack in some] for some in packs]
    return Planned(
        packs=packs,
        sizes=sizes,
        multiple=multiple,
        texts=np.array([sum(map(len, some)) for some in packs]),
        queries=np.array([sum(int((pack < num_queries).sum()) for pack in some) for some in packs]),
        tokens=np.array([sum(some) for some in of_packs]),
        filled=np.array([sum(filled_tokens(sizes[pack], multiple, cp) for pack in some) for some in packs]),
        largest=np.array([max(some) for some in of_packs]),
    )
