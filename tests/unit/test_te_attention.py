"""Core attention with TransformerEngine against torch's, with a stand-in for its kernels; tests/gpu has the rest."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from nvembed_mcore.model import te_attention
from nvembed_mcore.model.attention import PackedCoreAttention, attend_packed, packing_of
from nvembed_mcore.model.rotary import RotaryTable, rotate
from nvembed_mcore.model.te_attention import BUCKET_MULTIPLE, GRADIENT_SCALE_AT_START, TransformerEngineCoreAttention
from tests.helpers import te_attention as stand_in

HEADS, GROUPS, WIDTH = 4, 2, 128
PACKS = {
    "short": [3, 1, 17, 5],
    "several buckets": [130, 7, 128, 129, 300, 1],
    "nine alike": [20] * 9,
    "one": [40],
}
MASKS = {"bidirectional": AttnMaskType.padding, "causal": AttnMaskType.padding_causal}


def config_of(**changes) -> TransformerConfig:
    values = dict(
        num_layers=1,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=WIDTH,
        attention_dropout=0.0,
        params_dtype=torch.bfloat16,
        bf16=True,
    )
    return TransformerConfig(**{**values, **changes})


@pytest.fixture
def te(monkeypatch):
    stand_in.install(monkeypatch)
    te_attention._tell.cache_clear()
    return stand_in.DotProductAttention


def packed(lengths):
    packing = packing_of(np.array(lengths), torch.device("cpu"))
    packing.rotary = RotaryTable(WIDTH, 10_000.0)(packing.position_ids)
    return packing


def states_of(lengths, heads=HEADS, groups=GROUPS):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), count, WIDTH) for count in (heads, groups, groups)]
    states = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    return states, torch.randn(sum(lengths), heads * WIDTH, generator=generator)


def results(forward, states, upstream):
    out = forward(*states)
    return [out.detach(), *torch.autograd.grad(out, states, upstream)]


def expected(states, upstream, lengths, causal):
    packing = packed(lengths)

    def plain(query, key, value):
        query, key = (rotate(one, packing.rotary) for one in (query, key))
        return attend_packed(query, key, value, packing, causal=causal).flatten(1)

    return results(plain, states, upstream)


@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_both_forms_are_torchs_attention(te, lengths, mask, is_fp8):
    """States to 1e-5, gradients too; of FP8 only the output's gradient is rounded here, to e5m2."""
    attention = TransformerEngineCoreAttention(config_of(), 1, mask, "self")
    attention.is_fp8 = is_fp8
    states, upstream = states_of(lengths)
    found = results(lambda *qkv: attention(*qkv, None, packed_seq_params=packed(lengths)), states, upstream)
    truth = expected(states, upstream, lengths, mask == AttnMaskType.padding_causal)
    for number, (one, other) in enumerate(zip(found, truth, strict=True)):
        bound = 0.13 if is_fp8 and number else 1e-5
        assert (one - other).abs().max() <= bound * other.abs().max()


def test_fp8_gets_full_buckets_and_a_recipe_of_its_own(te):
    attention = TransformerEngineCoreAttention(config_of(), 1, AttnMaskType.padding, "self")
    attention.is_fp8 = True
    lengths, group = [20] * 9 + [129, 200, 300], object()
    states, _ = states_of(lengths)
    with stand_in.autocast(enabled=True, recipe="of the linears", amax_reduction_group=group):
        attention(*states, None, packed_seq_params=packed(lengths))
        assert stand_in.FP8GlobalStateManager.get_fp8_recipe() == "of the linears"
    assert [call.shape[:2] for call in te.calls] == [(10, 128), (2, 256), (1, 384)]
    for call in te.calls:
        assert call.is_fp8 and call.shape[1] % BUCKET_MULTIPLE == 0
        assert (call.recipe.fp8_dpa, call.recipe.reduce_amax, call.recipe.margin) == (True, True, 1)
        assert call.group is group, "scales are shared as those of the linears are"


def test_without_it_no_recipe_of_the_linears_reaches_attention(te):
    attention = TransformerEngineCoreAttention(config_of(), 1, AttnMaskType.padding, "self")
    states, _ = states_of([5, 9])
    with stand_in.autocast(enabled=True, recipe=stand_in.DelayedScaling(fp8_dpa=True)):
        attention(*states, None, packed_seq_params=packed([5, 9]))
    (call,) = te.calls
    assert not call.is_fp8 and call.shape == (14, HEADS, WIDTH)


