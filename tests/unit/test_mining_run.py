"""Mining from files to files in one process, against loops over queries and documents."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nvembed_mcore.data.records import read_records
from nvembed_mcore.mining import candidates, search
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


def test_what_is_mined_reads_as_records(tmp_path, data):
    mine(WordEmbedder, mining_of(tmp_path))
    read = list(read_records(tmp_path / "mined" / "records.jsonl"))
    assert [(one.query, list(one.neg), list(one.neg_ids)) for one in read] == [
        (row["query"], row["neg"], row["neg_ids"]) for row in rows_of(tmp_path)
    ]


def test_the_same_command_goes_on_with_what_is_there(tmp_path, data):
    mine(WordEmbedder, mining_of(tmp_path))
    first, work = files_of(tmp_path), tmp_path / "mined" / "work"
    assert sorted(first) == ["records.jsonl", "report.html", "report.json"]
    found = next(work.glob("candidates-*"))
    made = {path: path.stat().st_mtime_ns for path in (*found.iterdir(), *work.glob("*/shard-*"))}
    gone = [found / "shard-00001.npz", work / "documents" / "shard-00003.npy", work / "queries/shard-00000.npy"]
    for path in gone:
        path.unlink()
    (tmp_path / "mined" / "records.jsonl").unlink()
    embedders = []
    mine(lambda: embedders.append(WordEmbedder()) or embedders[0], mining_of(tmp_path))
    assert embedders[0].embedded == 16 + 16
    assert files_of(tmp_path) == first
    assert {path for path, time in made.items() if path.stat().st_mtime_ns != time} == set(gone)


class Failing(WordEmbedder):
    """Ends in the middle, as a killed process does."""

    def embed(self, texts, is_query):
        if self.embedded >= 40:
            raise KeyboardInterrupt
        return super().embed(texts, is_query)


def test_an_interrupted_run_goes_on(tmp_path, data):
    with pytest.raises(KeyboardInterrupt):
        mine(Failing, mining_of(tmp_path))
    assert files_of(tmp_path) == {}
    embedders = []
    mine(lambda: embedders.append(WordEmbedder()) or embedders[0], mining_of(tmp_path))
    records, corpus = data
    assert embedders[0].embedded == len(records) + len(corpus) + 1 - 48
    assert rows_of(tmp_path) == mined_by_loops(records, corpus, RULES["default"])


def test_other_rules_take_the_same_embeddings(tmp_path, data):
    mine(WordEmbedder, mining_of(tmp_path))
    embedders = []
    mine(lambda: embedders.append(WordEmbedder()) or embedders[0], mining_of(tmp_path, rules=RULES["range"]))
    assert embedders[0].embedded == 0
    assert rows_of(tmp_path) == mined_by_loops(*data, RULES["range"])
    # Candidates of rules that are no longer asked for are not kept.
    assert len(list((tmp_path / "mined" / "work").glob("candidates-*"))) == 1


def test_a_flat_index_mines_the_same(tmp_path, data, few_candidates):
    mine(WordEmbedder, mining_of(tmp_path, index="Flat", depth=1000))
    assert rows_of(tmp_path) == mined_by_loops(*data, RULES["default"])


def test_shards_of_other_sizes_mine_the_same(tmp_path, data):
    mine(WordEmbedder, mining_of(tmp_path))
    first = (tmp_path / "mined" / "records.jsonl").read_bytes()
    mine(WordEmbedder, mining_of(tmp_path, output=str(tmp_path / "again"), shard_size=7))
    assert (tmp_path / "again" / "records.jsonl").read_bytes() == first


def test_another_model_is_refused(tmp_path, data):
    mine(WordEmbedder, mining_of(tmp_path))
    first = files_of(tmp_path)
    with pytest.raises(ValueError, match="documents holds other embeddings.*\n.*weights: 'words' -> 'letters'"):
        mine(lambda: WordEmbedder("letters"), mining_of(tmp_path))
    assert files_of(tmp_path) == first


class Uneven(WordEmbedder):
    """The later in a shard, the larger: as of packed texts, the vectors of two copies are not the same bits."""

    def embed(self, texts, is_query):
        return super().embed(texts, is_query) * (1 + 1e-4 * np.arange(len(texts), dtype=np.float32))[:, None]


def test_a_text_has_one_id_whichever_copy_is_found(tmp_path, data):
    _, corpus = data
    ids = {}
    for one in corpus:
        ids.setdefault(one["text"].strip(), one["id"])
    mine(Uneven, mining_of(tmp_path, rules=Rules(method="topk", negatives=50), shard_size=8192))
    named = {
        (text, name)
        for row in rows_of(tmp_path)
        for texts, names in ((row["pos"], row["pos_ids"]), (row["neg"], row["neg_ids"]))
        for text, name in zip(texts, names, strict=True)
    }
    copied = [text for text, _ in named if sum(one["text"].strip() == text for one in corpus) > 1]
    assert len(copied) > 5 and all(ids.get(text, name) == name for text, name in named)


def test_records_keep_their_instructions(tmp_path, data):
    records, corpus = data
    given = ["Find it", "", None]
    for record, own in zip(records, given, strict=False):
        record["instruction"] = own
    write_json_lines(tmp_path / "records.jsonl", records)
    mine(WordEmbedder, mining_of(tmp_path))
    read = [record.instruction for record in read_records(tmp_path / "mined" / "records.jsonl")]
    assert read == given + [None] * (len(records) - 3)


def test_no_positive_is_kept_as_a_negative(tmp_path, data):
    records, corpus = data
    kept = records[4]["neg"]
    records[4]["neg"] = [records[4]["pos"][0].upper(), *kept, records[4]["pos"][0]]
    records[5] |= {"pos_ids": [f"p{number}" for number, _ in enumerate(records[5]["pos"])]}
    records[5] |= {"neg": ["another text of the same document"], "neg_ids": ["p0"]}
    write_json_lines(tmp_path / "records.jsonl", records)
    mine(WordEmbedder, mining_of(tmp_path, keep_negatives=True))
    rows = rows_of(tmp_path)
    assert rows[4]["neg"][: len(kept)] == kept
    assert not {text.lower() for text in rows[4]["neg"]} & set(records[4]["pos"])
    assert records[5]["neg"][0] not in rows[5]["neg"]
    for row in rows[4:6]:
        assert len(row["neg"]) == len(row["neg_ids"]) == len(row["neg_scores"]) == len(set(row["neg"]))


def test_positives_that_the_corpus_lacks(tmp_path, data, monkeypatch):
    monkeypatch.setattr(candidates, "_SCORED", 4)
    records, corpus = data
    records[7]["pos"] = records[4]["pos"]
    write_json_lines(tmp_path / "records.jsonl", records)
    write_json_lines(tmp_path / "corpus.jsonl", corpus[60:])
    mine(WordEmbedder, mining_of(tmp_path))
    assert rows_of(tmp_path) == mined_by_loops(records, corpus[60:], RULES["default"])


def test_a_refused_command_leaves_the_corpus_of_another(tmp_path, data):
    mine(WordEmbedder, mining_of(tmp_path))
    first = files_of(tmp_path)
    with pytest.raises(ValueError, match="documents holds other embeddings"):
        mine(WordEmbedder, mining_of(tmp_path, corpus=None))
    mine(WordEmbedder, mining_of(tmp_path))
    assert files_of(tmp_path) == first
