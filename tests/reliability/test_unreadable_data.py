"""A token store that cannot be read while a run goes on: the run ends with the file's name, and never by a signal."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from nvembed_mcore.checkpoint.store import find_checkpoint
from nvembed_mcore.config import CheckpointConfig, DatasetConfig, ParallelConfig, RunConfig
from nvembed_mcore.data import token_file
from nvembed_mcore.data.tokenizer import load_tokenizer
from nvembed_mcore.data.tokens import TokenStore
from nvembed_mcore.exits import Exit, StorageError, exit_of
from tests.helpers import runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return runs.write_inputs(tmp_path_factory.mktemp("inputs"), num_records=200, with_words=True)


@pytest.fixture
def store(inputs, tmp_path) -> TokenStore:
    """Larger than a page, of which the kernel gives the rest as zeros."""
    tokenizer = load_tokenizer(inputs / "tokenizer")
    how = dict(max_query_tokens=24, max_document_tokens=32, cache_dir=tmp_path)
    found = TokenStore.build(DatasetConfig(path=str(inputs / "train.jsonl")), tokenizer, **how)
    assert (found.folder / "data.arrow").stat().st_size > 3 * 4096
    return found


def read_all(store: TokenStore) -> None:
    for number in range(len(store)):
        store.example(number)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace(path: Path) -> None:
    path.with_name("other").write_bytes(path.read_bytes())
    os.replace(path.with_name("other"), path)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "FILE changed while it was in use: (inode, bytes, time of the last change) were "),
        (replace, "FILE changed while it was in use: "),
        (overwrite, "FILE changed while it was in use: "),
        (Path.unlink, "a token store was taken away while it was in use: [Errno 2] No such file or directory: 'FILE'"),
    ],
)
def test_another_file_than_the_one_opened(store, damage, words):
    store.check()
    damage(store.folder / "data.arrow")
    with pytest.raises(StorageError) as caught:
        store.check()
    assert str(caught.value).replace(str(store.folder / "data.arrow"), "FILE").startswith(words)


def test_a_read_behind_the_end_is_an_error_and_no_signal(store):
    """Cut between the check and the read."""
    read_all(store)
    cut(store.folder / "data.arrow")
    with pytest.raises(StorageError, match="data.arrow ends at byte .* it was cut while it was in use"):
        read_all(store)


def test_a_disk_that_fails(store):
    failure = OSError(errno.EIO, os.strerror(errno.EIO))
    with mock.patch.object(token_file.os, "pread", side_effect=failure), pytest.raises(StorageError) as caught:
        store.example(0)
    assert str(caught.value).startswith(f"cannot read {store.folder / 'data.arrow'} at byte ")
    assert "Input/output error" in str(caught.value)


def train_and_damage(config: RunConfig, file: Path, at_step: int, place: str = "data") -> tuple[str, int]:
    """A run under whose feet rank 0 cuts the store at a place of step `at_step`; its message and status."""
    from nvembed_mcore import train

    def point(name: str, step: int) -> None:
        if (name, step) == (place, at_step):
            if dist.get_rank() == 0:
                cut(file)
            dist.barrier()

    with mock.patch.object(train, "point", point):
        try:
            train.train(config)
        except Exception as error:
            return str(error), exit_of(error)
    return "", Exit.DONE


def run_and_file(inputs: Path, folder: Path, checkpoint: CheckpointConfig) -> tuple[RunConfig, Path]:
    """A run of four steps, and the file of its store."""
    how = dict(parallel=ParallelConfig(timeout_minutes=2), checkpoint=checkpoint, steps=4)
    config = runs.run_config(inputs, folder / "run", **how)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, cache_dir=str(folder / "cache")),
        eval=dataclasses.replace(config.eval, path=None),
    )
    limits = dict(max_query_tokens=24, max_document_tokens=32)
    tokenizer = load_tokenizer(config.data.tokenizer)
    store = TokenStore.build(config.data.datasets[0], tokenizer, **limits, cache_dir=config.data.cache_dir)
    return config, store.folder / "data.arrow"


def test_a_store_that_is_lost_behind_a_step_costs_no_step(world, inputs, tmp_path):
    """Nothing was to be saved there."""
    config, file = run_and_file(inputs, tmp_path, CheckpointConfig())
    for message, status in world(2).run(train_and_damage, config, file, 2, "step_end"):
        assert message.startswith(f"{file} changed while it was in use: ") and status == Exit.STORAGE
    assert find_checkpoint(config.run_dir).step == 2


def test_a_run_stops_with_the_file_and_what_is_saved_stays(world, inputs, tmp_path):
    config, file = run_and_file(inputs, tmp_path, CheckpointConfig(every_steps=1))
    size = file.stat().st_size
    for message, status in world(2).run(train_and_damage, config, file, 3):
        assert message.startswith(f"{file} changed while it was in use: ") and status == Exit.STORAGE == 74
    assert find_checkpoint(config.run_dir).step == 2
    # The next attempt says what to do, and when that is done the run goes on.
    expected = (
        f"the token store {file.parent} is damaged (data.arrow has {size // 2} bytes, {size} were written); remove "
        f"the folder to build it anew"
    )
    assert set(world(2).run(train_and_damage, config, file, 0)) == {(expected, Exit.CONFIGURATION)}
    for path in file.parent.iterdir():
        path.unlink()
    file.parent.rmdir()
    assert set(world(2).run(train_and_damage, config, file, 0)) == {("", Exit.DONE)}
    assert find_checkpoint(config.run_dir).step == 4
