"""What encoding refuses, and the exact words. `TMP` stands for the test's folder."""

from __future__ import annotations

import gzip
import json
import shutil
import sys

import numpy as np
import pytest

from nvembed_mcore.config import ParallelConfig
from nvembed_mcore.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from nvembed_mcore.evaluation.corpus import Corpus
from nvembed_mcore.evaluation.embedders import open_embedder
from nvembed_mcore.evaluation.shards import encode_file, encode_shards, open_shards
from nvembed_mcore.parallel.groups import initialize, shutdown
from tests.helpers.exports import tiny_bert
from tests.unit.test_shards import Hashes


@pytest.fixture(scope="module", autouse=True)
def groups():
    yield initialize(ParallelConfig())
    shutdown()


def refusal(tmp_path, work) -> str:
    with pytest.raises(ValueError) as caught:
        work()
    return str(caught.value).replace(str(tmp_path), "TMP")


# Corpora


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("none.txt", None, "no data file at TMP/none.txt"),
        ("a.txt", b"", "TMP/a.txt holds no texts"),
        ("a.txt", b"one\n \n", "TMP/a.txt has 1 bad line:\n  TMP/a.txt:2:1: the text is empty"),
        (
            "a.txt",
            b"\xef\xbb\xbfone\n\ntw\xff\n",
            "TMP/a.txt has 2 bad lines:\n  TMP/a.txt:2:1: the text is empty\n"
            "  TMP/a.txt:3:3: not UTF-8: byte 10 of the file is 0xff (invalid start byte)",
        ),
        (
            "a.txt",
            b"\xef\xbb\xbf\xff\n",
            "TMP/a.txt has 1 bad line:\n  TMP/a.txt:1:1: not UTF-8: byte 3 of the file is 0xff (invalid start byte)",
        ),
        ("a.txt.gz", b"no gzip", "cannot read TMP/a.txt.gz: Not a gzipped file (b'no')"),
        (
            "a.txt.gz",
            gzip.compress(b"some text\n", mtime=0)[:-9],
            "cannot read TMP/a.txt.gz: Compressed file ended before the end-of-stream marker was reached",
        ),
        ("a.jsonl", b'{"_id": "a", "text": ""}\n', "TMP/a.jsonl holds no texts"),
        (
            "a.jsonl",
            b'{"_id": "a", "text": "x"}\n{"_id": "b", "text": "x"}\n{"_id": "a", "text": "y"}\n'
            b'{"id": "b", "text": ""}\n{"id": "b", "text": "z"}\n{"id": "a", "text": "z"}\n',
            "TMP/a.jsonl has 3 bad lines:\n  TMP/a.jsonl:3:1: the id 'a' is used before, in line 1\n"
            "  TMP/a.jsonl:5:1: the id 'b' is used before, in line 2\n"
            "  TMP/a.jsonl:6:1: the id 'a' is used before, in line 3",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"id": " ", "text": "x"}\n{"id": "c"}\n{"id": "d", "text": 5}\n'
            b'{"id": true, "text": "x"}\n{"id": "f", "text": "x", "title": []}\n{"id": "g", "text": "\\ud800"}\n[]\n',
            "TMP/a.jsonl has 8 bad lines:\n  TMP/a.jsonl:1:1: neither _id nor id is there\n"
            "  TMP/a.jsonl:2:8: id is empty\n  TMP/a.jsonl:3:1: text is missing\n"
            "  TMP/a.jsonl:4:21: text must be a string, got a number\n"
            "  TMP/a.jsonl:5:8: id must be a string, got true\n"
            "  TMP/a.jsonl:6:35: title must be a string, got a list\n"
            "  TMP/a.jsonl:7:21: text holds a lone surrogate (U+D800) at character 1\n"
            "  TMP/a.jsonl:8:1: not a JSON object but a list",
        ),
    ],
)
def test_texts_that_cannot_be_used(tmp_path, name, content, expected):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path, lambda: Corpus.build(tmp_path / name, tmp_path / "out")) == expected
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_texts(tmp_path):
    for name, text in (("a.txt", "a"), ("b.txt", "b")):
        (tmp_path / name).write_text(text)
    Corpus.build(tmp_path / "a.txt", tmp_path / "out")
    before = (tmp_path / "out" / "texts.arrow").read_bytes()
    assert refusal(tmp_path, lambda: Corpus.build(tmp_path / "b.txt", tmp_path / "out")) == (
        f"TMP/out holds the texts of TMP/a.txt with SHA-256 {SHA_OF_A}, that of TMP/b.txt is {SHA_OF_B}; give another "
        f"folder"
    )
    assert (tmp_path / "out" / "texts.arrow").read_bytes() == before


