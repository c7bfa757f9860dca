"""Near-duplicate texts, found by MinHash signatures and locality-sensitive hashing (Broder 1997; Leskovec et al.,
Mining of Massive Datasets, chapter 3).

A text is the set of its word n-grams. The share of equal entries of two signatures estimates the Jaccard similarity of
their sets; texts are compared only when one band of their signatures is equal.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np

from nvembed_mcore.progress import show_each

BANDS, ROWS = 32, 4
"""At similarity 0.7 two texts share a band with probability 0.9998, at 0.3 with 0.23."""
_PERMUTATIONS = BANDS * ROWS
_CHUNK = 1 << 18  # shingles hashed at once: the arrays stay in the processor's cache

_PARTS = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+|[^\W\d_A-Za-z]+")


def word_parts(text: str) -> list[str]:
    """Words of a text in lower case; identifiers are cut at underscores and capitals (`XLMRoberta` gives `xlm`,
    `roberta`)."""
    return [part.lower() for part in _PARTS.findall(text)]


def first_of_kind(texts: Sequence[Sequence[str]], *, ngram: int, threshold: float) -> np.ndarray:
    """Bool array `[len(texts)]`: True for a text that is no near-duplicate of an earlier one that is True.

    Args:
        texts: each text as its words.
        ngram: words in a shingle.
        threshold: estimated Jaccard similarity (of sets of n-grams) from which two texts are near-duplicates.
    """
    signatures = _signatures(texts, ngram)
    bands = np.ascontiguousarray(signatures).view(np.dtype((np.void, ROWS * signatures.itemsize)))
    keep = np.zeros(len(texts), dtype=bool)
    buckets: dict[tuple[int, bytes], list[int]] = {}
    for index in show_each(range(len(texts)), "drop duplicates", "texts"):
        keys = [(band, key.tobytes()) for band, key in enumerate(bands[index])]
        rivals = sorted({rival for key in keys for rival in buckets.get(key, ())})
        if rivals and (signatures[rivals] == signatures[index]).mean(axis=1).max() >= threshold:
            continue
        keep[index] = True
        for key in keys:
            buckets.setdefault(key, []).append(index)
    return keep


def _signatures(texts: Sequence[Sequence[str]], ngram: int) -> np.ndarray:
    """MinHash signatures, uint32 `[len(texts), BANDS * ROWS]`."""
    rng = np.random.default_rng(0)
    factors = rng.integers(1, 1 << 63, _PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    offsets = rng.integers(0, 1 << 63, _PERMUTATIONS, dtype=np.uint64)
    signatures = np.empty((len(texts), _PERMUTATIONS), dtype=np.uint32)
    codes: dict[str, int] = {}
    start = 0
    while start < len(texts):
        words: list[int] = []
        firsts: list[int] = []
        stop = start
        while stop < len(texts) and (len(words) < _CHUNK or stop == start):
            firsts.append(len(words))
            for word in texts[stop] or ("",):
                code = codes.get(word)
                if code is None:  # not hash(): it differs from process to process
                    code = codes[word] = zlib.crc32(word.encode()) + 1
                words.append(code)
            words.extend([0] * (ngram - 1))  # a shingle starts at every word, and none reaches into the next text
            stop += 1
        shingles = _shingles(np.array(words, dtype=np.uint64), ngram)
        for column, (factor, offset) in enumerate(zip(factors, offsets, strict=True)):
            hashed = ((shingles * factor + offset) >> np.uint64(32)).astype(np.uint32)
            signatures[start:stop, column] = np.minimum.reduceat(hashed, firsts)
        start = stop
    return signatures


def _shingles(words: np.ndarray, ngram: int) -> np.ndarray:
    """Hash of the n-gram that starts at each word, uint64 `[len(words)]`."""
    padded = np.concatenate([words, np.zeros(ngram - 1, dtype=np.uint64)])
    hashed = np.zeros(len(words), dtype=np.uint64)
    for step in range(ngram):
        # FNV-like mixing; wraps modulo 2**64 by intent.
        hashed = (hashed ^ padded[step : step + len(words)]) * np.uint64(0x9E3779B97F4A7C15)
        hashed ^= hashed >> np.uint64(29)
    return hashed
