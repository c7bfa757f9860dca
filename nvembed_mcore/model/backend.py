"""Who computes the encoder's layers on this machine, and in which types: what is asked for, and what is here.

FP8 formats: e4m3 has 4 bits of exponent and 3 of mantissa (largest number 448), e5m2 5 and 2 (57,344).
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Literal

import torch

from nvembed_mcore import device
from nvembed_mcore.config import ConfigError, ModelConfig, PrecisionConfig

Fp8 = Literal["off", "delayed", "tensorwise", "blockwise", "mxfp8"]


@dataclass(frozen=True)
class Backend:
    """How the layers are computed.

    Attributes:
        layers: whose modules they are.
        dtype: of the weights.
        fp8: how the linears round.
        fp8_attention: whether attention does, too; `auto` until it has been measured.
    """

    layers: Literal["transformer_engine", "local"]
    dtype: torch.dtype
    fp8: Fp8 = "off"
    fp8_attention: Literal["off", "on", "auto"] = "off"

    @property
    def is_fp8_emulated(self) -> bool:
        """Whether the local layers round to FP8 and compute with what that leaves."""
        return self.layers == "local" and self.fp8 != "off"


@functools.cache
def why_no_transformer_engine() -> str:
    """Why TransformerEngine cannot compute here; empty where it can."""
    if not device.has_cuda():
        return "there is no CUDA device"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # a library that it needs may be missing or of another version, each with its own error
        return f"it cannot be imported: {str(error).strip().splitlines()[0]}"
    return ""


def why_no_fp8(recipe: Fp8) -> str:
    """Why TransformerEngine cannot compute by an FP8 recipe here; empty where it can."""
    te = importlib.import_module("transformer_engine.pytorch")
    is_available = {
        "delayed": te.is_fp8_available,
        "tensorwise": te.is_fp8_available,
        "blockwise": te.is_fp8_block_scaling_available,
        "mxfp8": te.is_mxfp8_available,
    }[recipe]
    _, reason = is_available(return_reason=True)
    return reason.rstrip(".")


def choose(model: ModelConfig, precision: PrecisionConfig) -> Backend:
    """Resolve `model.backend` and `precision`.

    Raises:
        ConfigError: what is asked for cannot be computed here.
    """
    dtype = device.default_dtype(precision.dtype)
    why_not = "" if model.backend == "local" else why_no_transformer_engine()
    if model.backend == "transformer_engine" and why_not:
        raise ConfigError(f"model.backend is transformer_engine, but {why_not}. Use 'auto' or 'local'")
    layers = "local" if model.backend == "local" or why_not else "transformer_engine"
    if layers == "local" and precision.fp8_attention == "on":
        raise ConfigError(
            f"precision.fp8_attention is 'on', which needs TransformerEngine, but "
            f"{why_not or 'model.backend is local'}. Use 'off' or 'auto'"
        )
    fp8_attention = precision.fp8_attention if layers == "transformer_engine" else "off"
    return Backend(layers=layers, dtype=dtype, fp8=precision.fp8, fp8_attention=fp8_attention)
