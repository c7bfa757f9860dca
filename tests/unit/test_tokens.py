"""The token store: what is in it, what names it, and what happens to a damaged or half-built one."""

import dataclasses
import fcntl
import json

import datasets
import numpy as np
import pytest

from nvembed_mcore.config import DatasetConfig
from nvembed_mcore.data import token_build, tokens
from nvembed_mcore.data.prompts import encode_texts
from nvembed_mcore.data.records import DataError, read_records
from nvembed_mcore.data.token_build import document_hashes
from nvembed_mcore.data.tokenizer import load_tokenizer, write_mistral_tokenizer
from nvembed_mcore.data.tokens import TokenStore

LIMITS = dict(max_query_tokens=32, max_document_tokens=24)
ROWS = [
    {
        "query": f"question number {i} about " + "words " * (i % 40),
        "pos": [f"positive {i} {j}" for j in range(1 + i % 3)],
        "neg": [f"negative {i} {j} " + "more " * j for j in range(i % 5)],
        "neg_ids": [f"n{i}-{j}" for j in range(i % 5)],
    }
    for i in range(300)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_mistral_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return DatasetConfig(path=str(path), instruction="Find it")


def build(data, tokenizer, **changes):
    arguments = {**LIMITS, "cache_dir": f"{data.path}.cache", **changes}
    return TokenStore.build(data, tokenizer, **arguments)


def one_text(tokenizer, text, instruction, limit):
    return encode_texts(tokenizer, [text], instruction, limit).token_ids


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_example_is_its_record(data, tokenizer, symmetric, monkeypatch):
    monkeypatch.setattr(token_build, "_BATCH_RECORDS", 64)
    data = dataclasses.replace(data, instruct_documents=symmetric)
    store = build(data, tokenizer)
    instruction = "Find it" if symmetric else ""
    assert len(store) == len(ROWS)
    order = np.random.default_rng(0).permutation(len(ROWS))
    records = list(read_records(data.path))
    for index in order.tolist():
        record, example = records[index], store.example(index)
        assert example.query.dtype == np.int32 and not example.query.flags.writeable
        assert example.query.tolist() == one_text(tokenizer, record.query, "Find it", 32).tolist()
        assert example.query_pooled_from == 9
        assert example.document_pooled_from == (9 if symmetric else 0)
        for texts, arrays in ((record.pos, example.positives), (record.neg, example.negatives)):
            expected = [one_text(tokenizer, text, instruction, 24).tolist() for text in texts]
            assert [array.tolist() for array in arrays] == expected
        assert example.positive_ids.dtype == example.negative_ids.dtype == np.int64
        assert example.positive_ids.tolist() == document_hashes(record.pos_ids).tolist()
        assert example.negative_ids.tolist() == document_hashes([f"n{index}-{j}" for j in range(index % 5)]).tolist()


def test_lengths_and_statistics(data, tokenizer):
    store = build(data, tokenizer)
    examples = [store.example(index) for index in range(len(store))]
    assert store.query_lengths().tolist() == [len(example.query) for example in examples]
    documents = [len(text) for example in examples for text in example.positives + example.negatives]
    assert sorted(store.document_lengths().tolist()) == sorted(documents)
    whole = build(data, tokenizer, max_query_tokens=4096, max_document_tokens=4096)
    found = store.statistics
    assert found.records == len(ROWS) and found.documents == len(documents)
    assert found.tokens == store.query_lengths().sum() + sum(documents)
    assert 0 < found.truncated_queries == (whole.query_lengths() > 32).sum()
    assert found.truncated_documents == (whole.document_lengths() > 24).sum()
    assert whole.statistics.truncated_queries == whole.statistics.truncated_documents == 0


def test_document_hashes_are_pinned_and_signed():
    expected = int.from_bytes(bytes.fromhex("e3b0c44298fc1c14"), "little", signed=True)
    assert document_hashes([""]).tolist() == [expected]
    assert min(found := document_hashes([str(i) for i in range(20)]).tolist()) < 0 < max(found)
    assert len(document_hashes([])) == 0


def test_a_second_build_only_opens(data, tokenizer, monkeypatch):
    first = build(data, tokenizer)
    monkeypatch.setattr(tokens, "write_store", lambda *_, **__: pytest.fail("built again"))
    second = build(data, tokenizer)
    opened = TokenStore.open(first.folder)
    for other in (second, opened):
        assert other.fingerprint == first.fingerprint and other.statistics == first.statistics
        assert other.example(7).query.tolist() == first.example(7).query.tolist()


def test_what_enters_the_fingerprint(data, tokenizer, tmp_path, monkeypatch):
    def name(config=data, with_tokenizer=tokenizer, **changes):
        return build(config, with_tokenizer, cache_dir=tmp_path / "cache", **changes).fingerprint

    (tmp_path / "moved.jsonl").write_bytes((tmp_path / "data.jsonl").read_bytes())
    moved = dataclasses.replace(data, path=str(tmp_path / "moved.jsonl"), weight=3.0, num_negatives=1)
    assert name(moved) == name(), "the name of the file, the weight and the number of negatives do not"
    (tmp_path / "other.jsonl").write_bytes((tmp_path / "data.jsonl").read_bytes() + b"\n")
    other_tokenizer = load_tokenizer(_other_tokenizer(tmp_path))
    names = [
        name(),
        name(dataclasses.replace(data, path=str(tmp_path / "other.jsonl"))),
        name(dataclasses.replace(data, instruction="Find that")),
        name(dataclasses.replace(data, instruct_documents=True)),
        name(max_query_tokens=33),
        name(max_document_tokens=33),
        name(with_tokenizer=other_tokenizer),
    ]
    monkeypatch.setattr(tokens, "_FORMAT", 0)
    names.append(name())
    assert len(set(names)) == len(names)


def _other_tokenizer(folder):
    directory = folder / "other"
    write_mistral_tokenizer(directory)
    content = json.loads((directory / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:100]
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return directory


def test_datasets_opens_the_same_file(data, tokenizer):
    store = build(data, tokenizer)
    row = datasets.Dataset.from_file(str(store.folder / "data.arrow"))[13]
    example = store.example(13)
    assert row["query"] == example.query.tolist() and row["query_length"] == len(row["query"])
    assert row["neg"] == [text.tolist() for text in example.negatives]
    assert row["neg_lengths"] == [len(text) for text in row["neg"]]
    assert row["neg_ids"] == example.negative_ids.tolist()


def test_long_rows_end_a_batch(data, tokenizer, monkeypatch):
    monkeypatch.setattr(token_build, "_BATCH_CHARACTERS", 500)
    store = build(data, tokenizer)
    assert len(store._file.batches) > 20
    assert [store.example(i).query_pooled_from for i in range(len(store))] == [9] * len(ROWS)
    assert store.example(299).query.tolist() == one_text(tokenizer, ROWS[299]["query"], "Find it", 32).tolist()


@pytest.mark.parametrize("index", [-1, 300])
def test_no_such_record(data, tokenizer, index):
    with pytest.raises(IndexError, match=f"record {index} of a store with 300 records"):
        build(data, tokenizer).example(index)


def test_bad_data_leaves_nothing_behind(data, tokenizer, tmp_path):
    with open(data.path, "a") as file:
        file.write('{"query": ""}\n')
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match="data.jsonl:301:11: query is empty"):
        build(data, tokenizer, cache_dir=cache)
    assert list(cache.iterdir()) == []
    with pytest.raises(DataError, match="no data file at .*nowhere.jsonl"):
        build(dataclasses.replace(data, path=str(tmp_path / "nowhere.jsonl")), tokenizer)


def test_an_interrupted_build_leaves_no_store(data, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(token_build, "_BATCH_RECORDS", 64)
    cache, plain, batches = tmp_path / "cache", token_build._arrow_batch, []

    def interrupt(records, encoder, statistics):
        batches.append(records)
        if len(batches) == 3:
            (aside,) = cache.iterdir()
            killed = cache / f"{aside.name}-killed"  # what a killed process could not clear away
            killed.mkdir()
            (killed / "data.arrow").write_bytes(b"half")
            (killed / "lock").touch()  # nobody holds it any more
            raise KeyboardInterrupt
        return plain(records, encoder, statistics)

    monkeypatch.setattr(token_build, "_arrow_batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(data, tokenizer, cache_dir=cache)
    (left,) = cache.iterdir()
    assert left.name.startswith(".") and left.name.endswith("-killed")
    store = build(data, tokenizer, cache_dir=cache)
    assert len(store) == len(ROWS) and list(cache.iterdir()) == [store.folder]
    assert sorted(one.name for one in store.folder.iterdir()) == ["data.arrow", "store.json"]


def test_what_another_build_is_writing_stays(data, tokenizer, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    name = build(data, tokenizer, cache_dir=tmp_path / "other").folder.name
    locked, begun = cache / f".{name}.locked", cache / f".{name}.begun"
    for folder in (locked, begun):
        folder.mkdir(parents=True)
    (locked / "lock").touch()
    with (locked / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        store = build(data, tokenizer, cache_dir=cache)
    assert {one.name for one in cache.iterdir()} == {locked.name, begun.name, store.folder.name}


def test_no_room_for_the_instruction(data, tokenizer, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match="takes 9 tokens.* limit of 10"):
        build(data, tokenizer, max_query_tokens=10, cache_dir=cache)
    symmetric = dataclasses.replace(data, task="sts")
    with pytest.raises(ValueError, match="takes 9 tokens.* limit of 10"):
        build(symmetric, tokenizer, max_document_tokens=10, cache_dir=cache)
    assert not cache.exists()
    assert build(data, tokenizer, max_document_tokens=10, cache_dir=cache).example(0).document_pooled_from == 0


def test_a_file_that_changes_while_it_is_read(data, tokenizer, tmp_path, monkeypatch):
    plain = token_build._Build.write_arrow

    def write_and_change(self, path, encoder, processes):
        plain(self, path, encoder, processes)
        with open(self.source, "a") as file:
            file.write("\n")

    monkeypatch.setattr(token_build._Build, "write_arrow", write_and_change)
    with pytest.raises(DataError, match="data.jsonl changed while it was tokenised"):
        build(data, tokenizer, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_build_was_faster(data, tokenizer, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    plain = token_build._Build.write_arrow

    def let_another_finish_first(self, path, encoder, processes):
        monkeypatch.setattr(token_build._Build, "write_arrow", plain)
        build(data, tokenizer, cache_dir=cache)
        plain(self, path, encoder, processes)

    monkeypatch.setattr(token_build._Build, "write_arrow", let_another_finish_first)
    store = build(data, tokenizer, cache_dir=cache)
    assert list(cache.iterdir()) == [store.folder] and len(store) == len(ROWS)


def test_a_damaged_store(data, tokenizer, tmp_path):
    with pytest.raises(DataError, match="no token store at"):
        TokenStore.open(tmp_path / "nowhere")
    folder = build(data, tokenizer).folder
    whole = (folder / "data.arrow").read_bytes()
    (folder / "data.arrow").write_bytes(whole[:-100])
    with pytest.raises(DataError, match=rf"is damaged \(data.arrow has {len(whole) - 100} bytes, {len(whole)} were"):
        build(data, tokenizer)
    (folder / "data.arrow").write_bytes(b"x" * len(whole))
    with pytest.raises(DataError, match="remove the folder"):
        TokenStore.open(folder)
    (folder / "data.arrow").write_bytes(whole)
    assert len(TokenStore.open(folder)) == len(ROWS)
    (folder / "store.json").unlink()
    with pytest.raises(DataError, match="is damaged"):
        TokenStore.open(folder)