SHA_OF_A = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
SHA_OF_B = "3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d"


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        (
            "texts.json",
            None,
            "cannot read TMP/out/texts.json: [Errno 2] No such file or directory: 'TMP/out/texts.json'",
        ),
        ("texts.json", b"]", "cannot read TMP/out/texts.json: Expecting value: line 1 column 1 (char 0)"),
        ("texts.json", b"[1]", "TMP/out/texts.json must hold an object, got [1]"),
        ("texts.json", b"{}", "TMP/out holds no complete corpus: KeyError('fingerprint')"),
        (
            "texts.json",
            b'{"fingerprint": "", "source": "", "blank": 0, "rows": 7}',
            "TMP/out holds 2 texts, its texts.json says 7",
        ),
        ("texts.arrow", b"", "TMP/out holds no complete corpus: ArrowInvalid('File is too small: 0')"),
    ],
)
def test_a_damaged_corpus(tmp_path, file, content, expected):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    Corpus.build(tmp_path / "a.txt", tmp_path / "out")
    (tmp_path / "out" / file).unlink()
    if content is not None:
        (tmp_path / "out" / file).write_bytes(content)
    found = refusal(tmp_path, lambda: Corpus.open(tmp_path / "out"))
    assert found == expected


# Shards


def encode(folder, texts=("a", "b", "c"), ids=("1", "2", "3"), **changes):
    return encode_shards(Hashes(), texts, ids, folder, **{"are_queries": False, "shard_size": 2, **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ids": ("1", "2")}, "3 texts, but 2 ids"),
        ({"texts": (), "ids": ()}, "there are no texts to embed"),
        ({"texts": ("a", " \t", "c")}, "text 1 of 3, id '2', is empty: ' \\t'"),
        ({"shard_size": 0}, "a shard must have at least 1 row, got 0"),
        ({"format": "csv"}, "the format of shards must be npy or parquet, got 'csv'"),
        ({"dtype": "int8"}, "the data type of shards must be float32 or float16, got 'int8'"),
    ],
)
def test_shards_that_cannot_be_made(tmp_path, changes, expected):
    assert refusal(tmp_path, lambda: encode(tmp_path / "out", **changes)) == expected
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"shard_size": 3}, ["shard_size: 2 -> 3"]),
        (
            {"format": "parquet", "are_queries": True},
            ["are_queries: False -> True", "embedder.prompt: '' -> 'query: '", "format: 'npy' -> 'parquet'"],
        ),
        ({"dtype": "float16"}, ["dtype: 'float32' -> 'float16'"]),
        ({"fingerprint": "other"}, ["texts: 'abc' -> 'other'"]),
        ({"texts": ("a",), "ids": ("1",)}, ["count: 3 -> 1"]),
    ],
)
def test_other_embeddings(tmp_path, changes, lines):
    encode(tmp_path / "out", fingerprint="abc")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert refusal(tmp_path, lambda: encode(tmp_path / "out", **{"fingerprint": "abc", **changes})) == (
        "TMP/out holds other embeddings; different are (there -> now):\n  " + "\n  ".join(lines) + "\n"
        "Set these back, or give another folder"
    )
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def change_manifest(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (
            lambda folder: (folder / "manifest.json").unlink(),
            "TMP/out has no manifest.json: `nvembed encode` writes one with its embeddings",
        ),
        (
            lambda folder: (folder / "shard-00001.npy").unlink(),
            "TMP/out lacks 1 of 2 shards, or they are damaged: shard-00001.npy is the first; the command that wrote "
            "it makes them",
        ),
        (
            lambda folder: change_manifest(folder, complete=False),
            "TMP/out/manifest.json does not say that it is complete; run what wrote it once more",
        ),
        (
            lambda folder: change_manifest(folder, version=7),
            "TMP/out/manifest.json is of version 7, this program reads 1",
        ),
    ],
)
def test_incomplete_embeddings(tmp_path, harm, expected):
    encode(tmp_path / "out")
    harm(tmp_path / "out")
    assert refusal(tmp_path, lambda: open_shards(tmp_path / "out")) == expected


