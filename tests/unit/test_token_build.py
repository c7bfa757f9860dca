"""Building a token store: the same by any number of processes, exactly as one text after the other, all or nothing."""

from __future__ import annotations

import contextlib
import gzip
import json
import random

import numpy as np
import psutil
import pyarrow
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from nvembed_mcore.config import DatasetConfig
from nvembed_mcore.data import files, token_build, tokens
from nvembed_mcore.data.bare_tokenizer import BareTokenizer
from nvembed_mcore.data.faults import DataError
from nvembed_mcore.data.prompts import encode_texts
from nvembed_mcore.data.records import read_records
from nvembed_mcore.data.source import fingerprint_of
from nvembed_mcore.data.tokenizer import load_tokenizer, write_mistral_tokenizer
from nvembed_mcore.data.tokens import TokenStore

ALPHABET = [
    *"abcdefghij  ",
    "  ",
    "   ",
    "\u2581",
    "\u2581\u2581",
    "\n",
    "\t",
    "\u00a0",
    "\u3000",
    "é",
    "e\u0301",
    "中文",
    "😀",
    "\u200d",
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    "<s",
    ">",
    "Query:",
    "the ",
    "retrieve ",
    "x" * 70,
    "1999",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_mistral_tokenizer(folder)
    return load_tokenizer(folder)


def row(i: int) -> dict:
    some = random.Random(i)
    text = lambda: "w" + "".join(some.choices(ALPHABET, k=some.randint(1, 25)))  # noqa: E731
    return {"query": text(), "pos": [text() for _ in range(1 + i % 2)], "neg": [text() for _ in range(i % 4)]}


@pytest.fixture
def data(tmp_path, monkeypatch) -> DatasetConfig:
    """Records of several blocks."""
    monkeypatch.setattr(files, "BLOCK_BYTES", 1 << 15)
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(600)), encoding="utf-8")
    assert len(list(files.blocks(path))) > 5
    return DatasetConfig(path=str(path), instruction="Find it ")


def build(data, tokenizer, cache, **changes) -> TokenStore:
    how = dict(max_query_tokens=24, max_document_tokens=20) | changes
    return TokenStore.build(data, tokenizer, cache_dir=cache, **how)


def test_the_same_bytes_by_any_number_of_processes(data, tokenizer, tmp_path):
    stores = [build(data, tokenizer, tmp_path / str(n), processes=n) for n in (1, 2, 3)]
    for name in ("data.arrow", "store.json"):
        assert len({(store.folder / name).read_bytes() for store in stores}) == 1
    assert len({fingerprint_of([store]) for store in stores}) == 1


