"""Sets of pairs (STS, NLI, sentence-transformers' layouts) become records."""

import gzip
import json
import math
from collections import Counter

import pytest

from nvembed_mcore.data.convert import convert
from tests.unit.test_convert_tasks import converted, jsonl


def triples(rows):
    return [(row["query"], row["pos"], row["neg"]) for row in rows]


def pair(first, second, score):
    return {"sentence1": first, "sentence2": second, "score": score}


def test_sts_pairs_in_both_directions(tmp_path):
    source = [
        pair("a cat sleeps", "a cat is asleep", 4.8),
        pair("a dog runs", "a dog is running", "4"),
        pair("a dog runs", "a cat sleeps", 3.99),
        pair("a dog runs", "the dog ran", 4.5),
        pair("same", "same", 5),
        pair(" ", "x", 5),
    ]
    counts, rows = converted(tmp_path, "sts", source, negatives=0)
    assert triples(rows) == [
        ("a cat sleeps", ["a cat is asleep"], []),
        ("a cat is asleep", ["a cat sleeps"], []),
        ("a dog runs", ["a dog is running"], []),
        ("a dog runs", ["the dog ran"], []),
        ("a dog is running", ["a dog runs"], []),
        ("the dog ran", ["a dog runs"], []),
    ]
    assert counts.left_out == {
        "the score is below 4": 1,
        "no positive besides blank texts and the query itself": 1,
        "a text of the pair is blank": 1,
    }
    assert counts.without_negatives == 6


def test_sts_scale(tmp_path):
    source = [pair("a", "b", 0.8), pair("c", "d", 0.79)]
    _, rows = converted(tmp_path, "sts", source, scale=(0, 1), negatives=0)
    assert triples(rows) == [("a", ["b"], []), ("b", ["a"], [])]


def test_sts_positives_below_the_related_score_are_no_negatives(tmp_path):
    source = [pair("a b c", "a b d", 1.5), pair("a b c", "a b e", 1.6), pair("a b f", "a b g", 0)]
    _, rows = converted(tmp_path, "sts", source, min_score=1)
    assert rows and all("a b e" not in row["neg"] and "a b d" not in row["neg"] for row in rows[:2])
    assert [row["query"] for row in rows[:2]] == ["a b c", "a b c"]


def plain_bm25(texts, query, k1=1.5, b=0.75):
    """BM25 as Lucene has it, of every text for one query, word by word."""
    words = [text.lower().split() for text in texts]
    mean = sum(map(len, words)) / len(words)
    scores = []
    for document in words:
        score = 0.0
        for word in query.lower().split():
            holders = sum(word in other for other in words)
            count = Counter(document)[word]
            idf = math.log(1 + (len(words) - holders + 0.5) / (holders + 0.5))
            score += idf * count / (count + k1 * (1 - b + b * len(document) / mean)) if count else 0.0
        scores.append(score)
    return scores


def test_sts_negatives_are_of_rank_two_and_below(tmp_path):
    source = [
        pair("red apples taste sweet", "sweet red apples", 5),
        pair("red apples taste sweet", "green apples taste sour", 2.6),
        pair("red apples taste sweet", "red cars look sweet", 2.5),
        pair("apples are red fruits", "people eat apples", 1),
        pair("sour milk", "a red flag", 0),
        pair("taste is red", "unrelated words here", 0),
    ]
    _, rows = converted(tmp_path, "sts", source, negatives=3)
    texts = list(dict.fromkeys(text for row in source for text in (row["sentence1"], row["sentence2"])))
    assert [row["query"] for row in rows] == ["red apples taste sweet", "sweet red apples"]
    related = [{"sweet red apples", "green apples taste sour"}, {"red apples taste sweet"}]
    for row, excluded in zip(rows, related, strict=True):
        scores = dict(zip(texts, plain_bm25(texts, row["query"]), strict=True))
        ranked = [
            text for text in sorted(texts, key=lambda text: -scores[text]) if scores[text] and text != row["query"]
        ]
        assert row["neg"] == [text for text in ranked[1:] if text not in excluded][:3]
        assert len(row["neg"]) == 3
    assert "red cars look sweet" in rows[0]["neg"]


def nli(premise, hypothesis, label):
    return {"premise": premise, "hypothesis": hypothesis, "label": label}


NLI = [
    nli("A man sings.", "A person sings.", 0),
    nli("A man sings.", "Someone makes music.", "entailment"),
    nli("A man sings.", "A man sleeps.", 2),
    nli("A man sings.", "A man sings well.", "1"),
    nli("Dogs run.", "Cats run.", "contradiction"),
    nli("Two men talk.", "They speak.", "0"),
    nli("A man sings.", "He is on a stage.", 0),
    nli("A man sings.", "He is on a stage.", 2),
    nli("A man sings.", "No label.", -1),
    nli("A man sings.", "", 0),
]


def test_nli_groups_by_premise(tmp_path):
    counts, rows = converted(tmp_path, "nli", NLI)
    assert triples(rows) == [
        ("A man sings.", ["A person sings.", "Someone makes music."], ["A man sleeps."]),
        ("Two men talk.", ["They speak."], []),
    ]
    assert counts.left_out == {
        "neutral": 1,
        "annotators did not agree on a label": 1,
        "a text of the pair is blank": 1,
        "a premise that entails nothing": 1,
    }
    assert counts.notes == {"hypotheses labelled both ways, left out": 1} and counts.rows == 10


def test_nli_in_both_directions(tmp_path):
    _, rows = converted(tmp_path, "nli", NLI[:3] + [nli("A boy sleeps.", "A person sings.", 2)], both_directions=True)
    assert triples(rows) == [
        ("A man sings.", ["A person sings.", "Someone makes music."], ["A man sleeps."]),
        ("A person sings.", ["A man sings."], ["A boy sleeps."]),
        ("Someone makes music.", ["A man sings."], []),
    ]


LINES = [
    ["how to cook rice", "Boil it."],
    ["anchor", "positive", "negative", "another"],
    {"query": "q", "pos": ["p1", "p2"], "neg": ["n"]},
    {"query": "q2", "pos": "p3"},
    {"set": ["one", "uno", "eins", "one"]},
    {"set": ["alone"]},
    {"tags": ["rice"], "texts": ["title", "answer", "bad answer"]},
]


@pytest.mark.parametrize("is_packed", [False, True])
def test_pairs(tmp_path, is_packed):
    source, output = jsonl(tmp_path / "a.jsonl", LINES), tmp_path / "out.jsonl"
    if is_packed:
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(source.read_bytes()))
        source = tmp_path / "a.jsonl.gz"
    counts = convert("pairs", [source], output, negatives=1)
    assert triples(json.loads(line) for line in output.read_text().splitlines()) == [
        ("how to cook rice", ["Boil it."], []),
        ("anchor", ["positive"], ["negative"]),
        ("q", ["p1", "p2"], ["n"]),
        ("q2", ["p3"], []),
        ("one", ["uno", "eins"], []),
        ("title", ["answer"], ["bad answer"]),
    ]
    assert counts.left_out == {"no positive besides blank texts and the query itself": 1}
    assert counts.notes == {"positives left out: blank, a repetition, the query or a positive": 1}