def test_shards_of_who_knows_what(tmp_path):
    encode(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    assert refusal(tmp_path, lambda: encode(tmp_path / "out")) == (
        "TMP/out has shards but no manifest.json that says of what; give another folder"
    )


def test_one_numpy_file_of_parquet(tmp_path):
    how = {"are_queries": False, "format": "parquet"}
    assert refusal(tmp_path, lambda: encode_file(Hashes(), tmp_path / "a.txt", tmp_path / "out.npy", **how)) == (
        "TMP/out.npy is to be one NumPy file, so the format must be npy, got 'parquet'"
    )


# Models


@pytest.fixture
def export(cases, tmp_path):
    return str(shutil.copytree(cases["mean"].folder, tmp_path / "export"))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"token_budget": 0}, "a pack must have at least 1 token, got --tokens-per-pack 0"),
        (
            {"query_prompt": "q: "},
            "--query-prompt is for models of sentence-transformers (st:...), and TMP/export is not one; it takes an "
            "--instruction",
        ),
        (
            {"trust_remote_code": True},
            "--trust-remote-code is for models of sentence-transformers (st:...), and TMP/export is not one; it takes "
            "an --instruction",
        ),
        ({"fp8": "delayed"}, "--fp8 delayed scales by earlier steps of a training, and here are none; use tensorwise"),
        ({"max_length": 2}, "<s> takes 1 tokens, and with one token of text and </s> more than the limit of 2"),
        (
            {"parallel": ParallelConfig(tp=2)},
            "parallel.tp x parallel.pp x parallel.cp = 2 x 1 x 1 = 2 does not divide the 1 process(es) of this run; "
            "start a multiple of it with torchrun --nproc-per-node",
        ),
        (
            {"tokenizer": "TMP/none"},
            "no tokenizer folder at TMP/none (`nvembed data tokenizer TMP/none` writes one)",
        ),
    ],
)
def test_options_that_do_not_suit_a_model(tmp_path, export, how, expected):
    if "tokenizer" in how:
        how = {"tokenizer": how["tokenizer"].replace("TMP", str(tmp_path))}
    assert refusal(tmp_path, lambda: open_embedder(export, **how)) == expected


def test_folders_that_are_no_model(tmp_path):
    neither = (
        "TMP/{0} is neither a run or checkpoint folder with a complete checkpoint nor a Hugging Face folder with a "
        "config.json; a model of sentence-transformers is named st:TMP/{0}"
    )
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none"):
        assert refusal(tmp_path, lambda: open_embedder(str(tmp_path / name))) == neither.format(name)  # noqa: B023
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    assert refusal(tmp_path, lambda: open_embedder(str(tmp_path / "empty"))) == (
        "TMP/empty holds low-rank adapters only. Give the run folder that trained them, or an export that has them "
        "merged (nvembed export-hf RUN OUTPUT)"
    )


