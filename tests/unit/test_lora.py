"""An adapter's parts on tensor ranks, each with several groups of keys and values, are those of the whole one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nvembed_mcore.checkpoint.names import PROJECTIONS, join_shards, local_shard, name_table, to_hf
from nvembed_mcore.config import LoraConfig, ParallelConfig, PoolingConfig
from nvembed_mcore.model.backend import Backend
from nvembed_mcore.model.linears import adapted_linears
from nvembed_mcore.model.lora import Adapter, add_to_output
from nvembed_mcore.model.mistral import transformer_config
from tests.helpers.models import tiny_config

CONFIG = tiny_config(num_hidden_layers=1, num_key_value_heads=4)
LINEARS = adapted_linears(32, 64, 8, 4, 8)
BACKEND = Backend(layers="local", dtype=torch.float32)


def adapter_of(linear, lora, source, tp=1, rank=0):
    """This tensor rank's adapter with its part of the tensors that `source` has by Hugging Face name."""
    parallel = ParallelConfig(tp=tp, sequence_parallel=False)
    adapter = Adapter(linear, lora, transformer_config(CONFIG, BACKEND, parallel))
    prefix = f"decoder.layers.0.lora_{linear.name}."
    entries = {entry.name: entry for entry in name_table(CONFIG, PoolingConfig(kind="mean"), lora)}
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.copy_(local_shard(entries[prefix + name], source.__getitem__, rank, tp))
    return adapter


@pytest.mark.parametrize("targets", [["q", "k", "v", "o", "gate", "up", "down"], ["v", "k", "up"]])
@pytest.mark.parametrize("linear", LINEARS, ids=[linear.name for linear in LINEARS])
def test_blocks_of_ranks_are_rows_of_the_linear(linear, targets):
    if not set(targets) & set(linear.rows):
        return
    lora = LoraConfig(rank=3, targets=targets)
    table = name_table(CONFIG, PoolingConfig(kind="mean"), lora)
    shapes = {name: shape for entry in table if entry.is_adapter for name, shape in entry.hf.items()}
    source = {name: torch.randn(shape) for name, shape in shapes.items()}
    whole = adapter_of(linear, lora, source)._blocks()
    ranks = [adapter_of(linear, lora, source, tp=2, rank=rank)._blocks() for rank in range(2)]
    (entry,) = (entry for entry in table if entry.name.endswith(f"{linear.path}.weight"))
    width = whole.size(1)
    if linear.is_row_parallel:
        assert torch.equal(ranks[0], whole) and torch.equal(ranks[1], whole)
    else:
        assert torch.equal(join_shards(entry, ranks), whole)
    # Split as the linear's own weight is for Hugging Face: each projection's B beside zeros.
    shape = (entry.shape[0], width)
    parts = to_hf(dataclasses.replace(entry, shape=shape), whole)
    for target, part in zip(linear.rows, parts.values(), strict=True):
        expected = torch.zeros(linear.rows[target], width)
        if target in targets:
            place = [name for name in linear.rows if name in targets].index(target)
            b = source[f"embedding_model.layers.0.{PROJECTIONS[target]}.lora_B.weight"]
            expected[:, place * 3 : place * 3 + 3] = b
        assert torch.equal(part, expected), target


def test_a_linear_with_a_norm_inside_is_refused():
    module = torch.nn.Linear(4, 4)
    module.layer_norm_weight = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(AssertionError, match="a norm in it"):
        add_to_output(module, torch.nn.Identity())
