"""FAISS indexes against the exact search."""

from __future__ import annotations

import numpy as np
import pytest

from nvembed_mcore.mining.approximate import approximate_search, build_index
from nvembed_mcore.mining.search import exact_search


def clustered(count: int, seed: int, clusters: int = 20, width: int = 32) -> np.ndarray:
    """Unit vectors around centres that are the same for every seed, as texts of a few topics are."""
    draw = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((clusters, width))
    rows = centres[draw.integers(0, clusters, count)] + 0.5 * draw.standard_normal((count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def searched(tmp_path, shards, factory, queries, k):
    build_index(shards, factory, tmp_path / "index")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "index.sha256"]
    return approximate_search(tmp_path / "index", shards)(queries, k)


def test_a_flat_index_is_the_exact_search(tmp_path):
    draw = np.random.default_rng(0)
    queries, documents = (draw.integers(-2, 3, (count, 4)).astype(np.float32) for count in (8, 300))
    shards = np.split(documents, [100, 100, 290])
    # All documents are candidates, so that ties at the end are chosen by ours and not by FAISS.
    found, exact = searched(tmp_path, shards, "Flat", queries, 75), exact_search(shards)(queries, 75)
    assert np.array_equal(found.documents, exact.documents) and np.array_equal(found.scores, exact.scores)


@pytest.mark.parametrize(
    ("factory", "least"), [("IVF64,Flat", 0.95), ("IVF64,SQ8", 0.95), ("IVF64,PQ8x4", 0.5), ("HNSW16", 0.95)]
)
def test_most_of_the_best_documents_are_found(tmp_path, factory, least):
    queries, documents = clustered(40, 0), clustered(5000, 1)
    shards = np.split(documents, [2000, 3500])
    found, exact = searched(tmp_path, shards, factory, queries, 20), exact_search(shards)(queries, 20)
    shared = [
        len(set(a) & set(b)) / 20 for a, b in zip(found.documents.tolist(), exact.documents.tolist(), strict=True)
    ]
    assert np.mean(shared) >= least
    # Whatever is compressed in the index, scores are those of the embeddings.
    assert found.scores == pytest.approx(np.einsum("qd,qkd->qk", queries, documents[found.documents]), abs=1e-6)
    assert (np.diff(found.scores) <= 0).all()


def test_an_index_that_finds_too_few_leaves_the_rest_empty(tmp_path):
    documents = clustered(400, 1)
    found = searched(tmp_path, [documents], "IVF200,Flat", clustered(5, 0), 390)
    assert ((found.documents >= 0).sum(axis=1) < 390).all()
    assert (np.isneginf(found.scores) == (found.documents < 0)).all()
