"""The lexical baseline: BM25 (library bm25s) and the fusion of rankings."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import bm25s
import numpy as np

_WORD = re.compile(r"\w+")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_A-Za-z]+")


def plain_words(text: str) -> list[str]:
    """Maximal runs of letters, digits and underscores, in lower case: `np.load_File2()` -> np, load_file2."""
    return _WORD.findall(text.lower())


def code_words(text: str) -> list[str]:
    """Words and, of identifiers, their parts too, in lower case: `loadFile_2` -> loadfile_2, load, file, 2.

    Identifiers are split at underscores, at changes of case and before digits. A query in prose then meets the
    words inside of names, and a name that is spelled out still meets itself.
    """
    words = []
    for word in _WORD.findall(text):
        parts = _PART.findall(word)
        words.append(word.lower())
        if len(parts) > 1:
            words.extend(part.lower() for part in parts)
    return words


def bm25_rank(
    corpus: Sequence[str], queries: Sequence[str], k: int, *, tokenize: Callable[[str], list[str]] = code_words
) -> list[np.ndarray]:
    """Document indices of the `k` best documents for each query by BM25, best first.

    BM25 as Lucene has it (k1 = 1.5, b = 0.75), without stop words and without a stemmer. Equal scores are ordered by
    index. Documents that share no word with the query are not in the ranking, so it may be shorter than `k`.

    Args:
        corpus: texts of the documents; their positions are their indices.
        queries: texts.
        k: longest ranking.
        tokenize: text -> words, for documents and queries alike.

    Returns:
        One int64 array of at most `k` indices a query.

    Raises:
        ValueError: `k` is below 1, or no document has a word.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    vocabulary: dict[str, int] = {}
    ids = [[vocabulary.setdefault(word, len(vocabulary)) for word in tokenize(text)] for text in corpus]
    if not vocabulary:
        raise ValueError(f"none of the {len(corpus)} documents has a word")
    index = bm25s.BM25(k1=1.5, b=0.75, method="lucene", backend="numpy")
    index.index((ids, vocabulary), create_empty_token=False, show_progress=False)
    rankings = []
    for query in queries:
        known = [vocabulary[word] for word in tokenize(query) if word in vocabulary]
        scores = index.get_scores_from_ids(known)
        found = np.flatnonzero(scores > 0)
        order = np.argsort(-scores[found], kind="stable")
        rankings.append(found[order[:k]])
    return rankings


def reciprocal_rank_fusion(rankings: Sequence[Sequence[Sequence[int] | np.ndarray]], k: int = 60) -> list[np.ndarray]:
    """One ranking for each query out of several: documents by falling `sum of 1 / (k + rank)`, ranks from 1.

    Cormack, Clarke and Buettcher 2009, whose constant is 60. Equal sums are ordered by document index.

    Args:
        rankings: one run each, for example of BM25 and of a model: `rankings[run][query]` are document indices.
        k: the constant; a larger one levels the weight of the first ranks.

    Returns:
        One int64 array a query with every document of its rankings.

    Raises:
        ValueError: there is no ranking, or they have different numbers of queries.
    """
    if not rankings or len({len(run) for run in rankings}) > 1:
        raise ValueError(f"rankings must have the same queries, got {[len(run) for run in rankings]} queries")
    fused = []
    for lists in zip(*rankings, strict=True):
        scores: dict[int, float] = {}
        for documents in lists:
            for rank, document in enumerate(documents, 1):
                scores[int(document)] = scores.get(int(document), 0.0) + 1 / (k + rank)
        fused.append(np.array(sorted(scores, key=lambda document: (-scores[document], document)), dtype=np.int64))
    return fused
