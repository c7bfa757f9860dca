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
        reason: why `layers` are whose they are, where the machine decided; otherwise empty.
    """

    layers: Literal["transformer_engine", "local"]
    dtype: torch.dtype
    fp8: Fp8 = "off"
    fp8_attention: Literal["off", "on", "auto"] = "off"
    reason: str = ""

    @property
    def is_fp8_emulated(self) -> bool:
        """Whether the local layers round to FP8 and compute with what that leaves."""
        return self.layers == "local" and self.fp8 != "off"

    @property
    def is_fp8_in_te(self) -> bool:
        """Whether TransformerEngine's linears compute in FP8."""
        return self.layers == "transformer_engine" and self.fp8 != "off"

    @property
    def alignment(self) -> int:
        """Rows and columns of the linears' products are multiples of this; 1 without FP8.

        cuBLAS needs 16 for every recipe but `mxfp8`, whose blocks of 32 may not be cut; those of 128 may
        (`get_align_size_for_quantization` in `transformer_engine/pytorch/quantization.py`).
        """
        return {"off": 1, "mxfp8": 32}.get(self.fp8, 16)

    def __str__(self) -> str:
        """One line for the log."""
        words = {"transformer_engine": "TransformerEngine", "local": "torch"}[self.layers]
        words += f" ({self.reason})" if self.reason else ""
        fp8 = "" if self.fp8 == "off" else f", FP8 {self.fp8}" + (" emulated" if self.is_fp8_emulated else "")
        attention = "" if self.fp8_attention == "off" else f", FP8 attention {self.fp8_attention}"
        return f"layers by {words}, weights in {str(self.dtype).removeprefix('torch.')}{fp8}{attention}"


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


def choose(model: ModelConfig, precision: PrecisionConfig, cp: int = 1) -> Backend:
    """Resolve `model.backend` and `precision`; `cp`: so many ranks share a text.

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
    if layers == "transformer_engine" and precision.fp8 != "off" and (why := why_no_fp8(precision.fp8)):
        raise ConfigError(
            f"precision.fp8 is {precision.fp8!r}, which TransformerEngine cannot compute on {device.name()}: {why}. "
            f"Use another recipe or 'off', or model.backend 'local', which emulates it"
        )
    # There is no form of FP8 attention for texts that ranks share (the configuration refuses to ask for it).
    has_fp8_attention = layers == "transformer_engine" and cp == 1
    return Backend(
        layers=layers,
        dtype=dtype,
        fp8=precision.fp8,
        fp8_attention=precision.fp8_attention if has_fp8_attention else "off",
        reason=why_not if model.backend == "auto" else "",
    )
