"""Core attention on a GPU: TransformerEngine's kernels and torch's against float32, one call a sequence."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType

from nvembed_mcore.model.attention import attend_packed, attend_padded, packing_of
from nvembed_mcore.model.rotary import RotaryTable, rotate
from tests.unit.test_te_attention import MASKS, config_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

HEADS, GROUPS, WIDTH = 32, 8, 128
PACKS = {
    "mixed": [7, 130, 1, 64, 33, 512, 200, 128, 129],
    "single tokens": [1] * 5,
    "one": [384],
    "many": np.random.default_rng(0).integers(1, 300, 60).tolist(),
    "a dummy at the end": [100, 57, 3],
}
FP8_STATES, FP8_GRADIENTS = 0.08, 0.2
"""Of FP8 against float32, relative norm. Rounding to e4m3 errs by 2.6 % in the mean square, to e5m2 by 5.2 %. In
states that of values, weights, scores and the states themselves adds up to 5.8 %, in gradients that of e5m2, three
times one behind the other, to 11 %."""


def packed(lengths):
    packing = packing_of(np.array(lengths), torch.device("cuda"))
    packing.rotary = RotaryTable(WIDTH, 10_000.0)(packing.position_ids)
    return packing


def states_of(lengths):
    torch.manual_seed(0)
    shapes = [(sum(lengths), heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, device="cuda") for shape in shapes], torch.randn(
        sum(lengths), HEADS * WIDTH, device="cuda"
    )


def one_by_one(query, key, value, lengths, causal):
    """Rotated and attended, one call a sequence in the inputs' type: [T, A * d]."""
    parts = []
    for q, k, v in zip(*(states.split(list(lengths)) for states in (query, key, value)), strict=True):
        rotary = RotaryTable(WIDTH, 10_000.0)(torch.arange(len(q), device="cuda"))
        q, k, v = (states.transpose(0, 1)[None] for states in (rotate(q, rotary), rotate(k, rotary), v))
        k, v = (states.repeat_interleave(HEADS // GROUPS, dim=1) for states in (k, v))
        parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=causal)[0].transpose(0, 1).flatten(1))
    return torch.cat(parts)


def results(forward, states, upstream, dtype):
    inputs = [one.to(dtype).requires_grad_() for one in states]
    out = forward(*inputs)
    grads = torch.autograd.grad(out, inputs, upstream.to(out.dtype))
    return [one.detach().float() for one in (out, *grads)]


def error(found, truth, upstream):
    """Relative norm; under a softmax over one key queries and keys have no gradient, so something small is added."""
    return ((found - truth).norm() / (truth.norm() + 1e-2 * upstream.norm())).item()


def core_attention(mask):
    from nvembed_mcore.model.te_attention import TransformerEngineCoreAttention

    pytest.importorskip("transformer_engine.pytorch")
    config = config_of(hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, num_query_groups=GROUPS)
    return TransformerEngineCoreAttention(config, 1, mask, "self")


