"""A record may have an instruction of its own: from the file to the tokens and the pooled positions."""

import json
from collections import Counter

import pytest

from nvembed_mcore.config import DatasetConfig
from nvembed_mcore.data.check.sets import check_sets
from nvembed_mcore.data.decontaminate import decontaminate
from nvembed_mcore.data.prompts import encode_texts, prompt_tokens
from nvembed_mcore.data.records import DataError, read_records
from nvembed_mcore.data.tokenizer import load_tokenizer
from nvembed_mcore.data.tokens import TokenStore

TASKS = ["Given a price, find offers", None, "", None, "Find the meaning of a word", "Find the meaning of a word"]
ROWS = [
    {"query": f"query {number}", "pos": [f"good {number}"], "neg": [f"bad {number}"]}
    | ({} if task is None else {"instruction": task})
    for number, task in enumerate(TASKS)
]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_it_is_read(path, tmp_path):
    assert [record.instruction for record in read_records(path)] == TASKS
    table = tmp_path / "data.csv"
    table.write_text("query,pos,instruction\na,b,Find it\nc,d,\n")
    assert [record.instruction for record in read_records(table)] == ["Find it", None]


def test_it_takes_the_place_of_the_data_sets(path, tmp_path, tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    config = DatasetConfig(path=str(path), instruction="Find it", instruct_documents=True)
    limits = dict(max_query_tokens=32, max_document_tokens=32)
    store = TokenStore.build(config, tokenizer, cache_dir=tmp_path / "cache", **limits)
    for number, (row, task) in enumerate(zip(ROWS, TASKS, strict=True)):
        example, instruction = store.example(number), "Find it" if task is None else task
        expected = encode_texts(tokenizer, [row["query"]], instruction, 32).token_ids
        assert example.query.tolist() == expected.tolist()
        assert example.query_pooled_from == len(prompt_tokens(tokenizer, instruction))
        assert example.document_pooled_from == len(prompt_tokens(tokenizer, "Find it"))
        document = encode_texts(tokenizer, row["pos"], "Find it", 32).token_ids
        assert example.positives[0].tolist() == document.tolist()
    assert store.example(2).query_pooled_from == 0
    assert store.query_lengths().tolist() == [len(store.example(number).query) for number in range(len(ROWS))]


def test_refusals(tmp_path, tokenizer_dir):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(ROWS[0] | {"instruction": 3}) + "\n")
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    assert str(caught.value) == f"{path} has 1 bad line:\n  {path}:1:74: instruction must be a string, got a number"
    path.write_text(json.dumps(ROWS[1]) + "\n" + json.dumps(ROWS[0] | {"instruction": "a b c d e f g h i j"}) + "\n")
    config = DatasetConfig(path=str(path), instruction="Find it")
    limits = dict(max_query_tokens=16, max_document_tokens=16)
    with pytest.raises(DataError) as caught:
        TokenStore.build(config, load_tokenizer(tokenizer_dir), cache_dir=tmp_path / "cache", **limits)
    assert str(caught.value) == (
        f"{path}:2: the instruction 'a b c d e f g h i j' takes 17 tokens, and with one token of text and </s> more "
        "than the limit of 16"
    )


def test_the_check_measures_it(path, tmp_path, tokenizer_dir):
    """Lengths are those of the store, and what the store refuses is refused with the same words."""
    config, limits = DatasetConfig(path=str(path), instruction="Find it"), {"max_document_tokens": 32}
    report = check_sets([config], tokenizer=str(tokenizer_dir), max_query_tokens=32, **limits)
    limits["cache_dir"] = tmp_path / "cache"
    tokenizer = load_tokenizer(tokenizer_dir)
    store = TokenStore.build(config, tokenizer, max_query_tokens=32, **limits)
    assert report.sets[0].lengths["query"].counts == Counter(store.query_lengths().tolist())
    assert report.refusals == []
    report = check_sets([config], tokenizer=str(tokenizer_dir), max_query_tokens=12, max_document_tokens=32)
    with pytest.raises(DataError) as caught:
        TokenStore.build(config, tokenizer, max_query_tokens=12, **limits)
    assert report.refusals == [str(caught.value)]


def test_decontamination_keeps_it(path, tmp_path):
    (tmp_path / "test.jsonl").write_text('{"text": "query 0"}\n')
    decontaminate(path, tmp_path / "out.jsonl", against=[tmp_path / "test.jsonl"], threshold=None)
    assert [record.instruction for record in read_records(tmp_path / "out.jsonl")] == TASKS[1:]
