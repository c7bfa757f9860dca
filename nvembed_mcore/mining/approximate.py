"""FAISS indexes, for corpora in which an exact search of every query takes too long.

The index names candidates; their scores are computed from the embeddings themselves, since what the index holds may be
compressed. Letters: `Q` queries, `N` documents, `D` embedding size, `k` candidates of each query.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nvembed_mcore.data.files import hash_of_file
from nvembed_mcore.mining.search import Candidates, Rows, Search
from nvembed_mcore.progress import show_each

if TYPE_CHECKING:
    import faiss

OVERSAMPLING = 4
"""Candidates that the index names for each one that is kept after scoring."""
PROBED_SHARE, FEWEST_PROBED = 16, 8
"""An inverted file looks into one of so many lists, and at least into so many lists."""
_TRAINING_BYTES = 2 << 30
_DIVISIBLE_WIDTH = 1024 * 3 * 5 * 7


def check_faiss(factory: str) -> None:
    """Refuse an index before anything is encoded, as far as that can be told without the embeddings' size.

    Raises:
        ValueError: FAISS is not installed, or does not know the kind of index.
    """
    if importlib.util.find_spec("faiss") is None:
        raise ValueError(f"--index {factory} needs FAISS: pip install 'nvembed_mcore[mine]', or use --index exact")
    import faiss

    try:
        faiss.index_factory(_DIVISIBLE_WIDTH, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"--index {factory}: FAISS knows no such index") from error


def _new_index(width: int, factory: str) -> faiss.Index:
    import faiss

    try:
        return faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"--index {factory}: FAISS makes no such index for {width} dimensions") from error


def build_index(shards: Sequence[np.ndarray], factory: str, path: Path, *, seed: int = 0) -> None:
    """Train an index on a sample of the documents, add all of them shard by shard, and write it to `path`.

    Args:
        shards: float32 arrays [n, D].
        factory: FAISS's description of an index, for example `IVF1024,PQ64`.
        path: becomes visible when it is complete.
        seed: chooses the sample, up to 2 GiB of embeddings.

    Raises:
        ValueError: FAISS makes no such index for D dimensions, or needs more documents to train it.
    """
    import faiss

    width, total = shards[0].shape[1], sum(map(len, shards))
    index = _new_index(width, factory)
    if not index.is_trained:
        count = min(total, _TRAINING_BYTES // (4 * width))
        sample = np.sort(np.random.default_rng(seed).choice(total, count, replace=False))
        try:
            index.train(Rows(shards)[sample])
        except RuntimeError as error:
            raise ValueError(f"--index {factory} cannot be trained on {count} documents") from error
    for shard in show_each(shards, "build the index", "shards"):
        index.add(np.ascontiguousarray(shard, dtype=np.float32))
    aside = path.with_name(f".{path.name}.partial")
    faiss.write_index(index, str(aside))
    _sum_file(path).write_text(hash_of_file(aside), encoding="ascii")
    os.replace(aside, path)


def _sum_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _check_sum(path: Path) -> None:
    """FAISS's reader takes sizes and offsets from the file as they are, so it gets only what `build_index` wrote.

    Raises:
        ValueError: the file is another one, or nothing says which it was.
    """
    sums = _sum_file(path)
    wanted = sums.read_text(encoding="ascii", errors="replace") if sums.is_file() else "no file"
    found = hash_of_file(path)
    if found != wanted:
        raise ValueError(
            f"{path} is not the index that was written: its SHA-256 is {found}, {sums.name} says {wanted}; remove it, "
            f"and it is made again"
        )


def approximate_search(path: Path, shards: Sequence[np.ndarray]) -> Search:
    """A search through the index at `path`; `shards` are the documents that it was built from.

    Raises:
        ValueError: the file is damaged, or holds an index of other documents.
    """
    import faiss

    rows = Rows(shards)
    _check_sum(path)
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is no index that FAISS can read; remove it, and it is made again") from error
    has, wanted = (index.ntotal, index.d), (sum(map(len, shards)), shards[0].shape[1])
    if has != wanted:
        raise ValueError(
            f"{path} is an index of {has[0]} documents in {has[1]} dimensions, there are {wanted[0]} in {wanted[1]}; "
            f"remove it, and it is made again"
        )
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        inverted.nprobe = min(inverted.nlist, max(FEWEST_PROBED, inverted.nlist // PROBED_SHARE))

    def search(queries: np.ndarray, k: int) -> Candidates:
        count = min(k * OVERSAMPLING, index.ntotal)
        if isinstance(index, faiss.IndexHNSW):
            index.hnsw.efSearch = count
        _, named = index.search(np.ascontiguousarray(queries, dtype=np.float32), count)
        found = Candidates(
            np.full((len(queries), k), -np.inf, dtype=np.float32), np.full((len(queries), k), -1, dtype=np.int64)
        )
        for row, (query, documents) in enumerate(zip(queries, named, strict=True)):
            documents = np.sort(documents[documents >= 0])
            scores = rows[documents] @ query
            best = np.argsort(-scores, kind="stable")[:k]
            found.scores[row, : len(best)], found.documents[row, : len(best)] = scores[best], documents[best]
        return found

    return search
