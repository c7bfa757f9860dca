"""Texts with ids: every kind of file that is read, and what comes out of the memory map."""

from __future__ import annotations

import csv
import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from nvembed_mcore.evaluation import corpus as module
from nvembed_mcore.evaluation.corpus import Corpus, fingerprint_of, source_file

ROWS = [("d1", "One", "first text"), ("d2", "", "second\ntext"), ("7", "Three", "na\u00efve \u65e5\u672c")]
IDS = [row[0] for row in ROWS]
TEXTS = ["One first text", "second\ntext", "Three na\u00efve \u65e5\u672c"]


def json_lines(id_field: str) -> bytes:
    rows = [{id_field: int(key) if key == "7" else key, "title": title, "text": text} for key, title, text in ROWS]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(folder, name: str):
    path = folder / name
    if name.endswith(".parquet"):
        columns = list(zip(*ROWS, strict=True))
        pyarrow.parquet.write_table(pyarrow.table(dict(zip(("id", "title", "text"), columns, strict=True))), path)
    elif name.endswith(".csv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            rows = [("id", "title", "text"), *ROWS]
            csv.writer(file).writerows(rows)
    else:
        content = json_lines("id" if name.startswith("id.") else "_id")
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


@pytest.mark.parametrize("name", ["corpus.jsonl", "id.jsonl", "corpus.jsonl.gz", "corpus.parquet", "corpus.csv"])
def test_rows_with_ids(tmp_path, name):
    corpus = Corpus.build(write(tmp_path, name), tmp_path / "out")
    assert list(corpus.ids) == IDS and list(corpus.texts) == TEXTS and len(corpus) == 3
    assert corpus.fingerprint == fingerprint_of(IDS, TEXTS)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["texts.arrow", "texts.json"]


@pytest.mark.parametrize("name", ["texts.txt", "texts.txt.gz", "texts"])
def test_lines_are_texts_and_their_numbers_ids(tmp_path, name):
    content = "\ufefffirst  \r\n second\nthird".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    corpus = Corpus.build(tmp_path / name, tmp_path / "out")
    assert list(corpus.ids) == ["1", "2", "3"] and list(corpus.texts) == ["first  ", " second", "third"]


def test_a_beir_folder(tmp_path):
    assert source_file(tmp_path, are_queries=False) == tmp_path / "corpus.jsonl"
    assert source_file(tmp_path, are_queries=True) == tmp_path / "queries.jsonl"
    assert source_file(tmp_path / "a.txt", are_queries=True) == tmp_path / "a.txt"


def test_documents_without_text_are_left_out_and_counted(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"_id": "a", "text": " "}\n{"_id": "b", "text": "b"}\n')
    corpus = Corpus.build(tmp_path / "c.jsonl", tmp_path / "out")
    assert list(corpus.ids) == ["b"] and corpus.blank == 1


def test_places_of_many_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_ROWS", 3)
    texts = [f"text {number}" for number in range(10)]
    (tmp_path / "t.txt").write_text("\n".join(texts))
    column = Corpus.build(tmp_path / "t.txt", tmp_path / "out").texts
    assert [column[index] for index in range(10)] == texts and column[-1] == texts[-1]
    for place in (slice(None), slice(2, 8), slice(8, 99), slice(5, 5), slice(9, 0, -4)):
        assert column[place] == texts[place]
    for index in (10, -11):
        with pytest.raises(IndexError):
            column[index]


def test_a_long_text_ends_a_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 8)
    (tmp_path / "t.txt").write_text("123456789\na\nb\nc\n")
    column = Corpus.build(tmp_path / "t.txt", tmp_path / "out").texts
    assert list(column) == ["123456789", "a", "b", "c"]
    assert [len(part) for part in column._columns] == [1, 3]


def test_what_was_read_is_not_read_again(tmp_path):
    path = write(tmp_path, "corpus.jsonl")
    Corpus.build(path, tmp_path / "out")
    before = (tmp_path / "out" / "texts.arrow").stat().st_mtime_ns
    moved = path.rename(tmp_path / "elsewhere.jsonl")
    assert list(Corpus.build(moved, tmp_path / "out").ids) == IDS
    assert (tmp_path / "out" / "texts.arrow").stat().st_mtime_ns == before


def test_ids_whose_hashes_collide_are_no_duplicates(tmp_path, monkeypatch):
    """All hashes equal: only the strings tell ids apart."""
    monkeypatch.setattr(module._Ids, "add", lambda self, key, line: (self._hashes.append(1), self._lines.append(line)))
    path = write(tmp_path, "corpus.jsonl")
    assert list(Corpus.build(path, tmp_path / "out").ids) == IDS


def test_the_fingerprint_tells_ids_and_texts_apart():
    seen = {fingerprint_of(["a", "b"], ["c", "d"]), fingerprint_of(["a", "b"], ["d", "c"])}
    seen |= {fingerprint_of(["ab", "b"], ["c", "d"]), fingerprint_of(["a", "b"], ["bc", "d"])}
    assert len(seen) == 4


def test_a_text_of_ten_megabytes(tmp_path):
    text = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 10_000_000)))
    (tmp_path / "t.jsonl").write_text(json.dumps({"_id": "a", "text": text}) + "\n")
    assert Corpus.build(tmp_path / "t.jsonl", tmp_path / "out").texts[0] == text
