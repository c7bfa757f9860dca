"""Our metrics are those of trec_eval (through `pytrec_eval`) and, where they differ, they differ as documented."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nvembed_mcore.config_eval import METRICS
from nvembed_mcore.evaluation.retrieval import RetrievalMetrics, mean_metrics, score_queries, score_run, search

pytrec_eval = pytest.importorskip("pytrec_eval")

QUERIES, DOCUMENTS = 60, 300


def name_of(document: int) -> str:
    """trec_eval orders equal scores by document id from Z to A, we by index from 0 on."""
    return f"d{DOCUMENTS - document:04d}"


def judgements(random: np.random.Generator) -> list[dict[int, int]]:
    """Graded, below zero too; some queries have nothing relevant. Most documents are judged by nobody."""
    found = []
    for query in range(QUERIES):
        chosen = random.permutation(DOCUMENTS)[: random.integers(1, 40)]
        highest = 1 if query % 7 == 0 else 4
        found.append({int(document): int(random.integers(-1, highest)) for document in chosen})
    return found


def trec_eval(scores: dict[str, dict[str, float]], relevant: list[dict[int, int]]) -> dict[str, np.ndarray]:
    """Each metric by query, float64 [Q, 4]; queries that it says nothing of have NaN."""
    qrels = {f"q{query}": {name_of(d): grade for d, grade in one.items()} for query, one in enumerate(relevant)}
    whole = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.10,100", "recip_rank"}).evaluate(scores)
    first_ten = {
        query: dict(sorted(one.items(), key=lambda pair: (pair[1], pair[0]), reverse=True)[:10])
        for query, one in scores.items()
    }
    ranks = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(first_ten)
    rows = np.full((len(relevant), len(METRICS)), math.nan)
    for query in whole:
        one = whole[query]
        rows[int(query[1:])] = [one["ndcg_cut_10"], one["recall_10"], one["recall_100"], ranks[query]["recip_rank"]]
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_random_graded_runs_with_ties(seed):
    """Embeddings of small whole numbers, so that a query has many documents of equal score."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(-2, 3, (QUERIES, 3), generator=generator).float()
    documents = torch.randint(-2, 3, (DOCUMENTS, 3), generator=generator).float()
    scores, ranked = search(queries, documents, 100)
    assert (scores[:, 1:] == scores[:, :-1]).float().mean() > 0.5
    relevant = judgements(np.random.default_rng(seed))
    run = {
        f"q{query}": {name_of(document): score for document, score in zip(*row, strict=True)}
        for query, row in enumerate(zip(ranked.tolist(), scores.tolist(), strict=True))
    }
    expected = trec_eval(run, relevant)
    np.testing.assert_allclose(score_queries(ranked, relevant), expected, rtol=0, atol=1e-12)
    assert score_run(ranked, relevant) == pytest.approx(dict(zip(METRICS, expected.mean(0), strict=True)), abs=1e-12)


def test_queries_that_a_run_leaves_out_count_as_zero():
    """As with trec_eval's option -c; `pytrec_eval` says nothing of them, nor do we of those that nobody judged."""
    relevant = judgements(np.random.default_rng(9))
    ranked = [[int(one) for one in np.random.default_rng(q).permutation(DOCUMENTS)[:100]] for q in range(QUERIES)]
    left_out, unjudged = {3, 8}, {5}
    run = {
        f"q{query}": {name_of(document): -float(rank) for rank, document in enumerate(documents)}
        for query, documents in enumerate(ranked)
        if query not in left_out
    }
    relevant = [{} if query in unjudged else one for query, one in enumerate(relevant)]
    ranked = [[] if query in left_out else documents for query, documents in enumerate(ranked)]
    expected, found = trec_eval(run, relevant), score_queries(ranked, relevant)
    assert np.isnan(expected).any(1).nonzero()[0].tolist() == [3, 5, 8]
    assert np.isnan(found).any(1).nonzero()[0].tolist() == [5]
    assert (found[[3, 8]] == 0).all()
    same = [query for query in range(QUERIES) if query not in left_out | unjudged]
    np.testing.assert_allclose(found[same], expected[same], rtol=0, atol=1e-12)
    means = np.nansum(expected, axis=0) / (QUERIES - len(unjudged))
    assert mean_metrics(found) == pytest.approx(dict(zip(METRICS, means, strict=True)), abs=1e-12)


def test_the_configuration_knows_the_metrics():
    assert METRICS == tuple(RetrievalMetrics.__annotations__)
