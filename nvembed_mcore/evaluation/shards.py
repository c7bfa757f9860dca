"""Embeddings of many texts as files of a fixed number of rows, made by any number of replicas and resumable.

    FOLDER/manifest.json       what was embedded, with what, and whether all of it is there; written first and last
           ids.jsonl           the id of each row, one JSON string a line
           shard-00000.npy     rows 0 to shard_size - 1 (or .parquet, with the columns id and embedding), and so on

Within a shard texts are sorted by length and packed as for one replica, so a shard has the same bits whoever makes it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from nvembed_mcore import device, redact
from nvembed_mcore.checkpoint.store import differences
from nvembed_mcore.evaluation.corpus import Corpus, fingerprint_of, read_json, source_file, write_json
from nvembed_mcore.evaluation.embedders import Embedder
from nvembed_mcore.parallel.groups import every_rank_does, first_rank_does, replica_does
from nvembed_mcore.progress import progress

MANIFEST, IDS = "manifest.json", "ids.jsonl"
FORMATS = ("npy", "parquet")
DTYPES = ("float32", "float16")
SHARD_SIZE = 8192
_VERSION = 1


class ShardsError(ValueError):
    """A folder of embeddings is incomplete, damaged, or of other texts or another model; the message names it."""


@dataclass(frozen=True)
class Encoded:
    """What was done. `present`: texts whose shards were there before. `tokens` and `positions` (pads included) are
    those of the others."""

    texts: int
    present: int
    tokens: int
    positions: int
    seconds: float
    dim: int


@dataclass(frozen=True)
class Shards:
    """Embeddings in order. Iterating gives float32 [rows, D] of one shard after the other, memory-mapped where the
    files are NumPy's of float32.

    Attributes:
        count, dim: rows of all shards, and D.
        shard_size: rows of each shard but the last.
        manifest: what `manifest.json` says.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def count(self) -> int:
        return self.manifest["count"]

    @property
    def dim(self) -> int:
        return self.manifest["dim"]

    @property
    def shard_size(self) -> int:
        return self.manifest["shard_size"]

    def __len__(self) -> int:
        return -(-self.count // self.shard_size)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> np.ndarray:
        if not 0 <= number < len(self):
            raise IndexError(f"shard {number} of {len(self)}")
        file = self.file_of(number)
        if self.manifest["format"] == "npy":
            rows = np.load(file, mmap_mode="r")
        else:
            column = pyarrow.parquet.read_table(file, columns=["embedding"])["embedding"].combine_chunks()
            rows = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.dim)
        return rows if rows.dtype == np.float32 else rows.astype(np.float32)

    def file_of(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.{self.manifest['format']}"

    def rows_of(self, number: int) -> int:
        """How many rows a shard has."""
        return min(self.shard_size, self.count - number * self.shard_size)

    def is_complete(self, number: int) -> bool:
        """Whether a shard is there with the rows, the width and the bytes that it must have."""
        file, shape, dtype = self.file_of(number), (self.rows_of(number), self.dim), self.manifest["dtype"]
        try:
            if self.manifest["format"] == "npy":
                rows = np.load(file, mmap_mode="r")  # compares the file's size with its header
                return rows.shape == shape and rows.dtype == dtype
            with pyarrow.parquet.ParquetFile(file) as opened:
                kind = opened.schema_arrow.field("embedding").type
                return (opened.metadata.num_rows, kind.list_size) == shape and kind.value_type == dtype
        except (OSError, EOFError, ValueError, KeyError, AttributeError, pyarrow.ArrowException):
            return False

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there, or damaged."""
        return [number for number in range(len(self)) if not self.is_complete(number)]

    def num_present(self) -> int:
        """Rows of all shards that are there."""
        return sum(self.rows_of(number) for number in range(len(self)) if self.file_of(number).is_file())

    def ids(self) -> Iterator[str]:
        """The id of each row."""
        with open(self.folder / IDS, encoding="utf-8") as file:
            yield from map(json.loads, file)


def encode_shards(
    embedder: Embedder,
    texts: Sequence[str],
    ids: Sequence[str],
    folder: str | Path,
    *,
    are_queries: bool,
    shard_size: int = SHARD_SIZE,
    format: str = "npy",
    dtype: str = "float32",
    fingerprint: str | None = None,
    what: str = "texts",
) -> Encoded:
    """Embed texts into a folder that all ranks see; every rank calls this. What is there already is kept.

    The missing shards are dealt to the replicas in turn. A replica that fails does not stop the others: they finish
    their shards, then all ranks raise what it raised, and the same call makes the rest.

    Args:
        texts, ids: of equal length, with random access; the same on every rank.
        folder: made when it is missing; must be empty or hold a part of the same embeddings.
        shard_size: rows of a file.
        format: `npy`, or `parquet` with the columns `id` and `embedding` (a fixed-size list).
        dtype: of the files, `float32` or `float16`.
        fingerprint: `fingerprint_of(ids, texts)`, where it is known as that of a `Corpus`.
        what: how the progress calls the texts.

    Raises:
        ShardsError: an argument cannot work, or the folder holds something else; the message has what differs.
        ValueError: a text is blank.
    """
    folder = Path(folder)
    start = time.perf_counter()
    wanted = _check_arguments(texts, ids, shard_size, format, dtype) | {
        "dim": embedder.dim,
        "are_queries": are_queries,
        "embedder": redact.tree(embedder.facts(are_queries)),
    }
    manifest, missing = first_rank_does(
        lambda: _begin(folder, wanted | {"texts": fingerprint or fingerprint_of(ids, texts)}, ids)
    )
    shards = Shards(folder, manifest)
    done = every_rank_does(lambda: _make_shards(embedder, texts, ids, shards, missing, what))
    first_rank_does(lambda: write_json(folder / MANIFEST, manifest | {"complete": True}))
    tokens, positions = (sum(counts) for counts in zip(*done, strict=True))
    made = sum(shards.rows_of(number) for number in missing)
    seconds = time.perf_counter() - start
    return Encoded(len(texts), len(texts) - made, tokens, positions, seconds, embedder.dim)


def open_shards(folder: str | Path) -> Shards:
    """The embeddings of a folder that `encode_shards` completed.

    Raises:
        ShardsError: there are none, they are incomplete, or a file is missing or damaged.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    if manifest is None:
        raise ShardsError(f"{folder} has no {MANIFEST}: `nvembed encode` writes one with its embeddings")
    shards = Shards(folder, manifest)
    missing = shards.missing()
    if missing:
        raise ShardsError(
            f"{folder} lacks {len(missing)} of {len(shards)} shards, or they are damaged: "
            f"{shards.file_of(missing[0]).name} is the first; the command that wrote it makes them"
        )
    if manifest.get("complete") is not True:
        raise ShardsError(f"{folder / MANIFEST} does not say that it is complete; run what wrote it once more")
    return shards


def encode_file(
    embedder: Embedder,
    source: str | Path,
    output: str | Path,
    *,
    are_queries: bool,
    shard_size: int = SHARD_SIZE,
    format: str = "npy",
    dtype: str = "float32",
) -> Encoded:
    """Embed the texts of a file, or of a BEIR folder, as `encode_shards` does; every rank calls this.

    Args:
        source: what `Corpus.build` reads, or a BEIR folder.
        output: folder of the shards, beside which the texts lie too (`Corpus.open` opens them); or a file that ends in
            `.npy`: then the shards are joined in it, and only while they are made there is a folder beside it.

    Raises:
        DataError: the texts cannot be used.
        ShardsError, ValueError: as `encode_shards`.
    """
    output = Path(output)
    is_single = output.suffix == ".npy"
    if is_single and format != "npy":
        raise ShardsError(f"{output} is to be one NumPy file, so the format must be npy, got {format!r}")
    folder = output.with_name(f"{output.name}.shards") if is_single else output
    file = source_file(source, are_queries=are_queries)
    first_rank_does(lambda: len(Corpus.build(file, folder)))
    corpus = Corpus.open(folder)
    done = encode_shards(
        embedder,
        corpus.texts,
        corpus.ids,
        folder,
        are_queries=are_queries,
        shard_size=shard_size,
        format=format,
        dtype=dtype,
        fingerprint=corpus.fingerprint,
    )
    if is_single:
        first_rank_does(lambda: _join(open_shards(folder), output))
    return done


def _join(shards: Shards, output: Path) -> None:
    """All rows as one NumPy file [rows, D] in the data type of the shards, whose folder is then removed."""
    aside = output.with_name(f".writing-{output.name}")
    shape = (shards.count, shards.dim)
    try:
        whole = np.lib.format.open_memmap(aside, mode="w+", dtype=shards.manifest["dtype"], shape=shape)
        for number, rows in enumerate(shards):
            whole[number * shards.shard_size :][: len(rows)] = rows
        whole.flush()
        os.replace(aside, output)
    finally:
        aside.unlink(missing_ok=True)
    shutil.rmtree(shards.folder)


def _check_arguments(texts, ids, shard_size: int, format: str, dtype: str) -> dict[str, Any]:
    if len(texts) != len(ids):
        raise ShardsError(f"{len(texts)} texts, but {len(ids)} ids")
    if not len(texts):
        raise ShardsError("there are no texts to embed")
    if shard_size < 1:
        raise ShardsError(f"a shard must have at least 1 row, got {shard_size}")
    if format not in FORMATS:
        raise ShardsError(f"the format of shards must be {' or '.join(FORMATS)}, got {format!r}")
    if dtype not in DTYPES:
        raise ShardsError(f"the data type of shards must be {' or '.join(DTYPES)}, got {dtype!r}")
    return {"version": _VERSION, "count": len(texts), "shard_size": shard_size, "format": format, "dtype": dtype}


def _begin(folder: Path, wanted: dict[str, Any], ids: Sequence[str]) -> tuple[dict[str, Any], list[int]]:
    """Write the manifest, or check the one that is there; returns it and the numbers of the missing shards."""
    found = _read_manifest(folder)
    if found is None:
        if folder.is_dir() and any(folder.glob("shard-*")):
            raise ShardsError(f"{folder} has shards but no {MANIFEST} that says of what; give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / f".writing-{IDS}"
        with open(aside, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(key, ensure_ascii=False) + "\n" for key in ids)
        os.replace(aside, folder / IDS)
        write_json(folder / MANIFEST, wanted | {"complete": False})
        return wanted, Shards(folder, wanted).missing()
    changed = differences({key: value for key, value in found.items() if key != "complete"}, wanted)
    if changed:
        lines = "\n  ".join(changed)
        raise ShardsError(
            f"{folder} holds other embeddings; different are (there -> now):\n  {lines}\n"
            f"Set these back, or give another folder"
        )
    for leftover in folder.glob(".writing-*"):
        leftover.unlink()
    return wanted, Shards(folder, wanted).missing()


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    file = folder / MANIFEST
    if not file.is_file():
        return None
    found = read_json(file)
    if found.get("version") != _VERSION:
        raise ShardsError(f"{file} is of version {found.get('version')}, this program reads {_VERSION}")
    # They become names and sizes of files.
    for name, known in (("format", FORMATS), ("dtype", DTYPES)):
        if found.get(name) not in known:
            raise ShardsError(f"{file}: {name} must be {' or '.join(known)}, got {found.get(name)!r}")
    for name in ("count", "dim", "shard_size"):
        if type(found.get(name)) is not int or found[name] < 1:
            raise ShardsError(f"{file}: {name} must be an integer of at least 1, got {found.get(name)!r}")
    return found


def _make_shards(embedder: Embedder, texts, ids, shards: Shards, missing: list[int], what: str) -> tuple[int, int]:
    """This replica's part of the missing shards; returns what its writer counted, tokens and positions."""
    start, tokens, positions = time.perf_counter(), embedder.tokens, embedder.positions
    with progress(f"embed {what}", shards.count, "texts", start=shards.num_present()) as shown:
        for number in missing[embedder.replica :: embedder.num_replicas]:
            _make_shard(embedder, texts, ids, shards, number)
            # Packs differ in length, so on a CPU the heap fills with gaps and grows unless released.
            device.release_unused_memory()
            # All replicas are taken to be as fast as this one.
            rate = (embedder.tokens - tokens) / (time.perf_counter() - start) * embedder.num_replicas
            shown.update(shards.num_present(), f"{rate:,.0f} tokens/s")
    if not embedder.is_writer:
        return 0, 0
    return embedder.tokens - tokens, embedder.positions - positions


def _make_shard(embedder: Embedder, texts, ids, shards: Shards, number: int) -> None:
    """Embed and write one shard; all processes of a replica call this."""
    begin = number * shards.shard_size
    end = begin + shards.rows_of(number)
    rows = embedder.embed(list(texts[begin:end]), shards.manifest["are_queries"])

    def write() -> None:
        if rows is not None:
            file = shards.file_of(number)
            aside = file.with_name(f".writing-{file.name}")
            values = rows.astype(shards.manifest["dtype"], copy=False)
            _write_rows(aside, values, ids[begin:end], shards.manifest["format"])
            os.replace(aside, file)

    # A full disk stops all processes of the replica, and none waits for the next shard.
    replica_does(write)


def _write_rows(file: Path, rows: np.ndarray, ids: Sequence[str], format: str) -> None:
    if format == "npy":
        with open(file, "wb") as opened:
            np.save(opened, rows)
        return
    values = pyarrow.array(rows.reshape(-1))
    embeddings = pyarrow.FixedSizeListArray.from_arrays(values, rows.shape[1])
    table = pyarrow.table({"id": pyarrow.array(ids, pyarrow.string()), "embedding": embeddings})
    # Vectors do not compress, and repeated numbers are rare.
    pyarrow.parquet.write_table(table, file, compression="none", use_dictionary=False)
