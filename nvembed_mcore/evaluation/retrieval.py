"""Exact search and the metrics of a ranking: pure numerics.

Letters: `Q` queries, `N` documents, `D` embedding size, `k` ranks that are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from nvembed_mcore.data.beir import BeirSet

# Scores held at once: 1024 x 8192 float32 are 32 MiB.
QUERY_BLOCK = 1024
DOCUMENT_BLOCK = 8192


def search(queries: Tensor, documents: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` documents with the largest inner product for each query, exactly.

    Equal scores are ordered by document index, the smaller one first. Memory beyond the inputs and the result is
    that of one block of scores.

    Args:
        queries: [Q, D], floating point.
        documents: [N, D], same dtype and device.
        k: at least 1; of fewer than `k` documents, all are ranked.

    Returns:
        scores [Q, min(k, N)] in float32 (float64 for float64 inputs), falling; document indices int64, same shape.

    Raises:
        ValueError: shapes do not fit, there is no document, `k` is below 1, or an embedding is not finite.
    """
    return search_blocks(queries, documents.split(DOCUMENT_BLOCK), k)


def search_blocks(queries: Tensor, blocks: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """`search` in documents [N, D] that come as blocks of rows, each of them once: they need not fit in memory.

    The blocks are taken to the device and dtype in which the queries are scored.
    """
    _check(queries, k)
    working = torch.float64 if queries.dtype == torch.float64 else torch.float32
    parts = queries.to(working).split(QUERY_BLOCK)
    empty = torch.empty(0, dtype=torch.int64, device=queries.device)
    best = [(part.new_empty(len(part), 0), empty.expand(len(part), 0)) for part in parts]
    start = 0
    for block in blocks:
        if block.dim() != 2 or block.size(1) != queries.size(1):
            raise ValueError(
                f"queries and documents must be [Q, D] and [N, D], got {list(queries.shape)} and {list(block.shape)}"
            )
        if len(block):
            block = block.to(queries.device, working)
            best = [_improved(*found, part, block, start, k) for found, part in zip(best, parts, strict=True)]
            start += len(block)
    if not start:
        raise ValueError("there are no documents to search")
    scores, indices = map(torch.cat, zip(*best, strict=True))
    order = _order(scores, indices)
    return scores.gather(1, order), indices.gather(1, order)


def _check(queries: Tensor, k: int) -> None:
    if queries.dim() != 2:
        raise ValueError(f"queries must be [Q, D], got {list(queries.shape)}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    _check_finite(queries, "query", 0)


def _check_finite(embeddings: Tensor, name: str, start: int) -> None:
    bad = ~torch.isfinite(embeddings).all(dim=1)
    if bad.any():
        raise ValueError(f"{name} embedding {start + int(bad.int().argmax())} is not finite")


def _improved(
    best_scores: Tensor, best_indices: Tensor, queries: Tensor, block: Tensor, start: int, k: int
) -> tuple[Tensor, Tensor]:
    """The best of what was found so far and of one more block, whose first document has index `start`."""
    products = queries @ block.T
    # A document that is not finite makes its scores so, and they make the sum so: the documents are read only then.
    if not torch.isfinite(products.sum()):
        _check_finite(block, "document", start)
    indices = torch.arange(start, start + len(block), device=block.device).expand(products.shape)
    scores, indices = _best(products, indices, k)
    return _best(torch.cat([best_scores, scores], dim=1), torch.cat([best_indices, indices], dim=1), k)


def _best(scores: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` best of each row with their indices, in any order; of equal scores those with smaller indices.

    `topk` chooses freely among equal values. Where the k-th is also the next one, the row is sorted in full.
    """
    if scores.size(1) <= k:
        return scores, indices
    values, places = scores.topk(k + 1, dim=1)
    places = places[:, :k]
    ambiguous = (values[:, k - 1] == values[:, k]).nonzero().squeeze(1)
    if len(ambiguous):
        places[ambiguous] = _order(scores[ambiguous], indices[ambiguous])[:, :k]
    return scores.gather(1, places), indices.gather(1, places)


def _order(scores: Tensor, indices: Tensor) -> Tensor:
    """What sorts each row: by falling scores, then by rising indices."""
    by_index = indices.argsort(dim=1)
    by_score = scores.gather(1, by_index).argsort(dim=1, descending=True, stable=True)
    return by_index.gather(1, by_score)


class RetrievalMetrics(TypedDict):
    """Means over the judged queries, each between 0 and 1."""

    ndcg_at_10: float
    """Discounted cumulative gain of the first 10 over that of the best possible order."""
    recall_at_10: float
    """Share of the relevant documents among the first 10."""
    recall_at_100: float
    """Share of the relevant documents among the first 100."""
    mrr_at_10: float
    """1 / rank of the first relevant document, 0 when it is not among the first 10."""


def score_run(
    ranked: Sequence[Sequence[int]] | np.ndarray | Tensor, relevant: Sequence[Mapping[int, int]]
) -> RetrievalMetrics:
    """Metrics of a run as trec_eval and BEIR compute them: linear gains, discount `1 / log2(1 + rank)`.

    A document is relevant when its judgement is above 0; that judgement is its gain. A query without any judgement
    is left out of the means; one whose judgements are all 0 counts with zeros.

    Args:
        ranked: document indices of each query, best first; [Q, k] or one list a query. Lists may differ in length
            (a lexical search finds fewer); k below 100 means that recall at 100 sees only k.
        relevant: judgements of each query, document index -> judgement.

    Raises:
        ValueError: the numbers of queries differ, no query is judged, or a document is ranked twice for a query.
    """
    if len(ranked) != len(relevant):
        raise ValueError(f"{len(ranked)} rankings but judgements for {len(relevant)} queries")
    discounts = 1 / np.log2(np.arange(2, 12))
    rows = []
    for query, (documents, judgements) in enumerate(zip(ranked, relevant, strict=True)):
        documents = [int(document) for document in documents[:100]]
        if len(set(documents)) < len(documents):
            raise ValueError(f"query {query}: a document is ranked twice within the first 100")
        if judgements:
            rows.append(_score_query(documents, judgements, discounts))
    if not rows:
        raise ValueError(f"none of the {len(relevant)} queries has a judged document")
    ndcg, recall_10, recall_100, reciprocal = np.mean(rows, axis=0).tolist()
    return RetrievalMetrics(ndcg_at_10=ndcg, recall_at_10=recall_10, recall_at_100=recall_100, mrr_at_10=reciprocal)


def _score_query(
    documents: list[int], judgements: Mapping[int, int], discounts: np.ndarray
) -> tuple[float, float, float, float]:
    """nDCG@10, recall@10, recall@100 and reciprocal rank of one query; `discounts` are those of ranks 1 to 10."""
    gains = np.maximum([judgements.get(document, 0) for document in documents], 0)
    ideal = np.sort([gain for gain in judgements.values() if gain > 0])[::-1]
    if len(ideal) == 0:
        return 0.0, 0.0, 0.0, 0.0
    top = gains[:10]
    dcg = float(top @ discounts[: len(top)])
    best = float(ideal[:10] @ discounts[: len(ideal)])
    hits = np.flatnonzero(top)
    return (
        dcg / best,
        len(hits) / len(ideal),
        int((gains > 0).sum()) / len(ideal),
        1 / (int(hits[0]) + 1) if len(hits) else 0.0,
    )


def relevance_of(beir: BeirSet) -> list[dict[int, int]]:
    """Judgements by position: one dict a query, in the order of `beir.queries`, document index -> judgement.

    Document indices are positions in `beir.corpus`. A judged document that the corpus lacks gets an index beyond it,
    so no ranking can hold it and it counts as missed. A query without judgements has an empty dict.

    Raises:
        ValueError: a judgement names a query that the set does not have.
    """
    positions = {document: index for index, document in enumerate(beir.corpus)}
    for query, judgements in beir.qrels.items():
        if query not in beir.queries:
            raise ValueError(f"the judgements name query {query!r}, which is not among {len(beir.queries)} queries")
        for document in judgements:
            positions.setdefault(document, len(positions))
    return [
        {positions[document]: judgement for document, judgement in beir.qrels.get(query, {}).items()}
        for query in beir.queries
    ]