def truth_and_plain(lengths, mask):
    """In float32, and plainly in bfloat16."""
    causal, (states, upstream) = mask == AttnMaskType.padding_causal, states_of(lengths)
    return [
        results(lambda *qkv: one_by_one(*qkv, lengths, causal), states, upstream, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_torchs_two_forms_in_bfloat16(lengths, causal):
    """`attend_packed` is FlashAttention here, `attend_padded` is the scaled product with a mask."""
    (states, upstream), packing = states_of(lengths), packed(lengths)
    exact = results(
        lambda *qkv: attend_packed(*qkv, packing, causal=causal).flatten(1), states, upstream, torch.float32
    )
    for form in (attend_packed, attend_padded):
        found = results(
            lambda *qkv, form=form: form(*qkv, packing, causal=causal).flatten(1), states, upstream, torch.bfloat16
        )
        assert max(error(one, other, upstream) for one, other in zip(found, exact, strict=True)) <= 0.01


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_packed_in_bfloat16_errs_at_most_twice_as_much_as_plain_attention(lengths, mask):
    attention, (states, upstream), packing = core_attention(mask), states_of(lengths), packed(lengths)
    exact, plain = truth_and_plain(lengths, mask)
    found = results(lambda *qkv: attention(*qkv, None, packed_seq_params=packing), states, upstream, torch.bfloat16)
    for name, one, other, truth in zip(("out", "query", "key", "value"), found, plain, exact, strict=True):
        assert error(one, truth, upstream) <= 2 * error(other, truth, upstream) + 1e-4, name


def skip_without_fp8():
    from nvembed_mcore.model import fp8_attention

    attention = core_attention(AttnMaskType.padding)
    if reason := fp8_attention.missing(attention.config):
        pytest.skip(reason)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", ["mixed", "many", "a dummy at the end"])
def test_padded_in_fp8_is_close_and_no_pad_leaks(name, mask):
    """The second pass has scales from the first."""
    skip_without_fp8()
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    lengths = PACKS[name]
    attention, (states, upstream), packing = core_attention(mask), states_of(lengths), packed(lengths)
    attention.is_fp8 = True
    exact, _ = truth_and_plain(lengths, mask)
    for _ in range(2):
        with te.autocast(enabled=False):
            found = results(
                lambda *qkv: attention(*qkv, None, packed_seq_params=packing), states, upstream, torch.bfloat16
            )
        for forward in (True, False):
            FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=forward)
    assert attention.attention.fp8 and attention.attention.fp8_meta["recipe"].fp8_dpa
    for what, one, truth in zip(("out", "query", "key", "value"), found, exact, strict=True):
        bound = FP8_STATES if what == "out" else FP8_GRADIENTS
        assert torch.isfinite(one).all() and error(one, truth, upstream) <= bound, what
    assert (attention.attention.fp8_meta["scaling_bwd"].amax_history > 0).any(), "a history has seen gradients"


def test_small_gradients_survive_the_first_step_in_fp8():
    """Under TransformerEngine's first scale, 1, they would be zero, or of one bit."""
    skip_without_fp8()
    lengths = PACKS["mixed"]
    attention, (states, upstream), packing = core_attention(AttnMaskType.padding), states_of(lengths), packed(lengths)
    attention.is_fp8 = True
    small = 1e-5 * upstream
    found = results(lambda *qkv: attention(*qkv, None, packed_seq_params=packing), states, small, torch.bfloat16)
    exact = results(lambda *qkv: one_by_one(*qkv, lengths, causal=False), states, small, torch.float32)
    assert max(error(one, truth, small) for one, truth in zip(found, exact, strict=True)) <= 2 * FP8_GRADIENTS


@pytest.mark.parametrize("lengths", [[100, 200, 84], [1, 3], [64]])
def test_positions_by_the_fused_kernel_in_a_pack_as_long_as_the_table(lengths):
    attention, (states, _), packing = core_attention(AttnMaskType.padding), states_of(lengths), packed(lengths)
    assert len(packing.rotary.table(sum(lengths))) == sum(lengths)  # and is kept
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.04)):
        query = states[0].to(dtype).requires_grad_()
        found = attention._rotated(query, packing)
        truth = torch.cat(
            [
                rotate(part, RotaryTable(WIDTH, 10_000.0)(torch.arange(len(part), device="cuda")))
                for part in states[0].split(lengths)
            ]
        )
        assert (found.float() - truth).abs().max() <= bound
        (grad,) = torch.autograd.grad(found, query, found.detach())
        assert (grad.float() - query.float()).abs().max() <= 4 * bound, "turned back"


def test_auto_picks_and_says_why(caplog):
    from nvembed_mcore.config import ParallelConfig
    from nvembed_mcore.model import fp8_attention
    from nvembed_mcore.parallel.groups import initialize, shutdown

    attention = core_attention(AttnMaskType.padding)
    encoder = torch.nn.ModuleList([attention])
    encoder.config, encoder.backend = attention.config, SimpleNamespace(fp8_attention="auto")
    initialize(ParallelConfig())
    with caplog.at_level(logging.INFO):
        decision = fp8_attention.settle([encoder], lambda: np.array(PACKS["many"]))
    shutdown()
    line = next(line for line in caplog.messages if line.startswith("precision.fp8_attention auto: "))
    assert attention.is_fp8 is decision
    assert ("FP8 (" in line) is decision
    if not fp8_attention.missing(attention.config):
        assert "bfloat16 packed" in line and "FP8 padded" in line, line
