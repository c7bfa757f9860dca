"""The lexical baseline: BM25 (library bm25s) and the fusion of rankings."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

import bm25s
import numpy as np

_K1, _B = 1.5, 0.75
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
    index, vocabulary = _bm25_index(corpus, tokenize)
    rankings = []
    for query in queries:
        known = [vocabulary[word] for word in tokenize(query) if word in vocabulary]
        scores = index.get_scores_from_ids(known)
        found = np.flatnonzero(scores > 0)
        order = np.argsort(-scores[found], kind="stable")
        rankings.append(found[order[:k]])
    return rankings


def _bm25_index(corpus: Sequence[str], tokenize: Callable[[str], list[str]]) -> tuple[bm25s.BM25, dict[str, int]]:
    """The index of some texts, and the number of each word."""
    vocabulary: dict[str, int] = {}
    ids = [[vocabulary.setdefault(word, len(vocabulary)) for word in tokenize(text)] for text in corpus]
    if not vocabulary:
        raise ValueError(f"none of the {len(corpus)} documents has a word")
    index = bm25s.BM25(k1=_K1, b=_B, method="lucene", backend="numpy")
    index.index((ids, vocabulary), create_empty_token=False, show_progress=False)
    return index, vocabulary


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


class MostSimilar:
    """Finds the most similar of some texts by BM25, on a scale from 0 to 1.

    The similarity of a text `t` to a text `e` of the index is `score(t, e) / max(score(t, t), score(e, e))`. A score
    is BM25 as in `bm25_rank`, of the distinct words of the first text in the second as the document; inverse document
    frequencies and the mean length are those of the index, also where `t` is the document. It is 1 for the same words,
    and it falls when either text has words that the other lacks, so a short text inside a long one is not similar.

    Args:
        corpus: the texts of the index.
        tokenize: text -> words.

    Raises:
        ValueError: no text of the corpus has a word.
    """

    def __init__(self, corpus: Sequence[str], *, tokenize: Callable[[str], list[str]] = plain_words) -> None:
        self._tokenize = tokenize
        self._index, self._vocabulary = _bm25_index(corpus, tokenize)
        self._count = len(corpus)
        scores = self._index.scores
        self._mean_length = sum(len(tokenize(text)) for text in corpus) / self._count
        self._holders = np.diff(scores["indptr"])
        # An entry of the index is what one word gives one document: their sum is the document's score for itself.
        self._own = np.bincount(scores["indices"], weights=scores["data"], minlength=self._count)

    def best(self, text: str) -> tuple[int, float]:
        """Index of the most similar text and its similarity; (-1, 0.0) where no text shares a word."""
        counts = Counter(self._tokenize(text))
        known = [self._vocabulary[word] for word in counts if word in self._vocabulary]
        if not known:
            return -1, 0.0
        similarity = self._index.get_scores_from_ids(known) / np.maximum(self._own, self._score_for_itself(counts))
        found = int(similarity.argmax())
        return found, min(float(similarity[found]), 1.0)

    def _score_for_itself(self, counts: Counter[str]) -> float:
        norm = _K1 * (1 - _B + _B * counts.total() / self._mean_length)
        score = 0.0
        for word, count in counts.items():
            holders = int(self._holders[self._vocabulary[word]]) if word in self._vocabulary else 0
            inverse_frequency = math.log(1 + (self._count - holders + 0.5) / (holders + 0.5))
            score += inverse_frequency * count / (count + norm)
        return score
