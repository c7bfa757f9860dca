"""Streaming search against sorting all scores, on numbers whose products are exact, so that many scores are equal."""

from __future__ import annotations

import numpy as np
import pytest

from nvembed_mcore.evaluation import retrieval
from nvembed_mcore.mining import search as room
from nvembed_mcore.mining.search import Candidates, Rows, document_blocks, exact_search, search_until_enough


def whole_numbers(count: int, width: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-2, 3, (count, width)).astype(np.float32)


def by_sorting(queries: np.ndarray, documents: np.ndarray, k: int) -> tuple[list, list]:
    scores, indices = [], []
    for query in queries:
        products = [float(sum(x * y for x, y in zip(query, document, strict=True))) for document in documents]
        best = sorted(range(len(documents)), key=lambda index: (-products[index], index))[:k]
        indices.append(best)
        scores.append([products[index] for index in best])
    return scores, indices


def cut(documents: np.ndarray, *sizes: int) -> list[np.ndarray]:
    return np.split(documents, np.cumsum(sizes)[:-1])


@pytest.mark.parametrize("sizes", [(50,), (7, 7, 7, 7, 7, 7, 8), (1, 30, 0, 19), (49, 1)])
@pytest.mark.parametrize("k", [1, 12, 50, 60])
def test_any_shards_give_what_sorting_gives(monkeypatch, sizes, k):
    monkeypatch.setattr(room, "DOCUMENT_BLOCK", 9)
    monkeypatch.setattr(retrieval, "QUERY_BLOCK", 4)
    queries, documents = whole_numbers(11, 3, 0), whole_numbers(50, 3, 1)
    found = exact_search(cut(documents, *sizes))(queries, k)
    scores, indices = by_sorting(queries, documents, k)
    assert found.documents.tolist() == indices and found.scores.tolist() == scores
    assert found.scores.dtype == np.float32 and found.documents.dtype == np.int64


def test_the_bits_of_scores_do_not_depend_on_the_shards():
    draw = np.random.default_rng(0)
    queries, documents = (draw.standard_normal((count, 96)).astype(np.float32) for count in (70, 20_000))
    whole = exact_search([documents])(queries, 30)
    for sizes in ((9000, 2000, 9000), (1, 19_999)):
        parts = exact_search(cut(documents, *sizes))(queries, 30)
        assert np.array_equal(parts.scores, whole.scores) and np.array_equal(parts.documents, whole.documents)


def test_blocks_are_filled_across_shards(monkeypatch):
    monkeypatch.setattr(room, "DOCUMENT_BLOCK", 4)
    documents = whole_numbers(10, 3, 0)
    blocks = [block.clone().numpy() for block in document_blocks(cut(documents, 3, 0, 6, 1))]
    assert [len(block) for block in blocks] == [4, 4, 2]
    assert np.array_equal(np.concatenate(blocks), documents)


class Counting:
    """A search that remembers what it was asked."""

    def __init__(self, documents: np.ndarray) -> None:
        self.search = exact_search([documents])
        self.asked: list[tuple[int, int]] = []

    def __call__(self, queries: np.ndarray, k: int) -> Candidates:
        self.asked.append((len(queries), k))
        return self.search(queries, k)


def test_only_queries_that_lack_candidates_are_asked_again(monkeypatch):
    monkeypatch.setattr(room, "FIRST_CANDIDATES", 3)
    queries, documents = whole_numbers(6, 3, 0), whole_numbers(200, 3, 1)
    wanted = np.array([1, 3, 4, 40, 200, 13])
    search = Counting(documents)
    lacking = lambda found, rows: (found.documents >= 0).sum(axis=1) < wanted[rows]  # noqa: E731
    found = search_until_enough(search, queries, lacking, depth=100, num_documents=200)
    assert search.asked == [(6, 3), (4, 12), (3, 48), (1, 100)]
    scores, indices = by_sorting(queries, documents, 100)
    for row, count in enumerate((3, 3, 12, 48, 100, 48)):
        assert found.documents[row].tolist() == indices[row][:count] + [-1] * (100 - count)
        assert found.scores[row].tolist() == scores[row][:count] + [-np.inf] * (100 - count)


def test_no_query_gets_more_than_there_are(monkeypatch):
    search = Counting(whole_numbers(20, 3, 1))
    everyone = lambda found, rows: np.ones(len(rows), dtype=bool)  # noqa: E731
    found = search_until_enough(search, whole_numbers(2, 3, 0), everyone, depth=1000, num_documents=20)
    assert found.documents.shape == (2, 20) and search.asked == [(2, 20)]


def test_a_document_that_is_not_finite_is_named():
    documents = whole_numbers(9000, 3, 0)
    documents[8500, 1] = np.nan
    with pytest.raises(ValueError, match="^document embedding 8500 is not finite$"):
        exact_search(cut(documents, 4000, 5000))(whole_numbers(2, 3, 1), 5)


def test_rows_of_shards():
    whole = np.arange(40, dtype=np.float32).reshape(20, 2)
    rows = Rows(cut(whole, 3, 0, 14, 3))
    for numbers in ([], [0], [17, 2, 3, 16, 2, 19, 4], list(range(20))):
        assert np.array_equal(rows[np.array(numbers, dtype=np.int64)], whole[numbers].reshape(-1, 2))
