"""TransformerEngine's attention in Megatron's layers, and `precision.fp8_attention`; a stand-in for its kernels."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from nvembed_mcore.checkpoint.store import Checkpoint
from nvembed_mcore.config import ConfigError
from nvembed_mcore.model import fp8_attention
from nvembed_mcore.model.te_attention import TransformerEngineCoreAttention
from nvembed_mcore.resume import decided
from tests.helpers import cases, states
from tests.helpers import te_attention as stand_in
from tests.unit.test_te_attention import config_of

STATES, GRADIENT = 2e-6, 1e-5
LENGTHS = np.array([30, 7, 130])


class Broken(stand_in.DotProductAttention):
    def forward(self, *_, **__):
        raise ValueError("No dot product attention backend is available\nfor the provided inputs.")


class OneLayer(torch.nn.Module):
    """What `fp8_attention` asks an encoder for."""

    def __init__(self, config: TransformerConfig, asked: str = "auto") -> None:
        super().__init__()
        self.config, self.backend = config, SimpleNamespace(fp8_attention=asked)
        self.attention = TransformerEngineCoreAttention(config, 1, AttnMaskType.padding, "self")


def encoder_states(tp: int, sp: bool, mask: str) -> tuple[dict[str, float], int]:
    """As `states.encoder_states`, with the stand-in for core attention; and how often that was called."""
    from nvembed_mcore.model import mistral, te_attention

    with pytest.MonkeyPatch.context() as patch:
        stand_in.install(patch)
        patch.setattr(mistral, "PackedCoreAttention", TransformerEngineCoreAttention)
        patch.setattr(te_attention, "why_torch", lambda config: "")  # of float32, which the stand-in computes
        return states.encoder_states(tp, 1, sp, mask), len(stand_in.DotProductAttention.calls)


@pytest.mark.parametrize(
    ("size", "sp", "mask"), [(1, False, "bidirectional"), (1, False, "causal"), (2, True, "bidirectional")]
)
def test_in_megatrons_layers_states_and_gradients_equal_hugging_face(world, size, sp, mask):
    for result, calls in world(size).run(encoder_states, size, sp, mask):
        assert result["states"] <= STATES and result["gradient"] <= GRADIENT
        assert calls == 2 * 4, "packs and layers"


def settled(times: list[list[float]], can: list[bool], saved: bool | None = None):
    """What a rank decides where rank r needs `times[r]` (packed, padded) and `can[r]`; whether it is used; the log."""
    import logging

    from nvembed_mcore.model import fp8_attention

    _, groups = cases.layout(1, 1, False)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger(fp8_attention.__name__)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        stand_in.install(patch, cudnn=(9, 19, 0) if can[groups.rank] else (9, 10, 0))
        found = dict(zip((False, True), times[groups.rank], strict=True))
        patch.setattr(fp8_attention, "seconds", lambda *_, is_fp8, **__: found[is_fp8])
        encoder = OneLayer(config_of())
        decision = fp8_attention.settle([encoder], lambda: LENGTHS, saved=saved)
    logger.removeHandler(handler)
    return decision, encoder.attention.is_fp8, lines


@pytest.mark.parametrize(
    ("times", "can", "is_fp8", "words"),
    [
        ([[3e-3, 2e-3], [1e-3, 2.5e-3]], [True, True], True, "FP8 (forward and backward"),
        ([[1e-3, 2e-3], [2e-3, 1e-3]], [True, True], False, "bfloat16 (forward and backward"),
        ([[1e-3, 4e-3], [3e-3, 2e-3]], [True, True], False, "bfloat16 (forward and backward"),
        ([[3e-3, 2e-3], [3e-3, 2e-3]], [True, False], False, "bfloat16, because"),
    ],
    ids=["faster on the slowest", "a tie is none", "one rank is slow", "one rank cannot"],
)
def test_the_slowest_rank_decides_for_all(world, times, can, is_fp8, words):
    packed, padded = (1e3 * max(one[form] for one in times) for form in (0, 1))
    for decision, used, lines in world(2).run(settled, times, can):
        assert decision is used is is_fp8
        (line,) = lines
        assert line.startswith(f"precision.fp8_attention auto: {words}")
        assert "because" in words or f"bfloat16 packed {packed:.3f} ms, FP8 padded {padded:.3f} ms" in line
    if not all(can):
        reasons = sorted(lines[0] for _, _, lines in world(2).run(settled, times, can))
        assert reasons[0].endswith("because another rank has no FP8 attention")
        assert reasons[1].endswith("because it needs cuDNN 9.7 or later and not 9.10.0, this one is 9.10.0")


@pytest.mark.parametrize("saved", [False, True])
def test_what_was_decided_before_is_not_measured_again(world, saved):
    ((decision, used, lines),) = world(1).run(settled, [[1.0, math.nan]], [True], saved)
    assert decision is used is saved and not lines


def test_a_resumed_run_knows_what_was_decided():
    facts = {"hardware": {"device": "H200"}, "config": {"parallel": {}, "step": {}, "optim": {}}}
    saved = Checkpoint(Path("run"), 5, facts | {"fp8_attention": True})
    assert decided(saved, facts, "fp8_attention") is True
    assert decided(saved, facts | {"hardware": {"device": "H100"}}, "fp8_attention") is None


def test_both_forms_are_measured(monkeypatch):
    stand_in.install(monkeypatch)
    encoder = OneLayer(config_of())
    assert fp8_attention.why_not(encoder) == ""
    stand_in.DotProductAttention.calls.clear()
    assert fp8_attention.seconds(encoder.attention, LENGTHS, is_fp8=False, repeats=3) > 0
    assert {(call.shape, call.is_fp8) for call in stand_in.DotProductAttention.calls} == {((167, 4, 128), False)}
    stand_in.DotProductAttention.calls.clear()
    assert fp8_attention.seconds(encoder.attention, LENGTHS, is_fp8=True, repeats=3) > 0
    shapes = {((2, 128, 4, 128), True), ((1, 256, 4, 128), True)}
    assert {(call.shape, call.is_fp8) for call in stand_in.DotProductAttention.calls} == shapes
    assert not encoder.attention.attention.fp8_meta, "the layer itself has seen nothing of it"


def test_only_auto_is_settled(monkeypatch):
    stand_in.install(monkeypatch)
    for asked in ("on", "off"):
        assert fp8_attention.settle([OneLayer(config_of(), asked)], lambda: LENGTHS) is None


@pytest.mark.parametrize(
    ("machine", "changes", "variables", "missing"),
    [
        ({"cudnn": (9, 5, 1)}, {}, {}, "cuDNN 9.7 or later and not 9.10.0, this one is 9.5.1"),
        ({"cudnn": (9, 10, 0)}, {}, {}, "cuDNN 9.7 or later and not 9.10.0, this one is 9.10.0"),
        ({"capability": (8, 0)}, {}, {}, "a GPU of compute capability 9.0 to 11, this one has 8.0"),
        ({"capability": (12, 0)}, {}, {}, "a GPU of compute capability 9.0 to 11, this one has 12.0"),
        ({}, {"kv_channels": 64}, {}, "heads of width 128, the model's have 64"),
        (
            {},
            {"attention_dropout": 0.1},
            {},
            "attention by TransformerEngine, but the model's attention_dropout is 0.1",
        ),
        ({}, {}, {"NVTE_DPA_FP8_RECIPE": "F16"}, "the environment variable NVTE_DPA_FP8_RECIPE is F16"),
        ({"attention": Broken}, {}, {}, "it was tried and failed: No dot product attention backend is available"),
    ],
)
def test_what_is_missing_is_named_at_the_start(monkeypatch, machine, changes, variables, missing):
    stand_in.install(monkeypatch, **machine)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    encoder = OneLayer(config_of(**changes), "on")
    with pytest.raises(ConfigError) as caught:
        fp8_attention.require(encoder)
    text = str(caught.value)
    assert text.startswith("precision.fp8_attention is 'on', but it ") and missing in text
    assert text.endswith(". Use 'off' or 'auto'") and not encoder.attention.is_fp8


def test_where_nothing_is_missing_it_is_used(monkeypatch):
    stand_in.install(monkeypatch, cudnn=(9, 7, 0), capability=(10, 0))
    encoder = OneLayer(config_of(), "on")
    fp8_attention.require(encoder)
    assert encoder.attention.is_fp8