def test_tokenizers_that_are_not_the_model_s(tmp_path, export, tokenizer_dir):
    has, had = (tokenizer_fingerprint(load_tokenizer(folder)) for folder in (tokenizer_dir, export))
    assert refusal(tmp_path, lambda: open_embedder(export, tokenizer=str(tokenizer_dir))) == (
        f"the tokenizer in {tokenizer_dir} is not the one of TMP/export: its fingerprint is {has}, the model had {had}"
    )
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "export" / file).unlink()
    assert refusal(tmp_path, lambda: open_embedder(export)) == (
        "TMP/export knows no tokenizer; give its folder with --tokenizer"
    )
    larger = shutil.copytree(tokenizer_dir, tmp_path / "larger")
    content = json.loads((larger / "tokenizer.json").read_text())
    flags = {key: content["added_tokens"][0][key] for key in ("single_word", "lstrip", "rstrip", "normalized")}
    content["added_tokens"] += [{"id": 32000 + i, "content": f"<{i}>", "special": True, **flags} for i in range(20)]
    (larger / "tokenizer.json").write_text(json.dumps(content))
    assert refusal(tmp_path, lambda: open_embedder(export, tokenizer=str(larger))) == (
        "the tokenizer in TMP/larger has 32020 ids, vocab_size of TMP/export is 32010"
    )


def test_a_tokenizer_that_is_gone(tmp_path, export, capsys):
    from nvembed_mcore.cli import main

    moved = shutil.copytree(export, tmp_path / "tokenizer")
    assert main(["import-hf", export, str(tmp_path / "run"), "--tokenizer", str(moved)]) == 0
    capsys.readouterr()
    initialize(ParallelConfig())
    shutil.rmtree(moved)
    assert refusal(tmp_path, lambda: open_embedder(str(tmp_path / "run"))) == (
        "the tokenizer of TMP/run is no more at TMP/tokenizer; give it with --tokenizer"
    )
    found = open_embedder(str(tmp_path / "run"), tokenizer=export).embed(["a text"], False)
    assert np.abs(found - open_embedder(export).embed(["a text"], False)).max() < 1e-6


# sentence-transformers


def test_options_that_do_not_suit_sentence_transformers(tmp_path, export, monkeypatch):
    import sentence_transformers

    name = f"st:{export}"
    assert refusal(tmp_path, lambda: open_embedder(name, tokenizer="here")) == (
        "st:TMP/export brings its own tokenizer; got --tokenizer here"
    )
    assert refusal(tmp_path, lambda: open_embedder(name, parallel=ParallelConfig(pp=2))) == (
        "st:TMP/export is whole in each process: --tp and --pp must be 1, got 1 and 2"
    )
    assert refusal(tmp_path, lambda: open_embedder(name, fp8="tensorwise")) == (
        "--fp8 is for models that Megatron computes, and st:TMP/export is not one; got tensorwise"
    )
    bert = f"st:{tiny_bert(tmp_path)}"
    assert refusal(tmp_path, lambda: open_embedder(bert, max_length=2)) == (
        "texts need room for 3 tokens at least, got --max-length 2"
    )
    assert refusal(tmp_path, lambda: open_embedder(bert, max_length=41)) == (
        "st:TMP/model knows 40 positions, got --max-length 41"
    )

    def broken(*_, **__):
        raise RuntimeError("no such model")

    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", broken)
    assert refusal(tmp_path, lambda: open_embedder(name)) == (
        "sentence-transformers cannot load TMP/export: no such model"
    )
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert refusal(tmp_path, lambda: open_embedder(name)) == (
        "st:TMP/export needs sentence-transformers: pip install nvembed_mcore[eval]"
    )


def test_a_blank_text(cases):
    for name in ("", "st:"):
        embedder = open_embedder(f"{name}{cases['mean'].folder}", trust_remote_code=bool(name))
        with pytest.raises(ValueError, match="^text 1 of 3 is empty: ' '$"):
            embedder.embed(["a", " ", "c"], True)
