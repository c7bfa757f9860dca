"""From sequences to ranks and microbatches, and from a microbatch's texts to a flat token vector.

Letters: `T` tokens in a pack, `N` sequences of the global batch, `W` data-parallel size.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Text:
    """One tokenised text: `token_ids` int32 [length], and the first position that is pooled."""

    token_ids: np.ndarray
    pooled_from: int

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class Pack:
    """A flat token vector without padding inside.

    Attributes:
        token_ids: int64 [T].
        lengths: int64, tokens of each sequence, in order; when `num_texts` is smaller, the last is a dummy that only
            fills the tail and is never pooled.
        pooled_from: int64 [num_texts], first pooled position of each text.
        num_texts: sequences that are texts of the batch.
    """

    token_ids: np.ndarray
    lengths: np.ndarray
    pooled_from: np.ndarray
    num_texts: int

    @property
    def real_tokens(self) -> int:
        return int(self.lengths[: self.num_texts].sum())


@dataclass(frozen=True)
class Plan:
    """Which texts each data-parallel rank embeds, and in which pack.

    `packs[rank][microbatch]` holds int64 text numbers. Every rank has at least one pack, which may be empty.
    """

    packs: list[list[np.ndarray]]

    @property
    def max_microbatches(self) -> int:
        return max(len(packs) for packs in self.packs)

    def owned(self) -> list[np.ndarray]:
        """For each rank the numbers of its texts, in the order in which it embeds them."""
        return [np.concatenate(packs) for packs in self.packs]


def make_plan(lengths: Sequence[int] | np.ndarray, num_ranks: int, token_budget: int) -> Plan:
    """Spread texts over ranks longest first, then over packs of at most `token_budget` tokens.

    A pure function of its arguments, so every rank computes the same plan. A text longer than the budget gets a pack
    of its own.

    Args:
        lengths: tokens of each text, [N].
        num_ranks: data-parallel size W.
        token_budget: tokens of one pack.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    loads = [(0, rank) for rank in range(num_ranks)]
    assigned: list[list[int]] = [[] for _ in range(num_ranks)]
    for number in order.tolist():
        load, rank = heapq.heappop(loads)
        assigned[rank].append(number)
        heapq.heappush(loads, (load + int(lengths[number]), rank))
    return Plan([_split(numbers, lengths, token_budget) for numbers in assigned])


def _split(numbers: list[int], lengths: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """One rank's texts (longest first) into as few even packs as the budget allows."""
    total = int(lengths[numbers].sum())
    num_packs = max(1, min(len(numbers), -(-total // token_budget)))
    while True:
        loads = [(0, pack) for pack in range(num_packs)]
        packs: list[list[int]] = [[] for _ in range(num_packs)]
        for number in numbers:
            load, pack = heapq.heappop(loads)
            packs[pack].append(number)
            heapq.heappush(loads, (load + int(lengths[number]), pack))
        fits = all(load <= token_budget or len(packs[pack]) == 1 for load, pack in loads)
        if fits or num_packs >= len(numbers):
            return [np.array(pack, dtype=np.int64) for pack in packs]
        num_packs += 1


def make_pack(texts: Sequence[Text], multiple: int = 1) -> Pack:
    """Lay texts one behind the other; a dummy sequence fills the tail up to a multiple of `multiple` tokens.

    An empty list gives a pack with only the dummy: a rank without work still takes part in every collective.
    """
    lengths = [len(text) for text in texts]
    assert all(lengths), "an empty sequence must never reach a pack"
    total = sum(lengths)
    tail = -total % multiple if texts else multiple
    token_ids = np.concatenate([*(text.token_ids for text in texts), np.zeros(tail, np.int32)]).astype(np.int64)
    return Pack(
        token_ids=token_ids,
        lengths=np.array(lengths + [tail] * (tail > 0), dtype=np.int64),
        pooled_from=np.array([text.pooled_from for text in texts], dtype=np.int64),
        num_texts=len(texts),
    )
