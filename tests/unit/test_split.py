"""A table of pairs as a training set and a test set."""

from __future__ import annotations

import json

import pytest

from nvembed_mcore.cli import main
from nvembed_mcore.data.beir import read_beir
from nvembed_mcore.data.faults import DataError
from nvembed_mcore.data.records import read_records
from nvembed_mcore.data.split import split


@pytest.fixture
def pairs(tmp_path):
    """100 pairs: each document answers two queries of different records, and one query stands in both of two."""
    file = tmp_path / "pairs.csv"
    rows = [f"query {number},document {number // 2}" for number in range(98)]
    file.write_text("\n".join(["query,pos", *rows, "twice,one answer", "twice,another answer"]) + "\n")
    return file


def test_nothing_that_is_tested_was_trained_on(pairs, tmp_path):
    counts = split(pairs, tmp_path / "data", held_out=21)
    train = list(read_records(tmp_path / "data" / "train.jsonl"))
    test = read_beir(tmp_path / "data" / "heldout")
    assert counts.train + counts.held_out == len(train) + counts.held_out == counts.records == 100
    assert counts.held_out == 20  # groups are of two
    assert not {one.query for one in train} & set(test.queries.values())
    relevant = {test.corpus[document] for found in test.qrels.values() for document in found}
    assert not {text for one in train for text in one.pos} & relevant
    # The search is among all documents.
    assert len(test.corpus) == 51 and {text for one in train for text in one.pos} < set(test.corpus.values())
    for query, found in test.qrels.items():
        number = test.queries[query].removeprefix("query ")
        expected = {"one answer", "another answer"} if number == "twice" else {f"document {int(number) // 2}"}
        assert {test.corpus[document] for document in found} == expected


def test_the_seed_decides(pairs, tmp_path):
    trained = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        split(pairs, tmp_path / name, held_out=20, seed=seed)
        trained.append((tmp_path / name / "train.jsonl").read_bytes())
    assert trained[0] == trained[1] != trained[2]


def test_what_cannot_be_split(pairs, tmp_path):
    with pytest.raises(DataError, match="cannot hold out 100 of 100 records"):
        split(pairs, tmp_path / "data", held_out=100)
    with pytest.raises(DataError, match="has more than the 1 to hold out"):
        split(pairs, tmp_path / "data", held_out=1)
    named = tmp_path / "named.jsonl"
    rows = [{"query": f"q{text}", "pos": [text], "pos_ids": ["same"]} for text in ("a", "b")]
    rows.append({"query": "other", "pos": ["c"], "pos_ids": ["c"]})
    named.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="the id 'same' has two texts: 'a' and 'b'"):
        split(named, tmp_path / "data", held_out=2)


def test_the_command(pairs, tmp_path, capsys):
    counts = tmp_path / "counts.json"
    command = ["data", "split", str(pairs), str(tmp_path / "data"), "--held-out", "20", "--json", str(counts)]
    assert main(command) == 0
    assert "test queries" in capsys.readouterr().out
    assert json.loads(counts.read_text())["held out"] == 20
