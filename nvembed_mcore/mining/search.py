"""The best documents of each query among embeddings that are read from disk shard by shard.

Letters: `Q` queries, `N` documents, `D` embedding size, `k` candidates of each query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nvembed_mcore import device
from nvembed_mcore.evaluation.retrieval import DOCUMENT_BLOCK, search_blocks

FIRST_CANDIDATES = 100
"""Of each query at first; those that need more get `GROWTH` times as many, until they have enough or `depth`."""
GROWTH = 4


@dataclass
class Candidates:
    """Documents of each query, best first; equal scores by document.

    Attributes:
        scores: float32 [Q, k], falling; `-inf` where a query has fewer.
        documents: int64 [Q, k]; -1 there.
    """

    scores: np.ndarray
    documents: np.ndarray


class Search(Protocol):
    """Exact or approximate: the `k` best documents of queries [Q, D], with exact scores."""

    def __call__(self, queries: np.ndarray, k: int) -> Candidates: ...


class Rows:
    """Rows of all shards together: `rows[numbers]` of int64 [n] is float32 [n, D], in memory."""

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self._shards = shards
        self._starts = np.cumsum([0, *map(len, shards)])

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        found = np.empty((len(numbers), self._shards[0].shape[1]), dtype=np.float32)
        holders = np.searchsorted(self._starts, numbers, side="right") - 1
        for holder in np.unique(holders):
            mine = holders == holder
            found[mine] = self._shards[holder][numbers[mine] - self._starts[holder]]
        return found


def exact_search(shards: Iterable[np.ndarray]) -> Search:
    """A search through all documents. `shards` are arrays [n, D], gone through once for each call."""

    def search(queries: np.ndarray, k: int) -> Candidates:
        rows = torch.tensor(queries, dtype=torch.float32, device=device.current())
        scores, documents = search_blocks(rows, document_blocks(shards), k)
        return Candidates(scores.cpu().numpy(), documents.cpu().numpy())

    return search


def document_blocks(shards: Iterable[np.ndarray]) -> Iterator[Tensor]:
    """The rows of all shards in blocks of `DOCUMENT_BLOCK`, in memory that the next block overwrites.

    The shards may be of any sizes: products of one shape are the same bits, and so the result does not depend on them.
    """
    buffer, filled = None, 0
    for shard in shards:
        if buffer is None:
            buffer = torch.empty(DOCUMENT_BLOCK, shard.shape[1])
        start = 0
        while start < len(shard):
            count = min(len(shard) - start, len(buffer) - filled)
            buffer.numpy()[filled : filled + count] = shard[start : start + count]
            start, filled = start + count, filled + count
            if filled == len(buffer):
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]


def search_until_enough(
    search: Search,
    queries: np.ndarray,
    lacking: Callable[[Candidates, np.ndarray], np.ndarray],
    *,
    depth: int,
    num_documents: int,
) -> Candidates:
    """Candidates of each query: `FIRST_CANDIDATES`, and `GROWTH` times as many again while it lacks some.

    Args:
        search: gives the candidates.
        queries: [Q, D].
        lacking: candidates and the queries they belong to (int64) -> bool, those that need more.
        depth: no query gets more than these.
        num_documents: `N`.
    """
    largest = min(depth, num_documents)
    k = min(FIRST_CANDIDATES, largest)
    found = search(queries, k)
    asked = np.arange(len(queries))
    asked = asked[lacking(found, asked)]
    while k < largest and len(asked):
        k = min(k * GROWTH, largest)
        more = search(queries[asked], k)
        found = _widened(found, k)
        found.scores[asked], found.documents[asked] = more.scores, more.documents
        asked = asked[lacking(more, asked)]
    return found


def _widened(candidates: Candidates, k: int) -> Candidates:
    missing = ((0, 0), (0, k - candidates.scores.shape[1]))
    return Candidates(
        np.pad(candidates.scores, missing, constant_values=-np.inf),
        np.pad(candidates.documents, missing, constant_values=-1),
    )
