"""Training texts that are evaluation texts are found and dropped, and others stay."""

import json
import math
import random
from collections import Counter

import numpy as np
import pytest

from nvembed_mcore.cli import main
from nvembed_mcore.data.decontaminate import decontaminate, dropped_path, words_of
from nvembed_mcore.data.records import read_records
from nvembed_mcore.evaluation.lexical import MostSimilar
from tests.unit.test_convert_tasks import jsonl

WORDS = [
    a + b for a in ("ba", "ko", "ru", "mi", "te", "so", "la", "ne") for b in ("da", "lu", "fi", "to", "gar", "min")
]


def sentences(count, seed):
    """Different random sentences of 8 to 15 words; common words are as common as in a language."""
    rng = random.Random(seed)
    weights = [1 / rank for rank in range(1, len(WORDS) + 1)]
    made = [" ".join(rng.choices(WORDS, weights, k=rng.randint(8, 15))) for _ in range(count)]
    assert len(set(made)) == count
    return made


def record(query, pos=("some other text",), neg=()):
    return {"query": query, "pos": list(pos), "neg": list(neg)}


def run(tmp_path, records, texts, **options):
    """Counts, queries that stay, and rows about what went."""
    evaluation = jsonl(tmp_path / "test.jsonl", [{"text": text, "label": 0} for text in texts])
    output = tmp_path / "out.jsonl"
    counts = decontaminate(jsonl(tmp_path / "in.jsonl", records), output, against=[evaluation], **options)
    gone = [json.loads(line) for line in dropped_path(output).read_text().splitlines()]
    return counts, list(read_records(output)), gone


def plain_similarity(corpus, text, k1=1.5, b=0.75):
    """The definition, word by word, of `text` and every text of `corpus`."""
    documents = [document.split() for document in corpus]
    mean = sum(map(len, documents)) / len(documents)

    def score(words, document):
        total = 0.0
        for word in set(words) & set(document):
            holders = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - holders + 0.5) / (holders + 0.5))
            count = Counter(document)[word]
            total += idf * count / (count + k1 * (1 - b + b * len(document) / mean))
        return total

    words = text.split()
    own = score(words, words)
    return np.array([score(words, other) / max(own, score(other, other)) for other in documents])


def test_similarity_is_that_of_an_independent_bm25():
    corpus = sentences(40, 0)
    index = MostSimilar(corpus)
    for text in [
        *sentences(20, 1),
        corpus[3],
        corpus[5] + " unknown words",
        "bada bada bada",
        f"{corpus[7]} {corpus[8]}",
    ]:
        expected = plain_similarity(corpus, text)
        found, score = index.best(text)
        assert found == expected.argmax() and score == pytest.approx(expected.max(), abs=1e-6) and 0 <= score <= 1
    assert index.best(corpus[3]) == (3, pytest.approx(1, abs=1e-6))
    assert index.best("nothing known") == (-1, 0.0)
    with pytest.raises(ValueError, match="none of the 1 documents has a word"):
        MostSimilar(["..."])


def test_planted_copies_are_found_and_others_stay(tmp_path):
    texts = sentences(100, 2)
    clean = [text for text in sentences(100, 3) if plain_similarity(texts, text).max() < 0.7]
    assert len(clean) > 80
    exact = [texts[1].upper(), f"  {texts[2].replace(' ', ',  ')}!"]
    near = [f"{texts[4]} unseen", " ".join(texts[5].split()[1:])]
    assert min(plain_similarity(texts, text).max() for text in near) > 0.7
    records = [record(text) for text in [*clean[:40], *exact, *near, *clean[40:]]]
    counts, kept, gone = run(tmp_path, records, texts)
    assert [one.query for one in kept] == clean
    assert [(row["field"], row["text"], row["reason"], row["matched"]) for row in gone] == [
        ("query", exact[0], "exact", texts[1]),
        ("query", exact[1], "exact", texts[2]),
        ("query", near[0], "bm25", texts[4]),
        ("query", near[1], "bm25", texts[5]),
    ]
    assert gone[0]["score"] == 1 and gone[2]["score"] == pytest.approx(
        plain_similarity(texts, near[0]).max(), abs=1e-4
    )
    assert gone[0]["file"] == str(tmp_path / "test.jsonl")
    assert (counts.records, counts.kept, counts.dropped_exact, counts.dropped_bm25) == (len(records), len(clean), 2, 2)
    _, kept, gone = run(tmp_path, records, texts, threshold=None)
    assert [one.query for one in kept] == [*clean[:40], *near, *clean[40:]] and len(gone) == 2
    threshold = (gone_score := plain_similarity(texts, near[0]).max()) + 1e-3
    _, kept, _ = run(tmp_path, records, texts, threshold=threshold)
    assert near[0] in [one.query for one in kept] and gone_score < threshold


