"""Whether attention computes in FP8: what that needs, and which of its two forms is faster here.

FP8 doubles the rate of attention's products, but needs pads, and copies of queries, keys and values into them and of
states out of them. Short sequences gain little: at 512 tokens attention is some hundredths of a layer's work. So
`precision.fp8_attention: auto` measures.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from nvembed_mcore import device
from nvembed_mcore.config import ConfigError
from nvembed_mcore.model.attention import Packing, packing_of
from nvembed_mcore.model.rotary import Rotary
from nvembed_mcore.model.te_attention import TransformerEngineCoreAttention, dotted, why_torch
from nvembed_mcore.parallel.gather import numbers_of_all

log = logging.getLogger(__name__)

WARM_UPS, REPEATS = 3, 11
SMALL_PACK = np.array([1, 130, 7])
"""Lengths of the pack that FP8 attention is tried with before a run relies on it."""


def missing(config: TransformerConfig) -> str:
    """What FP8 attention with a backward pass needs and does not have here; empty where nothing is missing.

    From `get_attention_backend` of TransformerEngine 2.20 (`pytorch/attention/dot_product_attention/utils.py`) and
    its `fused_attn.cpp`.
    """
    from transformer_engine.pytorch.utils import get_cudnn_version, get_device_compute_capability

    capability, cudnn = get_device_compute_capability(), get_cudnn_version()
    recipe = os.environ.get("NVTE_DPA_FP8_RECIPE", "")
    found = []
    if not (9, 0) <= capability < (12, 0):
        found.append(f"a GPU of compute capability 9.0 to 11, this one has {dotted(capability)}")
    if cudnn < (9, 7, 0) or cudnn == (9, 10, 0):
        found.append(f"cuDNN 9.7 or later and not 9.10.0, this one is {dotted(cudnn)}")
    if config.kv_channels != 128:
        found.append(f"heads of width 128, the model's have {config.kv_channels}")
    if why_torch(config):
        found.append(f"attention by TransformerEngine, but {why_torch(config)}")
    if recipe not in ("", "DelayedScaling"):
        found.append(f"delayed scaling, but the environment variable NVTE_DPA_FP8_RECIPE is {recipe}")
    return "it needs " + "; ".join(found) if found else ""


def attentions_of(encoder: torch.nn.Module) -> Iterator[TransformerEngineCoreAttention]:
    """The core attentions of an encoder's layers that can compute in FP8."""
    return (module for module in encoder.modules() if isinstance(module, TransformerEngineCoreAttention))


def use(encoder: torch.nn.Module, is_fp8: bool) -> None:
    """Let attention compute in FP8, or in bfloat16."""
    for attention in attentions_of(encoder):
        attention.is_fp8 = is_fp8


def require(encoder: torch.nn.Module) -> None:
    """Let attention compute in FP8.

    Raises:
        ConfigError: it cannot here.
    """
    if reason := why_not(encoder):
        raise ConfigError(f"precision.fp8_attention is 'on', but {reason}. Use 'off' or 'auto'")
    use(encoder, True)


def why_not(encoder: torch.nn.Module) -> str:
    """Why attention cannot compute in FP8 here; empty where a small pack went through it."""
    if reason := missing(encoder.config):
        return reason
    try:
        seconds(next(attentions_of(encoder)), SMALL_PACK, is_fp8=True, repeats=1)
    except Exception as error:  # of TransformerEngine, cuDNN or CUDA, each with its own kind
        return f"it was tried and failed: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    return ""


def settle(
    encoders: list[torch.nn.Module], lengths: Callable[[], np.ndarray] | None = None, *, saved: bool | None = None
) -> bool | None:
    """Decide what `auto` is, the same on every rank, which all call this.

    Args:
        encoders: this stage's chunks.
        lengths: gives those of the sequences of one of this rank's packs, int64 [B].
        saved: what an earlier start of this run decided; None: nothing yet, so it is measured.

    Returns:
        Whether attention computes in FP8; None where `auto` is not asked for.
    """
    encoder = encoders[0]
    if encoder.backend.fp8_attention != "auto":
        return None
    is_fp8 = _is_faster(encoder, lengths()) if saved is None else saved
    for one in encoders:
        use(one, is_fp8)
    return is_fp8


def _is_faster(encoder: torch.nn.Module, lengths: np.ndarray) -> bool:
    reason, own = why_not(encoder), [0.0, math.inf]
    if not reason:
        attention = next(attentions_of(encoder))
        own = [seconds(attention, lengths, is_fp8=is_fp8) for is_fp8 in (False, True)]
    # The slowest rank's: all wait for it.
    packed, padded = numbers_of_all(own).amax(dim=0).tolist()
    is_fp8 = padded < packed
    if math.isinf(padded):
        log.info("precision.fp8_attention auto: bfloat16, because %s", reason or "another rank has no FP8 attention")
    else:
        log.info(
            "precision.fp8_attention auto: %s (forward and backward of one layer's attention, a pack of %d sequences "
            "and %d tokens on this rank, slowest rank's median: bfloat16 packed %.3f ms, FP8 padded %.3f ms)",
            "FP8" if is_fp8 else "bfloat16",
            len(lengths),
            lengths.sum(),
            1e3 * packed,
            1e3 * padded,
        )
    return is_fp8


def seconds(
    attention: TransformerEngineCoreAttention, lengths: np.ndarray, *, is_fp8: bool, repeats: int = REPEATS
) -> float:
    """Median time of a forward and backward pass of one layer's attention over a pack of random states."""
    twin, config, times = attention.twin(), attention.config, []
    twin.is_fp8 = is_fp8
    packing = packing_of(lengths, device.current())
    packing.rotary = Rotary(packing.position_ids, config.kv_channels, 10_000.0)
    states, upstream = _random_states(config, int(lengths.sum()))
    # No history of any module moves where the outermost region is not in FP8.
    with twin.region(is_fp8=False):
        for _ in range(WARM_UPS + repeats):
            device.synchronize()
            begin = time.perf_counter()
            _pass(twin, states, upstream, packing)
            device.synchronize()
            times.append(time.perf_counter() - begin)
    return statistics.median(times[WARM_UPS:])


def _random_states(config: TransformerConfig, tokens: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key and value [tokens, heads of this rank, d], and the gradient of the output."""
    here = {"dtype": config.params_dtype, "device": device.current()}
    heads, groups = (
        count // config.tensor_model_parallel_size for count in (config.num_attention_heads, config.num_query_groups)
    )
    shapes = [(tokens, count, config.kv_channels) for count in (heads, groups, groups)]
    states = [torch.randn(shape, **here).requires_grad_() for shape in shapes]
    return states, torch.randn(tokens, heads * config.kv_channels, **here)


def _pass(
    attention: TransformerEngineCoreAttention, states: list[torch.Tensor], upstream: torch.Tensor, packing: Packing
) -> None:
    out = attention(*states, None, packed_seq_params=packing)
    torch.autograd.grad(out, states, upstream)
