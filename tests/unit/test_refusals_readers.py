"""What the readers refuse, word by word; `{path}` is the folder of the test."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from nvembed_mcore.data import files
from nvembed_mcore.data.layouts import KNOWN
from nvembed_mcore.data.records import DataError, read_records
from nvembed_mcore.data.sources import source_fingerprint

GOOD = '{"query": "q", "pos": ["p"]}\n'
NAMES = "a data file ends in .jsonl, .json, .csv, .tsv or .parquet; of text also in .gz, .bz2, .xz or .zst behind that"
BAD_LINE = "{path}/a.%s has 1 bad line:\n  {path}/a.%s:"
SCORED = "so they may not belong together: make records of them with `nvembed data convert sts` or " + (
    "`nvembed data convert nli`"
)
V2 = '{"query_text": "q", "positive_document_ids": ["d"]}\n'
BEIR = {"corpus.jsonl": '{"_id": "d", "text": "x"}\n', "queries.jsonl": '{"_id": "q", "text": "x"}\n'}

REFUSALS = {
    # what a path is
    "missing": ({}, "a.csv", "no data file at {path}/a.csv"),
    "unknown": ({"a.txt": GOOD}, "a.txt", "{path}/a.txt: " + NAMES),
    "packed Parquet": ({"a.parquet.gz": GOOD}, "a.parquet.gz", "{path}/a.parquet.gz: " + NAMES),
    "list": (
        {"a.json": '[\n {"query": "q"}]'},
        "a.json",
        "{path}/a.json holds one JSON list, not JSON Lines: write each item of it in a line of its own",
    ),
    "cut": ({"a.jsonl.zst": GOOD}, "a.jsonl.zst", "cannot read {path}/a.jsonl.zst: Truncated compressed stream"),
    "no folder": ({"x/README": ""}, "x", "{path}/x holds no data file, nor BEIR's files, nor what datasets wrote"),
    "kinds": (
        {"x/a.csv": "", "x/a.jsonl": "", "x/b.jsonl.gz": ""},
        "x",
        "{path}/x holds files of several kinds (a.csv, b.jsonl.gz): name one file, or a folder of one of them",
    ),
    "splits behind a name": (
        {"x/a-Train.csv": "query,pos\n", "x/a-test.csv": "query,pos\n"},
        "x",
        "{path}/x holds files of several splits (a-Train.csv, a-test.csv): name one file, or a folder of one of them",
    ),
    "splits": (
        {"x/train-0.csv": "", "x/train-1.csv": "", "x/test.csv": ""},
        "x",
        "{path}/x holds files of several splits (test.csv, train-1.csv): name one file, or a folder of one of them",
    ),
    "no judgements": (
        BEIR,
        "",
        "no data file at {path}/qrels/train.tsv: a BEIR folder is trained on by its training judgements",
    ),
    "judgements of other documents": (
        BEIR | {"qrels/train.tsv": "q\tgone\t1\nq\tlost\t0\n"},
        "",
        "none of the 2 documents that {path}/qrels judges is in {path}/corpus.jsonl",
    ),
    "judgements that are none": (
        BEIR | {"qrels/train.tsv": "query-id\tcorpus-id\tscore\nq d 1\np\td\t1\nq\td\t1.0\n"},
        "",
        "{path}/qrels/train.tsv has 3 bad lines:\n"
        "  {path}/qrels/train.tsv:2:1: 1 columns, not query-id, corpus-id and score with tabs between\n"
        "  {path}/qrels/train.tsv:3:1: query 'p' is not in queries.jsonl\n"
        "  {path}/qrels/train.tsv:4:5: the score must be a whole number, got '1.0'",
    ),
    "nested too deeply": (
        {"a.jsonl": GOOD + "[" * 100_000},
        "a.jsonl",
        BAD_LINE % ("jsonl", "jsonl")
        + "2:1: not usable JSON: maximum recursion depth exceeded while decoding a JSON array from a unicode string",
    ),
    "no corpus": (
        {"x/train.jsonl": V2},
        "x/train.jsonl",
        "{path}/x/train.jsonl names documents by id, and there is no corpus.jsonl (or .parquet, ...) in {path}/x",
    ),
    "empty": ({"a.csv": "query,pos\n"}, "a.csv", "{path}/a.csv holds no records"),
    # layouts
    "unknown fields": (
        {"a.jsonl": '{"text": "x", "label": 1}\n'},
        "a.jsonl",
        "{path}/a.jsonl:1:1: the fields are text, label; a layout is known of\n" + KNOWN,
    ),
    "no fields": (
        {"a.jsonl": "\n{}\n"},
        "a.jsonl",
        "{path}/a.jsonl:2:1: the fields are none; a layout is known of\n" + KNOWN,
    ),
    "sts": (
        {"a.csv": "sentence1,sentence2,score\na,b,0.5\n"},
        "a.csv",
        "{path}/a.csv:2:5: sentence1 and sentence2 have a field score, " + SCORED,
    ),
    "nli": (
        {"a.jsonl": '{"premise": "a", "hypothesis": "b", "label": 2}\n'},
        "a.jsonl",
        "{path}/a.jsonl:1:46: premise and hypothesis have a field label, " + SCORED,
    ),
    "scored answers": (
        {"a.tsv": "question\tanswer\tlabel\na\tb\t0\n"},
        "a.tsv",
        "{path}/a.tsv:2:5: question and answer have a field label, " + SCORED,
    ),
    "two queries": (
        {"a.jsonl": '{"query": "q", "question": "q", "positive": "p"}\n'},
        "a.jsonl",
        "{path}/a.jsonl:1:1: more than one field may be the query: query, question; keep one of them",
    ),
    "two positives": (
        {"a.jsonl": '{"question": "q", "answer": "a", "passage": "p"}\n'},
        "a.jsonl",
        "{path}/a.jsonl:1:1: more than one field may be the positive: answer, passage; keep one of them",
    ),
    "many strings": (
        {"a.jsonl": '["a", "b", "c", "d"]\n'},
        "a.jsonl",
        "{path}/a.jsonl:1:1: a list of 4 strings: of two it is query, positive, of three negative too",
    ),
    # CSV and TSV
    "header twice": (
        {"a.csv": "query,pos,query\n"},
        "a.csv",
        "{path}/a.csv:1:11: the header: two columns are named 'query'",
    ),
    "header blank": ({"a.tsv": "query\t\tpos\n"}, "a.tsv", "{path}/a.tsv:1:7: the header: a column has no name"),
    "header bytes": (
        {"a.csv": b"query,caf\xe9\n"},
        "a.csv",
        "{path}/a.csv:1:10: the header: not UTF-8: byte 9 of the file is 0xe9 (unexpected end of data)",
    ),
    "header quote": (
        {"a.csv": 'query,"pos" x\n'},
        "a.csv",
        "{path}/a.csv:1:12: the header: there is text behind the quote that closes this cell",
    ),
    "cells": (
        {"a.csv": "query,pos\nq,p\nq\n"},
        "a.csv",
        BAD_LINE % ("csv", "csv") + "3:1: 1 cells, where the header has 2 columns",
    ),
    "quote": (
        {"a.csv": 'query,pos\nq,"p\nq,p\n'},
        "a.csv",
        BAD_LINE % ("csv", "csv") + "2:3: pos: the quote that opens this cell is not closed",
    ),
    "quote and columns": (
        {"a.csv": 'query,pos\n"q,p\nq,p\n'},
        "a.csv",
        BAD_LINE % ("csv", "csv") + "2:1: 1 cells, where the header has 2 columns; "
        "the quote that opens the last one is not closed",
    ),
    "behind a quote": (
        {"a.csv": 'query,pos\nq,"a\nb" c\n'},
        "a.csv",
        BAD_LINE % ("csv", "csv") + "3:3: pos: there is text behind the quote that closes this cell",
    ),
    "cell bytes": (
        {"a.tsv": "query\tpos\né\tp".encode() + b"\xff\n"},
        "a.tsv",
        BAD_LINE % ("tsv", "tsv") + "2:4: pos: not UTF-8: byte 14 of the file is 0xff (invalid start byte)",
    ),
    "list in a cell": (
        {"a.tsv": "query\tpos\nq\t[1] Smith\n"},
        "a.tsv",
        BAD_LINE % ("tsv", "tsv") + "2:3: pos: begins with [ but is no JSON list (Extra data); "
        "a text that begins so must stand in a list",
    ),
    "NUL": (
        {"a.csv": "query,pos\nq,p\0\n"},
        "a.csv",
        BAD_LINE % ("csv", "csv") + "2:3: pos[0] holds a NUL character (U+0000) at character 2",
    ),
    "surrogate": (
        {"a.csv": 'query,pos\nq,"[""\\ud800""]"\n'},
        "a.csv",
        BAD_LINE % ("csv", "csv") + "2:3: pos[0] holds a lone surrogate (U+D800) at character 1",
    ),
    "empty query": ({"a.csv": "query,pos\n,p\n"}, "a.csv", BAD_LINE % ("csv", "csv") + "2:1: query is empty"),
    # datasets
    "too many parts": (
        {},
        "hf:a:b:c:d",
        "hf:a:b:c:d: not hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT",
    ),
}


def build(folder, contents):
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = content.encode() if isinstance(content, str) else content
        if name.endswith(".zst"):
            content = pyarrow.compress(content, codec="zstd", asbytes=True)[:-3]
        path.write_bytes(content)


def refusal(source, call=read_records):
    with pytest.raises(DataError) as caught:
        list(call(source))
    return str(caught.value)


@pytest.mark.parametrize("contents,name,message", REFUSALS.values(), ids=REFUSALS)
def test_refusals(tmp_path, contents, name, message):
    build(tmp_path, contents)
    source = name if name.startswith("hf:") else tmp_path / name
    assert refusal(source).replace(str(tmp_path), "{path}") == message


def test_a_quote_that_nobody_closes_is_not_read_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 10)
    monkeypatch.setattr(files, "_LONGEST_ROW", 50)
    path = tmp_path / "a.csv"
    path.write_text('query,pos\nq,p\nq,"p' + "\nq,p" * 30)
    message = f"{path}:3:1: a row of more than 50 bytes: a quote in it is not closed"
    assert refusal(path) == message


def test_a_line_that_does_not_end_is_not_read_to_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 10)
    monkeypatch.setattr(files, "_LONGEST_LINE", 50)
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "q", "pos": ["p"]}\n' + "[" * 1000)
    assert refusal(path) == f"{path}:2:1: a line of more than 50 bytes"


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_dict({"query_text": ["q"], "positive_document_ids": [["d"]]})
    rows.save_to_disk(tmp_path / "ids")
    other = datasets.Dataset.from_dict({"text": ["q"], "label": [1]})
    other.save_to_disk(tmp_path / "other")
    datasets.DatasetDict(dev=other, test=other).save_to_disk(tmp_path / "splits")
    return tmp_path


@pytest.mark.parametrize(
    "name,message",
    [
        (
            "ids",
            "{path}/ids names documents by id: save it as a file beside a corpus.jsonl (or .parquet, ...)",
        ),
        ("other", "{path}/other: the fields are text, label; a layout is known of\n" + KNOWN),
        ("splits", "{path}/splits has no split 'train' but dev, test: name one as hf:NAME:CONFIG:SPLIT"),
    ],
)
def test_refusals_of_what_datasets_loads(saved, name, message):
    assert refusal(saved / name).replace(str(saved), "{path}") == message


def test_names_that_datasets_cannot_load(tmp_path):
    """The reason is the library's own; a split of a local folder is ours."""
    assert refusal(f"hf:{tmp_path}/none").startswith(f"cannot load hf:{tmp_path}/none with datasets: ")
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("raise SystemExit('it was run')\n")
    assert refusal(f"hf:{tmp_path}/script").startswith(f"cannot load hf:{tmp_path}/script with datasets: ")
    (tmp_path / "state.json").write_text("{}")
    assert refusal(tmp_path).startswith(f"cannot load {tmp_path} with datasets: ")


def test_fingerprints_of_what_is_not_there(tmp_path):
    path = tmp_path / "none.parquet"
    assert refusal(path, source_fingerprint) == f"no data file at {path}"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    assert refusal(tmp_path / "a.jsonl", source_fingerprint).startswith(
        f"{tmp_path}/a.jsonl:1:1: the fields are text;"
    )
