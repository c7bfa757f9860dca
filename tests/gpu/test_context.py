"""Context parallelism on GPUs: what one GPU can show of a rank's part, and whole steps where there are two."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from nvembed_mcore.data.packing import Split, make_pack
from nvembed_mcore.model.attention import packed_attention, packing_of
from nvembed_mcore.model.context import Context
from nvembed_mcore.model.rotary import RotaryTable, rotate
from tests.gpu.test_attention import HEADS, WIDTH, core_attention, error, one_by_one, results, states_of
from tests.helpers import models
from tests.helpers.cases import Case, training_steps
from tests.helpers.states import own_tokens
from tests.unit.test_te_attention import MASKS, config_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

LENGTHS = [700, 33, 1, 128, 2, 515, 64]
"""Some that nothing need fill, some of which a rank has no token."""


def packed(split: Split, group=None):
    packing = packing_of(np.array(LENGTHS), torch.device("cuda"), split, group)
    packing.rotary = RotaryTable(WIDTH, 10_000.0)(packing.position_ids)
    return packing


def rows_and_numbers(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a rank's states that are tokens of texts, and which tokens these are."""
    pack = make_pack(models.random_texts(LENGTHS, 250), split=split)
    return tuple(torch.as_tensor(one, device="cuda") for one in own_tokens(pack))


def part_of(states: torch.Tensor, split: Split) -> torch.Tensor:
    """A rank's rows of states of all tokens; what fills texts is large, and must not matter."""
    rows, numbers = rows_and_numbers(split)
    size = int(split.filled(LENGTHS).sum()) // split.size
    return states.new_full((size, *states.shape[1:]), 100.0).index_copy(0, rows, states[numbers])


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_split_is_transformer_engines(size):
    pytest.importorskip("transformer_engine.pytorch")
    import transformer_engine_torch as tex

    filled = Split(size=size).filled(LENGTHS)
    bounds = torch.tensor([0, *np.cumsum(filled)], dtype=torch.int32, device="cuda")
    for rank in range(size):
        found = tex.thd_get_partitioned_indices(bounds, int(filled.sum()), size, rank)
        assert found.tolist() == Split(rank, size).places(filled).tolist()


@pytest.mark.parametrize("size", [2, 4])
def test_the_fused_kernel_turns_by_the_place_in_the_whole_text(size):
    attention, ((query, *_), _) = core_attention(AttnMaskType.padding), states_of(LENGTHS)
    for rank in range(size):
        split = Split(rank, size)
        part, packing = part_of(query, split), packed(split)
        assert (attention._rotated(part, packing) - rotate(part, packing.rotary)).abs().max() <= 2e-2


@pytest.mark.parametrize("size", [2, 4])
def test_torchs_attention_with_fewer_queries_than_keys(size):
    """A rank's part without TransformerEngine; nothing is gathered, for keys and values are there."""
    states, upstream = states_of(LENGTHS)
    upstream = upstream.unflatten(1, (HEADS, WIDTH))
    exact = attend_whole(states, upstream, torch.float32)
    sums = [torch.zeros_like(one) for one in exact]
    for rank in range(size):
        split = Split(rank, size)
        rows, numbers = rows_and_numbers(split)
        inputs = [part_of(states[0], split), *states[1:]]
        inputs = [one.bfloat16().requires_grad_() for one in inputs]
        with mock.patch.object(Context, "gather", lambda self, key, value: (key, value)):
            out = packed_attention(*inputs, packed(split))
        assert out.isfinite().all()
        query, key, value = torch.autograd.grad(out[rows], inputs, upstream[numbers].bfloat16())
        sums[0][numbers], sums[1][numbers] = out[rows].detach().float(), query[rows].float()
        sums[2] += key.float()
        sums[3] += value.float()
    for found, truth in zip(sums, exact, strict=True):
        assert error(found, truth, upstream) <= 0.015


def attend_whole(states, upstream, dtype):
    """Of one GPU that has all tokens: states, and gradients of queries, keys and values. Nothing is turned."""
    packing = packing_of(np.array(LENGTHS), torch.device("cuda"))
    return results(lambda *qkv: packed_attention(*qkv, packing), states, upstream, dtype)


def attention_errors(mask: AttnMaskType) -> list[float]:
    """Of TransformerEngine's attention over shared texts against float32 over whole ones, relative norms."""
    from nvembed_mcore.model.te_attention import TransformerEngineCoreAttention
    from tests.helpers.cases import layout

    _, groups = layout(1, 1, False, cp=2)
    split = Split(groups.cp_rank, 2)
    config = config_of(hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, num_query_groups=8)
    config.context_parallel_size = 2
    attention = TransformerEngineCoreAttention(config, 1, mask, "self", groups.collection)
    states, upstream = states_of(LENGTHS)
    rows, numbers = rows_and_numbers(split)
    causal = mask == AttnMaskType.padding_causal
    exact = results(lambda *qkv: one_by_one(*qkv, LENGTHS, causal), states, upstream, torch.float32)
    parts = [part_of(one, split).bfloat16().requires_grad_() for one in states]
    out = attention(*parts, None, packed_seq_params=packed(split, groups.cp))
    grads = torch.autograd.grad(out[rows], parts, upstream[numbers].bfloat16())
    assert all(one.isfinite().all() for one in (out, *grads))
    found = [one[rows].float() for one in (out, *grads)]
    return [error(one, truth[numbers], upstream[numbers]) for one, truth in zip(found, exact, strict=True)]


@two_gpus
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_transformer_engine_over_texts_that_two_gpus_share(world, mask):
    pytest.importorskip("transformer_engine.pytorch")
    for errors in world(2).run(attention_errors, mask):
        assert max(errors) <= 0.015, errors


@two_gpus
@pytest.mark.parametrize(("way", "budget"), [("single", 100_000), ("retain", 100), ("cached", 100)])
def test_steps_of_two_gpus_equal_one_process_on_the_cpu(world, way, budget):
    """In float32, where torch attends to keys and values that are gathered."""
    for found in world(2).run(training_steps, Case(world=2, cp=2, way=way, budget=budget)):
        assert max(found[name] for name in ("loss", "norm", "parameters")) <= 1e-4, found
