"""BM25 against its formula, tokenisation of code, and fusion by hand."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest

from nvembed_mcore.evaluation.lexical import bm25_rank, code_words, plain_words, reciprocal_rank_fusion


@pytest.mark.parametrize(
    ("text", "plain", "code"),
    [
        ("Load a file.", ["load", "a", "file"], ["load", "a", "file"]),
        ("np.load_File2()", ["np", "load_file2"], ["np", "load_file2", "load", "file", "2"]),
        ("readHTTPHeader", ["readhttpheader"], ["readhttpheader", "read", "http", "header"]),
        ("__init__", ["__init__"], ["__init__"]),
        ("SGD x1", ["sgd", "x1"], ["sgd", "x1", "x", "1"]),
        ("naïve_größe 文字", ["naïve_größe", "文字"], None),
        ("", [], []),
    ],
)
def test_words(text, plain, code):
    assert plain_words(text) == plain
    if code is not None:
        assert code_words(text) == code


def brute_force_bm25(corpus, query, k):
    """Lucene's BM25 with k1 = 1.5, b = 0.75, one document and one word after the other."""
    documents = [code_words(text) for text in corpus]
    mean_length = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in code_words(query):
            containing = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - containing + 0.5) / (containing + 0.5))
            count = document.count(word)
            score += idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean_length))
        scores.append(score)
    ranked = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    return [index for index in ranked if scores[index] > 0][:k]


def test_bm25_against_its_formula():
    random = np.random.default_rng(0)
    words = np.array([f"word{chr(97 + number)}" for number in range(20)])
    frequent = 1 / np.arange(1, 21)
    corpus = [" ".join(random.choice(words, random.integers(1, 30), p=frequent / frequent.sum())) for _ in range(60)]
    queries = [" ".join(random.choice(words, 3)) for _ in range(25)]
    ranked = bm25_rank(corpus, queries, 10)
    assert [row.tolist() for row in ranked] == [brute_force_bm25(corpus, query, 10) for query in queries]


def test_equal_documents_stay_in_order_and_others_are_left_out():
    corpus = ["cat", "dog", "cat", "bird", "cat"]
    assert [row.tolist() for row in bm25_rank(corpus, ["cat", "fish", "", "bird dog"], 2)] == [
        [0, 2],
        [],
        [],
        [1, 3],
    ]


def test_parts_of_identifiers_find_what_plain_words_do_not():
    corpus = ["def read_config(path): ...", "def unrelated(): ..."]
    assert bm25_rank(corpus, ["read the config"], 5)[0].tolist() == [0]
    assert bm25_rank(corpus, ["read the config"], 5, tokenize=plain_words)[0].tolist() == []


def test_empty_documents_are_allowed():
    assert bm25_rank(["", "cat", "..."], ["cat"], 3)[0].tolist() == [1]


@pytest.mark.parametrize(
    ("corpus", "k", "message"), [(["cat"], 0, "got 0"), ([], 1, "none of the 0 documents"), (["", "!"], 1, "none of")]
)
def test_bm25_rejects(corpus, k, message):
    with pytest.raises(ValueError, match=message):
        bm25_rank(corpus, ["cat"], k)


def test_ranking_is_the_same_in_every_process_and_nothing_is_printed():
    program = (
        "from nvembed_mcore.evaluation.lexical import bm25_rank\n"
        "import random; random.seed(1)\n"
        "texts = [' '.join(random.choices('abcdefghijklmnop', k=12)) for _ in range(80)]\n"
        "print([row.tolist() for row in bm25_rank(texts, texts[:9], 80)])\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout and runs[0].stdout.count("\n") == 1
    assert runs[0].stderr == runs[1].stderr == ""


def test_fusion_by_hand():
    lexical = [[4, 7, 1], []]
    model = np.array([[7, 2, 4], [3, 5, 6]])
    fused = reciprocal_rank_fusion([lexical, model])
    # 7: 1/62 + 1/61; 4: 1/61 + 1/63; 2: 1/62; 1: 1/63
    assert [row.tolist() for row in fused] == [[7, 4, 2, 1], [3, 5, 6]]


def test_fusion_ties_by_index_and_constant():
    assert reciprocal_rank_fusion([[[9, 3]], [[3, 9]]])[0].tolist() == [3, 9]
    # With k = 0 one first place (1) beats two third places (2/3); with k = 60 it does not (1/61 against 2/63).
    runs = [[[1, 5, 8]], [[2, 6, 8]]]
    assert reciprocal_rank_fusion(runs, k=0)[0].tolist()[:3] == [1, 2, 8]
    assert reciprocal_rank_fusion(runs)[0].tolist()[:3] == [8, 1, 2]


@pytest.mark.parametrize("rankings", [[], [[[1]], [[1], [2]]]])
def test_fusion_rejects(rankings):
    with pytest.raises(ValueError, match="same queries"):
        reciprocal_rank_fusion(rankings)