def test_small_gradients_are_not_lost_before_a_history_has_seen_them(te):
    attention = TransformerEngineCoreAttention(config_of(), 1, AttnMaskType.padding, "self")
    attention.is_fp8 = True
    states, upstream = states_of([30, 20])
    packing, upstream = packed([30, 20]), 1e-6 * upstream
    out = attention(*states, None, packed_seq_params=packing)
    grads = torch.autograd.grad(out, states, upstream)
    assert all(grad.abs().max() > 0 for grad in grads)
    # What was seen keeps its scale: a resumed run's, and every later forward's.
    scales = attention.attention.fp8_meta["scaling_bwd"]
    assert set(scales.scale.tolist()) == {GRADIENT_SCALE_AT_START}
    scales.scale.fill_(3.0)
    scales.amax_history[1, :2] = 1.0
    attention._has_started = False
    attention(*states, None, packed_seq_params=packing)
    assert scales.scale.tolist() == [3.0] * 2 + [GRADIENT_SCALE_AT_START] * 4


def test_a_twin_is_of_its_kind_and_shares_no_scales(te):
    attention = TransformerEngineCoreAttention(config_of(), 3, AttnMaskType.padding_causal, "self")
    twin = attention.twin()
    assert twin.causal and twin.attention is not attention.attention and twin.attention.mask == "padding_causal"
    assert (attention.recipe.reduce_amax, twin.recipe.reduce_amax) == (True, False)


def test_a_tensor_rank_has_its_part_of_the_heads(te):
    attention = TransformerEngineCoreAttention(
        config_of(tensor_model_parallel_size=2), 1, AttnMaskType.padding, "self"
    )
    states, _ = states_of([6, 3], HEADS // 2, GROUPS // 2)
    assert attention(*states, None, packed_seq_params=packed([6, 3])).shape == (9, HEADS // 2 * WIDTH)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_dropout": 0.1}, "the model's attention_dropout is 0.1"),
        ({"params_dtype": torch.float32, "bf16": False}, "the weights are float32"),
    ],
)
def test_what_its_kernels_are_not_for_torch_computes(te, changes, reason, caplog):
    config = config_of(**changes)
    with caplog.at_level(logging.INFO):
        attention, other = (
            kind(config, 1, AttnMaskType.padding, "self").eval()
            for kind in (TransformerEngineCoreAttention, PackedCoreAttention)
        )
        TransformerEngineCoreAttention(config, 2, AttnMaskType.padding, "self")
    assert len([line for line in caplog.messages if reason in line]) == 1, "told once, not for each layer"
    states, _ = states_of([4, 9])
    out, same = (one(*states, None, packed_seq_params=packed([4, 9])) for one in (attention, other))
    assert torch.equal(out, same) and not te.calls


@pytest.mark.parametrize(
    ("here", "reason"),
    [
        ({}, ""),
        ({"capability": (8, 0)}, "shared texts need a GPU of compute capability 9.0, this one has 8.0"),
        ({"cudnn": (9, 5, 1)}, "shared texts need cuDNN 9.6, this one is 9.5.1"),
    ],
)
def test_shared_texts_need_kernels_that_hide_what_fills_them(monkeypatch, here, reason):
    stand_in.install(monkeypatch, **here)
    assert te_attention.why_torch(config_of(context_parallel_size=2)) == reason
    assert te_attention.why_torch(config_of()) == ""


@pytest.mark.parametrize("lengths", [[2, 3, 5], [1, 1], [10]])
def test_positions_are_those_inside_a_sequence_in_a_pack_as_long_as_the_table(te, lengths):
    """Megatron's own rotation takes offsets in the pack for positions there."""
    packing, (states, _) = packed(lengths), states_of(lengths)
    table = packing.rotary.table(sum(lengths))
    assert len(table) == sum(lengths)
    one_by_one = []
    for part in states[0].split(lengths):
        alone = RotaryTable(WIDTH, 10_000.0)(torch.arange(len(part)))
        one_by_one.append(rotate(part, alone))
    attention = TransformerEngineCoreAttention(config_of(), 1, AttnMaskType.padding, "self")
    for found in (rotate(states[0], packing.rotary), attention._rotated(states[0], packing)):
        torch.testing.assert_close(found, torch.cat(one_by_one))