def test_a_short_text_inside_a_long_one_is_no_copy(tmp_path):
    short, long = "red apples", "red apples grow on trees and people pick them in autumn"
    _, kept, _ = run(tmp_path, [record(long), record("blue pears")], [short, "something else"])
    assert len(kept) == 2


def test_words():
    assert (
        words_of("  The \uff21\uff22\uff23, it's _2_\n STRASSE!")
        == "the abc it s 2 strasse"
        == words_of("The ABC it's 2 stra\u00dfe")
    )
    assert words_of(" ?! ") == "?!" and words_of("\u4f60\u597d\u3002") == "\u4f60\u597d"


def test_documents(tmp_path):
    leak = sentences(1, 5)[0]
    records = [
        record("first", ["good", leak], [leak.title(), "fine"])
        | {"query_id": "1", "pos_ids": ["a", "b"], "neg_ids": ["c", "d"]},
        record("second", [leak]),
        record("third", ["good"]),
    ]
    assert len(run(tmp_path, records, [leak])[1]) == 3
    counts, kept, gone = run(tmp_path, records, [leak], documents=True)
    assert [(one.query, one.pos, one.pos_ids, one.neg, one.neg_ids) for one in kept[:1]] == [
        ("first", ("good",), ("a",), ("fine",), ("d",))
    ]
    assert [one.query for one in kept] == ["first", "third"]
    assert [(row["field"], row["text"]) for row in gone] == [("pos", leak), ("neg", leak.title()), ("pos", leak)]
    assert (counts.dropped_exact, counts.positives, counts.negatives) == (1, 1, 1)


def test_evaluation_sets_and_the_command_line(tmp_path, capsys):
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    jsonl(
        beir / "queries.jsonl", [{"_id": "1", "text": "asked in the test"}, {"_id": "2", "text": "asked in training"}]
    )
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n1\td\t1\n")
    lists = jsonl(tmp_path / "clusters.jsonl", [{"sentences": ["in a cluster", " "], "labels": ["x", "y"]}])
    pairs = jsonl(tmp_path / "sts.jsonl", [{"sentence1": "one half", "sentence2": "the other half"}])
    queries = ["asked in the test", "asked in training", "in a cluster", "the other half", "free"]
    source = jsonl(tmp_path / "in.jsonl", [record(query) for query in queries])
    output, figures = tmp_path / "out.jsonl", tmp_path / "figures.json"
    words = ["data", "decontaminate", source, output, "--against", beir, lists, pairs, "--exact", "--json", figures]
    assert main([str(word) for word in words]) == 0
    assert [one.query for one in read_records(output)] == ["asked in training", "free"]
    gone = [json.loads(line) for line in (tmp_path / "out.dropped.jsonl").read_text().splitlines()]
    assert [row["file"] for row in gone] == [str(beir), str(lists), str(pairs)]
    assert json.loads(figures.read_text()) == {
        "evaluation texts": 4,
        "records read": 5,
        "records kept": 2,
        "dropped: equal to an evaluation text": 3,
        "dropped: similar to an evaluation text": 0,
        "positives taken out of records that stay": 0,
        "negatives taken out of records that stay": 0,
    }
    assert "equal to an evaluation text" in capsys.readouterr().out