def test_a_folder_of_another_layout_gives_the_same_rows(tokenizer, tmp_path):
    """Two compressed shards of Tevatron's rows; a bad line is named by its file."""
    records = [{"query": f"q {i}", "pos": [f"p {i}"] * (1 + i % 2), "neg": [f"n {i}"] * (i % 3)} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    folder = tmp_path / "shards"
    folder.mkdir()
    lines = [json.dumps(_tevatron(one)) + "\n" for one in records]
    for name, some in {"0.jsonl.gz": lines[:20], "1.jsonl.gz": lines[20:]}.items():
        (folder / name).write_bytes(gzip.compress("".join(some).encode()))
    sources = [DatasetConfig(path=str(path)) for path in (tmp_path / "a.jsonl", folder)]
    expected, found = (build(one, tokenizer, tmp_path / "cache", processes=1) for one in sources)
    assert found.fingerprint != expected.fingerprint
    rows = [pyarrow.ipc.open_stream(store.folder / "data.arrow").read_all() for store in (expected, found)]
    assert rows[0].num_rows == 30 and rows[0].equals(rows[1])
    (folder / "1.jsonl.gz").write_bytes(gzip.compress(("".join(lines[20:]) + "{\n").encode()))
    with pytest.raises(DataError, match="shards/1.jsonl.gz:11:2: not JSON"):
        build(sources[1], tokenizer, tmp_path / "cache", processes=1)


def _tevatron(record: dict) -> dict:
    passages = {f"{name}_passages": [{"text": text} for text in record[name[:3]]] for name in ("positive", "negative")}
    return {"query": record["query"], **passages}


def test_rows_do_not_depend_on_blocks(data, tokenizer, tmp_path, monkeypatch):
    """The batches do: a batch never spans blocks."""
    many = build(data, tokenizer, tmp_path / "many", processes=1)
    monkeypatch.setattr(files, "BLOCK_BYTES", 1 << 22)
    one = build(data, tokenizer, tmp_path / "one", processes=1)
    assert len(many._file.batches) > len(one._file.batches) == 1
    assert many.fingerprint == one.fingerprint and many.statistics == one.statistics and len(one) == 600
    for index in range(600):
        a, b = many.example(index), one.example(index)
        for x, y in zip([a.query, *a.positives, *a.negatives], [b.query, *b.positives, *b.negatives], strict=True):
            assert x.tolist() == y.tolist()


def plain_ids(tokenizer, text: str, limit: int) -> list[int]:
    """What the store must hold of a text, through transformers' own call."""
    return [1, *tokenizer(text, add_special_tokens=False)["input_ids"][: limit - 2], 2]


def test_every_text_is_tokenised_as_alone(data, tokenizer, tmp_path):
    store = build(data, tokenizer, tmp_path / "cache", processes=2)
    for index, record in enumerate(read_records(data.path)):
        example = store.example(index)
        assert example.query.tolist() == plain_ids(tokenizer, f"Instruct: Find it \nQuery: {record.query}", 24)
        found = [one.tolist() for one in example.positives + example.negatives]
        assert found == [plain_ids(tokenizer, text, 20) for text in record.pos + record.neg]


def random_texts(number: int) -> list[str]:
    some = random.Random(7)
    return ["".join(some.choices(ALPHABET, k=some.randint(1, 30))) for _ in range(number)]


def test_words_alone_have_the_ids_of_the_text(tokenizer):
    bare = BareTokenizer.of(tokenizer)
    assert bare._words is not None, "Mistral's merges end at spaces"
    texts = [*random_texts(3000), "", " ", "\u2581", "a</s>b", " a", "a "]
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [np.frombuffer(row, np.int32).tolist() for row in bare.pieces(texts)] == expected
    again = bare.pieces(texts)
    assert [np.frombuffer(row, np.int32).tolist() for row in again] == expected, "from the words kept"


def test_the_words_kept_are_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr("nvembed_mcore.data.bare_tokenizer._KEPT_WORDS", 10)
    bare = BareTokenizer.of(tokenizer)
    texts = random_texts(200)
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [np.frombuffer(row, np.int32).tolist() for row in bare.pieces(texts)] == expected
    assert 0 < len(bare._words) <= 10 and max(map(len, bare._words)) <= 64


def changed(tokenizer, change) -> PreTrainedTokenizerFast:
    behaviour = json.loads(tokenizer.backend_tokenizer.to_str())
    change(behaviour)
    backend = Tokenizer.from_str(json.dumps(behaviour))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")  # noqa: S106


def _crossing_merge(behaviour):
    behaviour["model"]["vocab"]["e\u2581"] = len(behaviour["model"]["vocab"])
    behaviour["model"]["merges"].insert(0, ["e", "\u2581"])


def _added_word(behaviour):
    flags = dict(single_word=False, lstrip=True, rstrip=False, normalized=True, special=False)
    behaviour["added_tokens"].append({"id": 32000, "content": "the retrieve", **flags})


@pytest.mark.parametrize(
    "change",
    [
        _crossing_merge,
        _added_word,
        lambda behaviour: behaviour.update(normalizer={"type": "Lowercase"}),
        lambda behaviour: behaviour.update(pre_tokenizer={"type": "Whitespace"}),
        lambda behaviour: behaviour["model"].update(byte_fallback=False),
        lambda behaviour: behaviour["model"].update(ignore_merges=True),
    ],
)
def test_other_tokenizers_go_the_plain_way(tokenizer, change):
    other = changed(tokenizer, change)
    bare = BareTokenizer.of(other)
    assert bare._words is None
    texts = [*random_texts(300), "the retrieve e e", "see  the retrieve"]
    expected = other(texts, add_special_tokens=False)["input_ids"]
    assert [np.frombuffer(row, np.int32).tolist() for row in bare.pieces(texts)] == expected


def test_special_tokens_that_are_spelled(tokenizer):
    other = changed(tokenizer, lambda _: None)
    other.split_special_tokens = True
    expected = other(["a</s>b"], add_special_tokens=False)["input_ids"]
    assert expected != tokenizer(["a</s>b"], add_special_tokens=False)["input_ids"]
    assert [np.frombuffer(row, np.int32).tolist() for row in BareTokenizer.of(other).pieces(["a</s>b"])] == expected
    assert encode_texts(other, ["a</s>b"], "", 64).token_ids.tolist() == [1, *expected[0], 2]


def test_what_an_earlier_call_left_in_the_tokenizer(tokenizer):
    other = changed(tokenizer, lambda _: None)
    other.pad_token = "</s>"  # noqa: S105
    other(["a b c d e f", "a"], truncation=True, max_length=3, padding=True)
    for one in (other, BareTokenizer.of(other)):
        assert encode_texts(one, ["a b c d e f", "a"], "", 64).lengths.tolist() == [8, 3]


def test_a_worker_names_the_record(data, tmp_path):
    """Among many processes and blocks, the line that cannot be tokenised."""
    with open(data.path, "a") as file:
        file.write(json.dumps({"query": "b", "pos": ["c"]}) + "\n" + json.dumps({"query": "d", "pos": ["c"]}) + "\n")
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "Instruct: a\nQuery:": 3, "Instruct: a\nQuery: b": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    joining = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")  # noqa: S106
    data = DatasetConfig(path=data.path, instruction="a")
    with pytest.raises(DataError, match=r"data\.jsonl:1: the tokenizer does not keep .* apart from the text 'w"):
        build(data, joining, tmp_path / "cache", processes=2)
    assert list((tmp_path / "cache").iterdir()) == []


def test_bad_lines_are_left_out_and_enter_the_fingerprint(data, tokenizer, tmp_path, caplog):
    lines = [json.dumps(row(i)) for i in range(600)]

    def written(*bad: int) -> TokenStore:
        path = tmp_path / f"{bad}.jsonl"
        path.write_text("".join(("{" if i in bad else line) + "\n" for i, line in enumerate(lines)))
        return build(DatasetConfig(path=str(path)), tokenizer, tmp_path / "cache", max_bad_records=2, processes=1)

    store = written(3, 599)
    assert len(store) == 598 and store.statistics.records == 598
    assert store.identity["rejected"]["records"] == 2 and len(store.identity["rejected"]["lines"]) == 16
    assert f"{tmp_path}/(3, 599).jsonl:4:2: not JSON" in caplog.text
    assert f"{tmp_path}/(3, 599).jsonl:600:2: not JSON" in caplog.text
    assert store.example(597).query.tolist() == plain_ids(tokenizer, row(598)["query"], 24)
    other = written(3, 598)
    assert other.identity["rejected"]["lines"] != store.identity["rejected"]["lines"]
    assert written().identity["rejected"] == {"records": 0} and len(written()) == 600
    # Of the same data: what validation rejects is part of the name, and not how much was allowed.
    again = build(DatasetConfig(path=str(tmp_path / "(3, 599).jsonl")), tokenizer, tmp_path / "2", max_bad_records=9)
    assert again.fingerprint == store.fingerprint
    named = {key: store.identity[key] for key in tokens._IDENTITY} | {"columns": token_build.SCHEMA.names}
    assert tokens.identity_hash(named) == store.folder.name
    assert store.fingerprint != store.folder.name


def test_a_worker_that_is_killed(data, tokenizer, tmp_path, monkeypatch):
    plain, before = token_build._Build._note, {child.pid for child in psutil.Process().children()}

    def kill_workers(self, tokenised):
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):  # one that was killed before, and is a zombie
                if child.pid not in before and "spawn_main" in " ".join(child.cmdline()):
                    child.kill()
        plain(self, tokenised)

    monkeypatch.setattr(files, "BLOCK_BYTES", 1 << 10)  # far more blocks than are handed out ahead
    monkeypatch.setattr(token_build._Build, "_note", kill_workers)
    with pytest.raises(DataError) as caught:
        build(data, tokenizer, tmp_path / "cache", processes=2)
    expected = f"a process that read {data.path} was ended from outside (out of memory?)"
    assert str(caught.value) == expected
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_of_files(data, tokenizer, tmp_path, caplog):
    """Its files in order; a bad line is named by its file, and in the fingerprint by the file's place."""
    for name in ("b", "a"):
        folder = tmp_path / name
        folder.mkdir()
        for part in range(2):
            lines = [json.dumps(row(i)) for i in range(part * 10, part * 10 + 10)]
            (folder / f"{part}.jsonl").write_text("\n".join(lines[:9] + (["{"] if part else lines[9:])) + "\n")
    stores = [
        build(DatasetConfig(path=str(tmp_path / name)), tokenizer, tmp_path / f"{name}.cache", max_bad_records=1)
        for name in ("a", "b")
    ]
    assert len(stores[0]) == 19 and stores[0].fingerprint == stores[1].fingerprint
    assert stores[0].example(10).query.tolist() == plain_ids(tokenizer, row(10)["query"], 24)
    assert f"{tmp_path}/b/1.jsonl:10:2: not JSON" in caplog.text
