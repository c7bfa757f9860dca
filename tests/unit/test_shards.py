"""Sharded embeddings in one process: files, order, resuming. Several processes: tests/distributed/test_encode.py."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pyarrow.parquet
import pytest

from nvembed_mcore.config import ParallelConfig
from nvembed_mcore.evaluation.shards import encode_file, encode_shards, open_shards
from nvembed_mcore.parallel.groups import initialize, shutdown

TEXTS = [f"text number {number}" for number in range(10)]
IDS = [f'id "{number}"\u00fc' for number in range(10)]


class Hashes:
    """An embedder whose vector of a text is made of its hash; it may fail after so many calls."""

    dim, num_replicas, replica, is_writer = 8, 1, 0, True

    def __init__(self, calls: int = 99) -> None:
        self.calls, self.asked, self.tokens, self.positions = calls, [], 0, 0

    def embed(self, texts: list[str], is_query: bool) -> np.ndarray:
        if len(self.asked) == self.calls:
            raise OSError("the power went out")
        self.asked.append(len(texts))
        self.tokens += len(texts)
        self.positions += 2 * len(texts)
        return np.stack([expected(text, is_query) for text in texts])

    def facts(self, is_query: bool) -> dict:
        return {"weights": "abc", "prompt": "query: " if is_query else ""}


def expected(text: str, is_query: bool = False) -> np.ndarray:
    digest = hashlib.sha256(f"{is_query} {text}".encode()).digest()
    return np.frombuffer(digest, np.uint8)[:8].astype(np.float32) / 255


@pytest.fixture(scope="module", autouse=True)
def groups():
    yield initialize(ParallelConfig())
    shutdown()


def encode(folder, embedder=None, **changes):
    how = {"are_queries": False, "shard_size": 4} | changes
    return encode_shards(embedder or Hashes(), TEXTS, IDS, folder, **how)


@pytest.mark.parametrize("format", ["npy", "parquet"])
@pytest.mark.parametrize("are_queries", [False, True])
def test_rows_are_in_order(tmp_path, format, are_queries):
    done = encode(tmp_path / "out", format=format, are_queries=are_queries)
    assert (done.texts, done.present, done.tokens, done.positions, done.dim) == (10, 0, 10, 20, 8)
    shards = open_shards(tmp_path / "out")
    assert (shards.count, shards.dim, shards.shard_size, len(shards)) == (10, 8, 4, 3)
    assert [len(rows) for rows in shards] == [4, 4, 2]
    assert all(rows.dtype == np.float32 for rows in shards)
    np.testing.assert_array_equal(np.concatenate(list(shards)), [expected(text, are_queries) for text in TEXTS])
    assert list(shards.ids()) == IDS
    names = [f"shard-0000{number}.{format}" for number in range(3)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ids.jsonl", "manifest.json", *names]


def test_numpy_shards_are_mapped_and_parquet_has_ids(tmp_path):
    encode(tmp_path / "npy")
    assert isinstance(open_shards(tmp_path / "npy")[0], np.memmap)
    encode(tmp_path / "parquet", format="parquet")
    table = pyarrow.parquet.read_table(tmp_path / "parquet" / "shard-00002.parquet")
    assert table["id"].to_pylist() == IDS[8:]
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[8]"
    np.testing.assert_array_equal(np.stack(table["embedding"].to_numpy()), [expected(text) for text in TEXTS[8:]])


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_half_precision(tmp_path, format):
    encode(tmp_path / "out", format=format, dtype="float16")
    rows = np.concatenate(list(open_shards(tmp_path / "out")))
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, np.stack([expected(text) for text in TEXTS]).astype(np.float16))


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_after_a_failure_only_the_missing_shards_are_made(tmp_path, format):
    encode(tmp_path / "straight", format=format)
    with pytest.raises(OSError, match="the power went out"):
        encode(tmp_path / "out", Hashes(calls=2), format=format)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["complete"] is False
    embedder = Hashes()
    done = encode(tmp_path / "out", embedder, format=format)
    assert embedder.asked == [2] and (done.present, done.tokens) == (8, 2)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


@pytest.mark.parametrize("damage", ["gone", "short", "empty", "other shape", "other type"])
@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_a_damaged_shard_is_made_again(tmp_path, format, damage):
    encode(tmp_path / "out", format=format)
    before, shard = contents(tmp_path / "out"), tmp_path / "out" / f"shard-00001.{format}"
    if damage == "gone":
        shard.unlink()
    elif damage in ("short", "empty"):
        shard.write_bytes(shard.read_bytes()[: -len(shard.read_bytes()) // 3 if damage == "short" else 0])
    else:
        encode(tmp_path / "other", format=format, **({"shard_size": 3} if "shape" in damage else {"dtype": "float16"}))
        shard.write_bytes((tmp_path / "other" / shard.name).read_bytes())
    embedder = Hashes()
    encode(tmp_path / "out", embedder, format=format)
    assert embedder.asked == [4] and contents(tmp_path / "out") == before


def test_what_is_complete_is_left_alone(tmp_path):
    encode(tmp_path / "out")
    embedder = Hashes()
    done = encode(tmp_path / "out", embedder)
    assert embedder.asked == [] and done.present == 10


def test_a_file_becomes_one_array(tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    encode_file(Hashes(), tmp_path / "texts.txt", tmp_path / "out.npy", are_queries=True, shard_size=4)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), [expected(text, True) for text in TEXTS])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", "texts.txt"]
    encode_file(Hashes(), tmp_path / "texts.txt", tmp_path / "out", are_queries=False)
    assert list(open_shards(tmp_path / "out").ids()) == [str(number) for number in range(1, 11)]
