"""What `nvembed mine` refuses: exit status 78, one message, and no records."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from nvembed_mcore.cli import main, mine
from nvembed_mcore.data.files import hash_of_file
from nvembed_mcore.mining.approximate import build_index
from tests.helpers.mining import WordEmbedder, make_data, write_json_lines

METHODS = "topk-percpos, topk-marginpos, topk-abs, topk"

OPTIONS = {
    "--method best": f"--method must be one of {METHODS}, got 'best'",
    "--sampling best": "--sampling must be one of top, random, got 'best'",
    "--percent 0": "--percent must be above 0 and at most 1, got 0.0",
    "--percent 95": "--percent must be above 0 and at most 1, got 95.0",
    "--percent nan": "--percent must be above 0 and at most 1, got nan",
    "--margin -0.1": "--margin must be between 0 and 2, got -0.1",
    "--max-score 70": "--max-score must be a cosine, between -1 and 1, got 70.0",
    "--negatives 0": "--negatives must be at least 1, got 0",
    "--range 5 5": "--range must be 0 <= MIN < MAX, got 5 5",
    "--range -1 5": "--range must be 0 <= MIN < MAX, got -1 5",
    "--range 0 200 --depth 100": "--range ends at rank 200, beyond --depth 100",
    "--range 0 5": "--negatives 7 is more than the 5 ranks of --range and --depth",
    "--depth 0": "--depth must be at least 1, got 0",
    "--depth 6": "--negatives 7 is more than the 6 ranks of --range and --depth",
    "--shard-size 0": "--shard-size must be at least 1, got 0",
    "--suspects -1": "--suspects must be at least 0, got -1",
    "--index IVF0x": "--index IVF0x: FAISS knows no such index",
    # 300 lists want as many documents, and 64 dimensions cannot be cut into 7 parts.
    "--index IVF300,Flat": "--index IVF300,Flat cannot be trained on 244 documents",
    "--index PQ7": "--index PQ7: FAISS makes no such index for 64 dimensions",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The command with a model of words, and its data."""
    monkeypatch.setattr(mine, "open_named", lambda arguments: WordEmbedder())
    records, corpus = make_data()
    write_json_lines(tmp_path / "records.jsonl", records)
    write_json_lines(tmp_path / "corpus.jsonl", corpus)
    return tmp_path


def refusal_of(capsys, folder: Path, *options: str) -> str:
    """The message of a command that must be refused, with the folder's path taken out."""
    arguments = ["words", folder / "records.jsonl", folder / "out", "--corpus", folder / "corpus.jsonl", *options]
    assert main(["mine", *map(str, arguments)]) == 78
    assert not (folder / "out" / "records.jsonl").exists()
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("nvembed: error: ")
    return printed.err.removeprefix("nvembed: error: ").removesuffix("\n").replace(str(folder), "DIR")


@pytest.mark.parametrize("options", list(OPTIONS))
def test_options(capsys, folder, options):
    assert refusal_of(capsys, folder, *options.split()) == OPTIONS[options]


def test_an_id_that_names_two_texts(capsys, folder):
    write_json_lines(folder / "records.jsonl", [
        {"query": "a", "pos": ["b"], "neg": [], "pos_ids": ["d1"]},
        {"query": "c", "pos": ["d"], "neg": [], "pos_ids": ["d1"]},
    ])  # fmt: skip
    arguments = ["mine", "words", str(folder / "records.jsonl"), str(folder / "out")]
    assert main(arguments) == 78
    expected = "DIR/records.jsonl: the id 'd1' names two texts; give the documents with --corpus"
    assert capsys.readouterr().err.replace(str(folder), "DIR") == f"nvembed: error: {expected}\n"
    assert list((folder / "out" / "work" / "inputs").iterdir()) == []


@pytest.mark.parametrize("records", ["out/records.jsonl", "out"])
def test_an_output_among_the_records(capsys, folder, records):
    (folder / "out").mkdir()
    (folder / "records.jsonl").rename(folder / "out" / "records.jsonl")
    before = (folder / "out" / "records.jsonl").read_bytes()
    assert main(["mine", "words", str(folder / records), str(folder / "out" / ".." / "out")]) == 78
    expected = (
        f"nvembed: error: DIR/out/../out/records.jsonl would be written among the records that are mined for, "
        f"DIR/{records}; give another OUTPUT\n"
    )
    assert capsys.readouterr().err.replace(str(folder), "DIR") == expected
    assert (folder / "out" / "records.jsonl").read_bytes() == before


