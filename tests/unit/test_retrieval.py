"""Search and metrics against loops written from the definitions, and numbers worked out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nvembed_mcore.evaluation import retrieval
from nvembed_mcore.evaluation.retrieval import relevance_of, score_run, search


def brute_force_search(queries, documents, k):
    ranked = []
    for query in queries.tolist():
        scores = [sum(x * y for x, y in zip(query, document, strict=True)) for document in documents.tolist()]
        ranked.append(sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:k])
    return ranked


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(retrieval, "QUERY_BLOCK", 3)
    monkeypatch.setattr(retrieval, "DOCUMENT_BLOCK", 7)


@pytest.mark.parametrize("k", [1, 5, 20, 31, 40])
def test_search_with_many_ties(small_blocks, k):
    # Small integers: products are exact in any order of summation, and most scores occur several times.
    generator = torch.Generator().manual_seed(k)
    queries = torch.randint(-2, 3, (10, 3), generator=generator).float()
    documents = torch.randint(-2, 3, (31, 3), generator=generator).float()
    scores, indices = search(queries, documents, k)
    assert scores.shape == indices.shape == (10, min(k, 31))
    assert indices.tolist() == brute_force_search(queries, documents, k)
    assert torch.equal(scores, (queries @ documents.T).gather(1, indices))


def test_search_without_ties(small_blocks):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    documents = torch.randn(50, 16, generator=generator, dtype=torch.float64)
    scores, indices = search(queries, documents, 12)
    assert scores.dtype == torch.float64
    assert indices.tolist() == brute_force_search(queries, documents, 12)


def test_search_of_equal_documents_is_in_order():
    scores, indices = search(torch.ones(2, 4), torch.ones(20_000, 4), 100)
    assert torch.equal(indices, torch.arange(100).expand(2, 100))
    assert torch.equal(scores, torch.full((2, 100), 4.0))


def test_low_precision_is_scored_in_float32():
    # 1 + 2^-10 is not a bfloat16 number: scores that are rounded to bfloat16 would tie, and document 0 would win.
    queries = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    documents = torch.tensor([[1.0, 0.0], [1.0, 2.0**-10]], dtype=torch.bfloat16)
    assert search(queries, documents, 2)[1].tolist() == [[1, 0]]


def test_no_queries():
    scores, indices = search(torch.empty(0, 4), torch.ones(3, 4), 2)
    assert scores.shape == indices.shape == (0, 2)


@pytest.mark.parametrize(
    ("queries", "documents", "k", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 5), 1, r"\[2, 3\] and \[4, 5\]"),
        (torch.ones(2, 3), torch.ones(0, 3), 1, "no documents"),
        (torch.ones(2, 3), torch.ones(4, 3), 0, "k must be at least 1, got 0"),
        (torch.ones(2, 3), torch.tensor([[0.0] * 3, [math.nan] * 3]), 1, "document embedding 1 is not finite"),
        (torch.tensor([[math.inf] * 3]), torch.ones(4, 3), 1, "query embedding 0 is not finite"),
    ],
)
def test_search_rejects(queries, documents, k, message):
    with pytest.raises(ValueError, match=message):
        search(queries, documents, k)


def brute_force_metrics(ranked, relevant):
    """Straight from the definitions of trec_eval's ndcg_cut and recall, and BEIR's mrr."""
    names = ("ndcg_at_10", "recall_at_10", "recall_at_100", "mrr_at_10")
    values = {name: [] for name in names}
    for documents, judgements in zip(ranked, relevant, strict=True):
        if not judgements:
            continue
        dcg = sum(
            max(judgements.get(document, 0), 0) / math.log2(rank + 1)
            for rank, document in enumerate(documents, 1)
            if rank <= 10
        )
        ideal = sorted((gain for gain in judgements.values() if gain > 0), reverse=True)
        best = sum(gain / math.log2(rank + 1) for rank, gain in enumerate(ideal, 1) if rank <= 10)
        values["ndcg_at_10"].append(dcg / best if best else 0.0)
        good = {document for document, gain in judgements.items() if gain > 0}
        for depth in (10, 100):
            found = len(good & set(documents[:depth]))
            values[f"recall_at_{depth}"].append(found / len(good) if good else 0.0)
        ranks = [rank for rank, document in enumerate(documents[:10], 1) if document in good]
        values["mrr_at_10"].append(1 / ranks[0] if ranks else 0.0)
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


@pytest.mark.parametrize("depth", [5, 60, 150])
def test_metrics_against_loops(depth):
    random = np.random.default_rng(depth)
    ranked = np.stack([random.permutation(200)[:depth] for _ in range(40)])
    relevant = [
        {int(document): int(random.integers(-1, 4)) for document in random.permutation(200)[: random.integers(0, 25)]}
        for _ in range(40)
    ]
    expected = brute_force_metrics(ranked.tolist(), relevant)
    assert score_run(ranked, relevant) == pytest.approx(expected, rel=1e-12)
    assert score_run(torch.from_numpy(ranked), relevant) == score_run(ranked.tolist(), relevant)


def test_metrics_by_hand():
    # Gains 0, 2, 0, 1 at ranks 1 to 4; a third relevant document (gain 3) stands at rank 12.
    ranked = [[9, 5, 8, 6, *range(100, 107), 7]]
    metrics = score_run(ranked, [{5: 2, 6: 1, 7: 3, 8: 0}])
    dcg = 2 / math.log2(3) + 1 / math.log2(5)
    assert metrics["ndcg_at_10"] == pytest.approx(dcg / (3 + 2 / math.log2(3) + 1 / 2))
    assert metrics["recall_at_10"] == pytest.approx(2 / 3)
    assert metrics["recall_at_100"] == 1.0
    assert metrics["mrr_at_10"] == 0.5


def test_rank_ten_counts_and_rank_eleven_does_not():
    tenth, eleventh = (score_run([[*range(100, 100 + rank), 1]], [{1: 1}]) for rank in (9, 10))
    assert tenth["ndcg_at_10"] == pytest.approx(1 / math.log2(11)) and tenth["mrr_at_10"] == pytest.approx(0.1)
    assert eleventh["ndcg_at_10"] == eleventh["mrr_at_10"] == eleventh["recall_at_10"] == 0.0
    assert eleventh["recall_at_100"] == 1.0


def test_queries_without_judgements_are_left_out_and_lists_may_be_short():
    metrics = score_run([[1], [], [3, 4]], [{1: 1}, {2: 1}, {}])
    assert metrics == {"ndcg_at_10": 0.5, "recall_at_10": 0.5, "recall_at_100": 0.5, "mrr_at_10": 0.5}


@pytest.mark.parametrize(
    ("ranked", "relevant", "message"),
    [
        ([[1]], [{1: 1}, {2: 1}], "1 rankings but judgements for 2"),
        ([[1], [2]], [{}, {}], "none of the 2 queries"),
        ([[1], [2, 3, 2]], [{1: 1}, {2: 1}], "query 1: a document is ranked twice"),
    ],
)
def test_metrics_reject(ranked, relevant, message):
    with pytest.raises(ValueError, match=message):
        score_run(ranked, relevant)


def beir(qrels):
    return SimpleNamespace(corpus={"d7": "a", "d3": "b", "d5": "c"}, queries={"q2": "x", "q1": "y"}, qrels=qrels)


def test_relevance_is_by_position():
    assert relevance_of(beir({"q1": {"d5": 2, "d7": 0}})) == [{}, {2: 2, 0: 0}]


def test_relevance_of_an_unknown_query():
    with pytest.raises(ValueError, match="'q9'"):
        relevance_of(beir({"q9": {"d7": 1}}))


def test_a_judged_document_that_the_corpus_lacks_counts_as_missed():
    relevance = relevance_of(beir({"q1": {"d3": 1, "d8": 1, "d9": 2}, "q2": {"d9": 1}}))
    assert relevance == [{4: 1}, {1: 1, 3: 1, 4: 2}]
    metrics = score_run([[0, 1, 2], [1, 0, 2]], relevance)
    assert metrics["recall_at_10"] == pytest.approx((0 + 1 / 3) / 2)
    assert metrics["mrr_at_10"] == 0.5
