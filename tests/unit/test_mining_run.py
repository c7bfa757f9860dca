"""Mining from files to files in one process, against loops over queries and documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nvembed_mcore.data.records import read_records
from nvembed_mcore.mining import search
from nvembed_mcore.mining.run import Mining, mine
from nvembed_mcore.mining.select import Rules
from tests.helpers.mining import WordEmbedder, make_data, mined_by_loops, write_json_lines

RULES = {
    "default": Rules(negatives=3),
    "random": Rules(method="topk-marginpos", negatives=3, sampling="random", last=30, seed=2),
    "range": Rules(method="topk", negatives=4, skip=2, last=9),
    "absolute": Rules(method="topk-abs", max_score=0.5, negatives=2),
}


@pytest.fixture
def few_candidates(monkeypatch):
    """So that queries are asked again."""
    monkeypatch.setattr(search, "FIRST_CANDIDATES", 5)


@pytest.fixture
def data(tmp_path):
    records, corpus = make_data()
    write_json_lines(tmp_path / "records.jsonl", records)
    write_json_lines(tmp_path / "corpus.jsonl", corpus)
    return records, corpus


def mining_of(folder: Path, **changes) -> Mining:
    settings = dict(
        records=str(folder / "records.jsonl"),
        corpus=str(folder / "corpus.jsonl"),
        output=str(folder / "mined"),
        rules=RULES["default"],
        shard_size=16,
    )
    return Mining(**{**settings, **changes})


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "mined" / "records.jsonl").read_text("utf-8").splitlines()]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "mined").iterdir() if path.is_file()}


@pytest.mark.parametrize("keep_negatives", [False, True])
@pytest.mark.parametrize("rules", list(RULES))
def test_mined_is_what_loops_give(tmp_path, data, few_candidates, rules, keep_negatives):
    mine(WordEmbedder, mining_of(tmp_path, rules=RULES[rules], keep_negatives=keep_negatives))
    assert rows_of(tmp_path) == mined_by_loops(*data, RULES[rules], keep_negatives=keep_negatives)


def test_without_a_corpus_the_records_documents_are_mined(tmp_path, data, few_candidates):
    records, corpus = data
    texts = dict.fromkeys(text for record in records for text in (*record["pos"], *record["neg"]))
    # What has no id gets one of its text.
    named = [{"id": content, "text": text} for content, text in ids_of(tmp_path / "records.jsonl").items()]
    assert [one["text"] for one in named] == list(texts)
    mine(WordEmbedder, mining_of(tmp_path, corpus=None))
    assert rows_of(tmp_path) == mined_by_loops(records, named, RULES["default"])


def ids_of(path: Path) -> dict[str, str]:
    named = {}
    for record in read_records(path):
        named |= dict(zip(record.pos_ids + record.neg_ids, record.pos + record.neg, strict=True))
    return named
