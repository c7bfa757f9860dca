"""Weights on their way through memory: one parameter at a time, and files as the libraries write them."""

from __future__ import annotations

import hashlib
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from nvembed_mcore.checkpoint import reader, store
from nvembed_mcore.checkpoint.hf_folder import read_headers
from nvembed_mcore.checkpoint.names import local_shard, name_table
from nvembed_mcore.checkpoint.safetensors_stream import write_weights
from nvembed_mcore.checkpoint.weights_store import _share, save_weights
from nvembed_mcore.config import ParallelConfig, PoolingConfig
from nvembed_mcore.parallel.groups import initialize, shutdown
from tests.helpers import transfer
from tests.helpers.models import tiny_config

CONFIG = tiny_config(num_hidden_layers=2)
POOLING = PoolingConfig(num_latents=6, num_heads=4, head_width=12)
ENTRIES = {entry.name: entry for entry in name_table(CONFIG, POOLING)}
TENSORS = transfer.random_tensors(CONFIG, POOLING, torch.float32)


def make_parameter(name: str) -> torch.Tensor:
    return local_shard(ENTRIES[name], TENSORS.__getitem__, 0, 1)


class Counted:
    """Makes parameters, and asserts each time that no other is alive."""

    def __init__(self) -> None:
        self.alive: list[weakref.ref] = []
        self.calls = 0

    def __call__(self, name: str) -> torch.Tensor:
        assert not any(one() is not None for one in self.alive), name
        tensor = make_parameter(name)
        self.alive, self.calls = [weakref.ref(tensor.untyped_storage())], self.calls + 1
        return tensor


@pytest.fixture
def groups():
    yield initialize(ParallelConfig())
    shutdown()


def test_an_export_holds_one_parameter(tmp_path):
    make = Counted()
    write_weights(make, list(ENTRIES.values()), tmp_path, torch.float32)
    assert make.calls == len(ENTRIES)


def test_an_import_holds_one_parameter(groups, tmp_path):
    sizes: list[int] = []
    tensors: list[torch.Tensor] = []

    def make(name: str) -> torch.Tensor:
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
        tensors.append(make_parameter(name))
        return tensors[-1]

    shapes = {name: (entry.shape, torch.float32) for name, entry in ENTRIES.items()}
    save_weights(tmp_path / "saved", shapes, make, {"step": 0})
    assert sizes == [0] * len(ENTRIES)


def test_a_failed_import_leaves_nothing(groups, tmp_path):
    def make(name: str) -> torch.Tensor:
        raise OSError("disk gone")

    shapes = {name: (entry.shape, torch.float32) for name, entry in ENTRIES.items()}
    with pytest.raises(OSError, match="disk gone"):
        save_weights(tmp_path / "saved", shapes, make, {"step": 0})
    assert list(tmp_path.iterdir()) == []


def test_metadata_is_read_once(groups, tmp_path, monkeypatch):
    """Megatron's own loader reads it for each call, which took 14 ms a tensor."""
    shapes = {name: (entry.shape, torch.float32) for name, entry in ENTRIES.items()}
    facts = {"step": 0, "config": {"loss": {}, "model": {"pooling": vars(POOLING)}}, "hf_config": CONFIG.to_dict()}
    save_weights(tmp_path / "saved", shapes, make_parameter, facts)
    calls, plain = [], reader._checked
    monkeypatch.setattr(reader, "_checked", lambda table: calls.append(1) or plain(table))
    read = store.open_weights(store.find_checkpoint(tmp_path / "saved"))
    for name in ENTRIES:
        assert torch.equal(read(name), make_parameter(name)), name
    assert len(calls) == 1
    with pytest.raises(store.CheckpointError, match="has no tensor 'decoder.x'"):
        read("decoder.x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_files_are_those_of_the_library(tmp_path, dtype):
    write_weights(Counted(), list(ENTRIES.values()), tmp_path, dtype, 30_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    found = transfer.tensors_of(tmp_path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name].to(dtype)) for name in found)
    for file in files:
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0, "numbers begin at a multiple of eight bytes"
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    index = json.loads((tmp_path / transfer.INDEX).read_text())
    numbers = sum(tensor.numel() for tensor in TENSORS.values())
    assert index["metadata"] == {"total_parameters": numbers, "total_size": numbers * dtype.itemsize}
    assert {name: tensor.file for name, tensor in read_headers(tmp_path).items()} == index["weight_map"]
    assert sums_of(tmp_path) == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def sums_of(folder: Path) -> dict[str, str]:
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    return {name: digest for digest, name in (line.split("  ") for line in lines)}


def test_numbers_that_do_not_fit_are_not_exported(tmp_path):
    def make(name: str) -> torch.Tensor:
        return torch.full(ENTRIES[name].shape, 1e6)

    with pytest.raises(ValueError, match=r"embed_tokens\.weight.*not finite in torch\.float16"):
        write_weights(make, list(ENTRIES.values()), tmp_path, torch.float16)


@pytest.mark.parametrize("num_ranks", [1, 3, 8])
def test_ranks_share_the_bytes_of_an_import(num_ranks):
    shapes = {f"p{i}": ((1 + i % 5, 100), torch.bfloat16) for i in range(40)}
    shares = [_share(shapes, rank, num_ranks) for rank in range(num_ranks)]
    assert sorted(name for share in shares for name in share) == sorted(shapes)
    sizes = [sum(torch.Size(shape).numel() for shape, _ in share.values()) for share in shares]
    assert max(sizes) - min(sizes) <= 500
