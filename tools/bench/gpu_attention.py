"""One layer's attention over a pack, forward and backward, in each form that can be computed here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from gpu_measure import Figures, seconds_of
from gpu_workload import KINDS, Size, make_batches

from nvembed_mcore import device
from nvembed_mcore.config import ConfigError, ParallelConfig
from nvembed_mcore.model import attention as torch_attention
from nvembed_mcore.model.attention import packing_of
from nvembed_mcore.model.backend import Backend, why_no_transformer_engine
from nvembed_mcore.model.mistral import transformer_config

TERA = 1e12
REPEATS = 5


def attention(figures: Figures, size: Size) -> None:
    """Every form over packs of both kinds; one that cannot be computed says why."""
    for kind in KINDS:
        lengths = pack_lengths(size, kind)
        flops = 12.0 * size.hidden * float((lengths**2).sum())
        for form, seconds_on in FORMS.items():
            try:
                seconds = seconds_on(size, lengths)
            except Exception as error:  # each library has errors of its own for what it does not compute
                figures.add(f"attention_{kind}_{form}", ms=str(error).strip().partition("\n")[0][:160])
                continue
            figures.add(f"attention_{kind}_{form}", ms=1e3 * seconds, tflops=flops / seconds / TERA)


def pack_lengths(size: Size, kind: str) -> np.ndarray:
    """Lengths of the texts that fill a pack, int64."""
    (batch,) = make_batches(size, kind, size.most_queries)
    return batch.lengths[np.cumsum(batch.lengths) <= size.pack_tokens]


def by_torch(form: str) -> Callable[[Size, np.ndarray], float]:
    """Attention alone, in a form of model/attention.py."""

    def seconds(size: Size, lengths: np.ndarray) -> float:
        packing, attend = packing_of(lengths, device.current()), getattr(torch_attention, form)
        here = dict(dtype=device.default_dtype("auto"), device=device.current())
        shapes = [(int(lengths.sum()), heads, size.hidden // size.heads) for heads in (size.heads, *2 * [size.groups])]
        states = [torch.randn(shape, **here).requires_grad_() for shape in shapes]

        def work() -> None:
            out = attend(*states, packing)
            # The output as its own gradient: making another would take longer than a part of what is timed.
            torch.autograd.grad(out, states, out.detach())

        return seconds_of(work, REPEATS)

    return seconds


def by_te(is_fp8: bool) -> Callable[[Size, np.ndarray], float]:
    """Attention as the model has it, with the rotation, and in FP8 with the way into padded buckets and back."""

    def seconds(size: Size, lengths: np.ndarray) -> float:
        if reason := why_no_transformer_engine():
            raise ConfigError(f"no TransformerEngine: {reason}")
        from megatron.core.transformer.enums import AttnMaskType

        from nvembed_mcore.model import fp8_attention
        from nvembed_mcore.model.te_attention import TransformerEngineCoreAttention

        backend = Backend("transformer_engine", device.default_dtype("auto"))
        config = transformer_config(size.hf_config(), backend, ParallelConfig())
        module = TransformerEngineCoreAttention(config, 1, AttnMaskType.padding, "self")
        return fp8_attention.seconds(module, lengths, is_fp8=is_fp8, repeats=REPEATS)

    return seconds


FORMS = {
    "torch_packed": by_torch("attend_packed"),
    "torch_padded": by_torch("attend_padded"),
    "te_packed": by_te(is_fp8=False),
    "te_padded_fp8": by_te(is_fp8=True),
}
