"""What computes the layers, where there is no GPU; tests/gpu has the other half."""

from __future__ import annotations

import pytest
import torch

from nvembed_mcore.config import ConfigError, ModelConfig, PrecisionConfig
from nvembed_mcore.model.backend import choose

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of a host without a CUDA device")


def model(backend: str = "auto") -> ModelConfig:
    return ModelConfig(config="unused", backend=backend)


@pytest.mark.parametrize("asked", ["auto", "local"])
def test_a_cpu_computes_with_local_layers(asked):
    found = choose(model(asked), PrecisionConfig())
    assert (found.layers, found.dtype, found.fp8, found.fp8_attention) == ("local", torch.float32, "off", "off")
    assert not found.is_fp8_emulated


def test_fp8_is_emulated_there():
    found = choose(model(), PrecisionConfig(fp8="tensorwise", fp8_attention="auto"))
    assert found.is_fp8_emulated and found.fp8_attention == "off"


@pytest.mark.parametrize(
    ("asked", "precision", "line"),
    [
        ("auto", PrecisionConfig(), "layers by torch (there is no CUDA device), weights in float32"),
        (
            "local",
            PrecisionConfig(dtype="bfloat16", fp8="blockwise"),
            "layers by torch, weights in bfloat16, FP8 blockwise emulated",
        ),
    ],
)
def test_a_run_says_what_computes_and_why(asked, precision, line):
    assert str(choose(model(asked), precision)) == line


@pytest.mark.parametrize(
    ("backend", "fp8_attention", "text"),
    [
        ("transformer_engine", "off", "model.backend is transformer_engine, but there is no CUDA device"),
        ("auto", "on", "precision.fp8_attention is 'on', which needs TransformerEngine, but there is no CUDA device"),
        ("local", "on", "precision.fp8_attention is 'on', which needs TransformerEngine, but model.backend is local"),
    ],
)
def test_what_is_not_here_is_refused(backend, fp8_attention, text):
    with pytest.raises(ConfigError) as caught:
        choose(model(backend), PrecisionConfig(fp8="tensorwise", fp8_attention=fp8_attention))
    assert text in str(caught.value)


def test_fp8_attention_needs_fp8():
    with pytest.raises(ConfigError, match=r"precision.fp8_attention 'auto' needs precision.fp8, which is 'off'"):
        PrecisionConfig(fp8_attention="auto")
