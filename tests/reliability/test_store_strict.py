"""A checkpoint fills a model whose tensors it has, by name, shape and type; anything else is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject

from nvembed_mcore.checkpoint.reader import load_state
from nvembed_mcore.checkpoint.store import CheckpointError
from nvembed_mcore.checkpoint.weights_store import save_weights
from nvembed_mcore.config import CheckpointConfig, ConfigError, ParallelConfig
from nvembed_mcore.parallel.groups import initialize

SHAPES = {"a": ((3, 4), torch.float32), "b": ((5,), torch.float32)}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint of two tensors of ones."""
    initialize(ParallelConfig())
    save_weights(tmp_path / "saved", SHAPES, lambda name: torch.ones(SHAPES[name][0]), {"step": 0})
    return tmp_path / "saved"


def asked(**tensors: torch.Tensor) -> dict:
    return {name: ShardedTensor.from_rank_offsets(name, tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("tensors", "line"),
    [
        ({"a": torch.zeros(3, 4, dtype=torch.bfloat16)}, "a: [3, 4] torch.float32 -> [3, 4] torch.bfloat16"),
        ({"a": torch.zeros(4, 3)}, "a: [3, 4] torch.float32 -> [4, 3] torch.float32"),
        ({"c": torch.zeros(2)}, "c: not saved"),
        ({"b": None}, "b: saved, but not part of this model"),
    ],
    ids=["dtype", "shape", "missing", "unexpected"],
)
def test_a_tensor_that_is_not_the_models(folder, tensors, line):
    wanted = {"a": torch.zeros(3, 4), "b": torch.zeros(5)} | tensors
    with pytest.raises(CheckpointError) as caught:
        load_state(folder, asked(**{name: one for name, one in wanted.items() if one is not None}))
    assert str(caught.value) == f"the tensors of {folder} are not those of this model:\n  {line}"


def test_what_fits_is_loaded(folder):
    state = load_state(folder, asked(a=torch.zeros(3, 4), b=torch.zeros(5)))
    assert torch.equal(state["a"], torch.ones(3, 4)) and torch.equal(state["b"], torch.ones(5))


def test_what_linears_keep_of_fp8_may_be_missing(folder):
    extra = {"linear._extra_state": ShardedObject("linear._extra_state", None, (1,), (0,), 0)}
    state = load_state(folder, asked(a=torch.zeros(3, 4), b=torch.zeros(5)) | extra)
    assert {*state} == {"a", "b"}


def test_weights_alone_are_converted(folder):
    state = load_state(folder, asked(a=torch.zeros(3, 4, dtype=torch.bfloat16)), is_partial=True)
    assert torch.equal(state["a"], torch.ones(3, 4, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match=r"c: not saved"):
        load_state(folder, asked(c=torch.zeros(2)), is_partial=True)


@pytest.mark.parametrize("value", ["", "abc", "A" * 64, "0" * 63])
def test_a_pin_that_is_no_sha256(value):
    with pytest.raises(ConfigError, match=r"checkpoint\.manifest_sha256 must be 64 hexadecimal digits"):
        CheckpointConfig(manifest_sha256=value)
