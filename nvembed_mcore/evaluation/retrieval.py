"""Exact search and the metrics of a ranking: pure numerics.

Letters: `Q` queries, `N` documents, `D` embedding size, `k` ranks that are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    scores, indices = search_numbered(queries, _numbered(blocks), k)
    if not scores.size(1):
        raise ValueError("there are no documents to search")
    return scores, indices


def _numbered(blocks: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    start = 0
    for block in blocks:
        yield block, torch.arange(start, start + len(block))
        start += len(block)


def search_numbered(queries: Tensor, blocks: Iterable[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """`search_blocks` among some of the documents, in any order, which say which ones they are.

    Args:
        queries: [Q, D].
        blocks: embeddings [n, D] and numbers int64 [n], each number once. There may be none.

    Returns:
        scores [Q, min(k, N)], falling, of equal ones the smaller number first; the numbers, same shape.

    Raises:
        ValueError: as `search`, but for the number of documents.
    """
    _check(queries, k)
    working = torch.float64 if queries.dtype == torch.float64 else torch.float32
    parts = queries.to(working).split(QUERY_BLOCK)
    empty = torch.empty(0, dtype=torch.int64, device=queries.device)
    best = [(part.new_empty(len(part), 0), empty.expand(len(part), 0)) for part in parts]
    for block, numbers in blocks:
        if block.dim() != 2 or block.size(1) != queries.size(1):
            raise ValueError(
                f"queries and documents must be [Q, D] and [N, D], got {list(queries.shape)} and {list(block.shape)}"
            )
        if len(block):
            block, numbers = block.to(queries.device, working), numbers.to(queries.device)
            best = [_improved(*found, part, block, numbers, k) for found, part in zip(best, parts, strict=True)]
    return best_of(*map(torch.cat, zip(*best, strict=True)), k)


def best_of(scores: Tensor, numbers: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` best of each row of found documents, ordered as `search` does. Both: [Q, n]."""
    scores, numbers = _best(scores, numbers, k)
    order = _order(scores, numbers)
    return scores.gather(1, order), numbers.gather(1, order)


def _check(queries: Tensor, k: int) -> None:
    if queries.dim() != 2:
        raise ValueError(f"queries must be [Q, D], got {list(queries.shape)}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    _check_finite(queries, "query", torch.arange(len(queries)))


def _check_finite(embeddings: Tensor, name: str, numbers: Tensor) -> None:
    bad = ~torch.isfinite(embeddings).all(dim=1)
    if bad.any():
        raise ValueError(f"{name} embedding {int(numbers[bad.int().argmax()])} is not finite")


def _improved(
    best_scores: Tensor, best_indices: Tensor, queries: Tensor, block: Tensor, numbers: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The best of what was found so far and of one more block of documents with these numbers."""
    products = queries @ block.T
    # A document that is not finite makes its scores so, and they make the sum so: the documents are read only then.
    if not torch.isfinite(products.sum()):
        _check_finite(block, "document", numbers)
    scores, indices = _best(products, numbers.expand(products.shape), k)
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


Ranked = Sequence[Sequence[int]] | np.ndarray | Tensor
"""Document indices of each query, best first: [Q, k] or one list a query, which may differ in length."""


def score_run(ranked: Ranked, relevant: Sequence[Mapping[int, int]]) -> RetrievalMetrics:
    """Metrics of a run as trec_eval and BEIR compute them: linear gains, discount `1 / log2(1 + rank)`.

    A document is relevant when its judgement is above 0; that judgement is its gain. What nobody judged is not
    relevant. A query without any judgement is left out of the means; one with nothing relevant counts with zeros.

    They are trec_eval's `ndcg_cut_10`, `recall_10` and `recall_100`, and its `recip_rank` of the first 10 documents
    (itself it has no such cut). Two things differ around them: trec_eval puts the documents in order itself, those of
    equal score by id from Z to A, where `search` ranks the smaller index first; and a query for which nothing was
    found counts as zero here, as with its option `-c`, where `pytrec_eval` leaves it out.

    Args:
        ranked: k below 100 means that recall at 100 sees only k (a lexical search finds fewer).
        relevant: judgements of each query, document index -> judgement.

    Raises:
        ValueError: the numbers of queries differ, no query is judged, or a document is ranked twice for a query.
    """
    return mean_metrics(score_queries(ranked, relevant))


def score_queries(ranked: Ranked, relevant: Sequence[Mapping[int, int]]) -> np.ndarray:
    """`score_run` before the mean: float64 [Q, 4] in the order of `RetrievalMetrics`; NaN where nothing is judged."""
    if len(ranked) != len(relevant):
        raise ValueError(f"{len(ranked)} rankings but judgements for {len(relevant)} queries")
    discounts = 1 / np.log2(np.arange(2, 12))
    rows = np.full((len(relevant), len(RetrievalMetrics.__annotations__)), np.nan)
    for query, (documents, judgements) in enumerate(zip(ranked, relevant, strict=True)):
        documents = [int(document) for document in documents[:100]]
        if len(set(documents)) < len(documents):
            raise ValueError(f"query {query}: a document is ranked twice within the first 100")
        if judgements:
            rows[query] = _score_query(documents, judgements, discounts)
    return rows


def mean_metrics(rows: np.ndarray) -> RetrievalMetrics:
    """Means over the judged queries of `score_queries`.

    Raises:
        ValueError: no query is judged.
    """
    judged = rows[~np.isnan(rows[:, 0])]
    if not len(judged):
        raise ValueError(f"none of the {len(rows)} queries has a judged document")
    ndcg, recall_10, recall_100, reciprocal = np.mean(judged, axis=0).tolist()
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
