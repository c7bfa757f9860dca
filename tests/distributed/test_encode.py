"""Encoding in several processes: the bits of any number of replicas, the numbers of any layout, and of training."""

from __future__ import annotations

import contextlib
import dataclasses
import io

import numpy as np
import pytest

from nvembed_mcore.build import build_model, read_architecture
from nvembed_mcore.checkpoint.export_run import export_run
from nvembed_mcore.cli import main
from nvembed_mcore.config import LoraConfig, ParallelConfig
from nvembed_mcore.data.tokenizer import load_tokenizer
from nvembed_mcore.evaluation.corpus import Corpus
from nvembed_mcore.evaluation.embedders import PackedEmbedder, open_embedder
from nvembed_mcore.evaluation.encode import tokenize
from nvembed_mcore.evaluation.shards import encode_file, open_shards
from nvembed_mcore.parallel.groups import initialize
from nvembed_mcore.schedule import embed_texts
from nvembed_mcore.train import train
from tests.helpers import runs

BUDGET, SHARD_SIZE = 100, 7
TEXTS = [f"{runs.WORDS[i % 19]} " * (1 + i * 7 % 20) + f"number {i}" for i in range(40)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return runs.write_inputs(tmp_path_factory.mktemp("inputs"))


def config_of(inputs, run_dir, lora: LoraConfig | None = None):
    config = runs.run_config(inputs, run_dir, steps=2)
    model = dataclasses.replace(config.model, lora=lora or config.model.lora)
    return dataclasses.replace(config, model=model, eval=dataclasses.replace(config.eval, path=None))


@pytest.fixture(scope="module")
def run_dir(world, inputs, tmp_path_factory):
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    world(2).run(train, config_of(inputs, folder))
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("\n".join(TEXTS), encoding="utf-8")
    return file


def encode(model, texts, folder, *, tp=1, pp=1, cp=1, chunks=1, are_queries=False, fail_after=None):
    """On every rank; returns what each says of itself."""
    parallel = ParallelConfig(tp=tp, pp=pp, cp=cp, chunks_per_stage=chunks, timeout_minutes=1)
    embedder = open_embedder(str(model), parallel=parallel, token_budget=BUDGET)
    if fail_after is not None and embedder.replica == embedder.num_replicas - 1:
        _fail_after(embedder, fail_after)
    done = encode_file(embedder, texts, folder, are_queries=are_queries, shard_size=SHARD_SIZE)
    return (embedder.replica, embedder.is_writer), dataclasses.replace(done, seconds=0.0)


def _fail_after(embedder: PackedEmbedder, calls: int) -> None:
    """The writer of a replica finds a full disk."""
    whole, count = embedder.embed, iter(range(calls))

    def embed(texts, is_query):
        rows = whole(texts, is_query)
        if next(count, None) is None and rows is not None:
            return FullDisk()
        return rows

    embedder.embed = embed


class FullDisk:
    def astype(self, *_, **__):
        raise OSError("No space left on device")


def training_time(config, are_queries):
    """What a run that trains says of the texts, through `schedule.embed_texts` on all ranks."""
    groups = initialize(config.parallel)
    model = dataclasses.replace(config.model, config=None, init_from=config.run_dir)
    chunks = build_model(dataclasses.replace(config, model=model), read_architecture(model), groups)
    data = config.data
    instruction, limit = ("Find it", data.max_query_tokens) if are_queries else ("", data.max_document_tokens)
    rows = tokenize(load_tokenizer(data.tokenizer), TEXTS, instruction, limit)
    return embed_texts(chunks, groups, rows, 333).numpy()


def rows_of(folder) -> np.ndarray:
    return np.concatenate(list(open_shards(folder)))


def shard_bytes(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def alone(world, run_dir, texts, tmp_path_factory):
    """Shards that one process made."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    ((where, done),) = world(1).run(encode, run_dir, texts, folder)
    assert where == (0, True) and (done.texts, done.present, done.dim) == (40, 0, 32)
    assert done.tokens == done.positions > 300
    return folder


def test_any_number_of_replicas_makes_the_same_files(world, run_dir, texts, alone, tmp_path):
    (first, done), (second, _) = world(2).run(encode, run_dir, texts, tmp_path / "out")
    assert (first, second) == ((0, True), (1, True)) and done.tokens > 300
    assert shard_bytes(tmp_path / "out") == shard_bytes(alone)
    assert list(Corpus.open(alone).texts) == TEXTS


@pytest.mark.parametrize(
    ("size", "layout", "writers"),
    [
        (2, {"tp": 2}, [(0, True), (0, False)]),
        (2, {"pp": 2}, [(0, False), (0, True)]),
        (2, {"pp": 2, "chunks": 2}, [(0, False), (0, True)]),
        (2, {"cp": 2}, [(0, True), (0, False)]),
        (4, {"tp": 2}, [(0, True), (0, False), (1, True), (1, False)]),
    ],
)
def test_any_layout_has_the_same_numbers(world, run_dir, texts, alone, tmp_path, size, layout, writers):
    results = world(size).run(encode, run_dir, texts, tmp_path / "out", **layout)
    assert [where for where, _ in results] == writers
    assert len({done for _, done in results}) == 1
    assert np.abs(rows_of(tmp_path / "out") - rows_of(alone)).max() < 1e-6
    manifests = [(folder / "manifest.json").read_text() for folder in (alone, tmp_path / "out")]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2, alpha=8.0, dropout=0.3)], ids=["full", "lora"])
def test_numbers_of_training_and_of_the_export(world, inputs, run_dir, texts, tmp_path, lora):
    """A run's folder, the model that goes on training, and the export, whose adapters are merged."""
    config = config_of(inputs, tmp_path / "run" if lora else run_dir, lora)
    if lora:
        world(2).run(train, config)
    export_run(config.run_dir, str(tmp_path / "export"), dtype="float32", instruction=None)
    for are_queries in (False,) if lora else (False, True):
        expected = world(2).run(training_time, config, are_queries)[0]
        name = "queries" if are_queries else "documents"
        for model in (config.run_dir, tmp_path / "export"):
            if are_queries and model != config.run_dir:
                continue  # an export has one limit, a run has one for queries
            world(2).run(encode, model, texts, tmp_path / f"{name}-{model == config.run_dir}", are_queries=are_queries)
            found = rows_of(tmp_path / f"{name}-{model == config.run_dir}")
            assert np.abs(found - expected).max() < (2e-6 if model == config.run_dir else 1e-5)
            assert (found * expected).sum(1).min() > 1 - 1e-5


@pytest.mark.parametrize(("size", "layout"), [(2, {}), (2, {"pp": 2}), (2, {"cp": 2})])
def test_an_error_reaches_every_rank_and_the_rest_is_made_later(world, run_dir, texts, alone, tmp_path, size, layout):
    failed = world(size).run(message_of_failure, run_dir, texts, tmp_path / "out", layout)
    assert failed == ["No space left on device"] * size
    # Of six shards the failing replica made one; another replica went on with its own.
    made = sorted(path.name for path in (tmp_path / "out").glob("shard-*"))
    assert made == [f"shard-0000{number}.npy" for number in ((0, 1, 2, 4) if not layout else (0,))]
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    results = world(size).run(encode, run_dir, texts, tmp_path / "out", **layout)
    assert all(done.present == 7 * len(made) for _, done in results)
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in times.items())
    assert np.abs(rows_of(tmp_path / "out") - rows_of(alone)).max() < 1e-6
    assert not list((tmp_path / "out").glob(".writing*"))


def message_of_failure(run_dir, texts, folder, layout):
    try:
        encode(run_dir, texts, folder, fail_after=1, **layout)
    except OSError as error:
        return str(error)


def run_command(arguments) -> tuple[int, str]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = main(list(map(str, arguments)))
    return status, output.getvalue()


def test_the_command_on_two_ranks(world, run_dir, texts, alone, tmp_path):
    """With the variables that torchrun sets."""
    options = ["--shard-size", SHARD_SIZE, "--tokens-per-pack", BUDGET]
    command = ["encode", run_dir, texts, tmp_path / "out", *options]
    (status, said), other = world(2).run(run_command, command)
    assert status == 0 and other == (0, "")
    first, second = said.splitlines()
    assert first == f"40 texts, 32 dimensions: {tmp_path / 'out'}"
    assert second.startswith("40 texts, ") and second.endswith(" tokens/s, 0.0% padding")
    assert shard_bytes(tmp_path / "out") == shard_bytes(alone)
    (_, said), _ = world(2).run(run_command, command)
    assert said == f"40 texts, 32 dimensions: {tmp_path / 'out'} (40 were there before)\n"