@pytest.mark.parametrize("damage", ["short", "other"])
def test_an_index_that_is_not_of_the_documents(capsys, folder, damage):
    arguments = ["words", folder / "records.jsonl", folder / "out", "--corpus", folder / "corpus.jsonl"]
    assert main(["mine", *map(str, arguments), "--index", "Flat"]) == 0
    (folder / "out" / "records.jsonl").unlink()
    (index,) = (folder / "out" / "work").glob("*.faiss")
    if damage == "short":
        had, _ = hash_of_file(index), index.write_bytes(index.read_bytes()[:-100])
        expected = (
            f"is not the index that was written: its SHA-256 is {hash_of_file(index)}, {index.name}.sha256 says "
            f"{had}; remove it, and it is made again"
        )
    else:
        build_index([np.ones((3, 64), np.float32)], "Flat", index)
        expected = "is an index of 3 documents in 64 dimensions, there are 244 in 64; remove it, and it is made again"
    capsys.readouterr()
    assert refusal_of(capsys, folder, "--index", "Flat") == f"DIR/out/work/{index.name} {expected}"


def test_faiss_that_is_not_installed(capsys, folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "faiss" else find(name))
    expected = "--index HNSW32 needs FAISS: pip install 'nvembed_mcore[mine]', or use --index exact"
    assert refusal_of(capsys, folder, "--index", "HNSW32") == expected
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("query", "record 6: the embedding of its query or of a positive is not finite"),
        ("document", "document embedding 5 is not finite"),
    ],
)
def test_an_embedding_that_is_not_finite(capsys, folder, monkeypatch, text, message):
    records, corpus = make_data()
    bad = {"query": records[5]["query"], "document": "theta nu"}[text]
    corpus[5]["text"] = "theta nu"  # no record's
    write_json_lines(folder / "corpus.jsonl", corpus)

    class Broken(WordEmbedder):
        def embed(self, texts, is_query):
            rows = super().embed(texts, is_query)
            rows[[one == bad and is_query == (text == "query") for one in texts]] = np.nan
            return rows

    monkeypatch.setattr(mine, "open_named", lambda arguments: Broken())
    assert refusal_of(capsys, folder) == message


OTHER = {
    "model": (
        "DIR/out/work/documents holds other embeddings; different are (there -> now):\n"
        "  embedder.weights: 'words' -> 'letters'\nSet these back, or give another folder"
    ),
    "records": (
        "DIR/out/work/queries holds other embeddings; different are (there -> now):\n"
        "  count: 30 -> 29\n  texts: 'HASH' -> 'HASH'\nSet these back, or give another folder"
    ),
    "corpus": (
        "DIR/out/work/inputs/documents holds the texts of DIR/corpus.jsonl with SHA-256 HASH, that of "
        "DIR/corpus.jsonl is HASH; give another folder"
    ),
    "shard size": (
        "DIR/out/work/documents holds other embeddings; different are (there -> now):\n"
        "  shard_size: 8192 -> 99\nSet these back, or give another folder"
    ),
}


@pytest.mark.parametrize("what", list(OTHER))
def test_a_folder_with_the_work_of_something_else(capsys, folder, monkeypatch, what):
    records, corpus = make_data()
    arguments = ["words", folder / "records.jsonl", folder / "out", "--corpus", folder / "corpus.jsonl"]
    assert main(["mine", *map(str, arguments)]) == 0
    (folder / "out" / "records.jsonl").unlink()
    if what == "model":
        monkeypatch.setattr(mine, "open_named", lambda arguments: WordEmbedder("letters"))
    elif what == "records":
        write_json_lines(folder / "records.jsonl", records[1:])
    elif what == "corpus":
        write_json_lines(folder / "corpus.jsonl", corpus[1:])
    capsys.readouterr()
    options = ["--shard-size", "99"] if what == "shard size" else []
    assert re.sub("[0-9a-f]{64}", "HASH", refusal_of(capsys, folder, *options)) == OTHER[what]
