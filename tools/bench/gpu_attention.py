"""One layer's attention over a pack, forward and backward, in each form that can be computed here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from gpu_measure import Figures, seconds_of
from gpu_workload import KINDS, Size, make_batches
from torch import Tensor

from nvembed_mcore import device
from nvembed_mcore.model.attention import Packing, packed_attention, packing_of

TERA = 1e12
BUCKET = 128
"""Texts whose lengths round up to the same multiple share a rectangle."""


def attention(figures: Figures, size: Size) -> None:
    """Every form over packs of both kinds; one that cannot be computed says why."""
    width = size.hidden // size.heads
    for kind in KINDS:
        lengths = pack_lengths(size, kind)
        packing = packing_of(lengths, device.current())
        shapes = [(int(lengths.sum()), heads, width) for heads in (size.heads, size.groups, size.groups)]
        states = [random_states(*shape) for shape in shapes]
        flops = 12.0 * size.heads * width * float((lengths**2).sum())
        for form, make in FORMS.items():
            try:
                work = make(size, states, packing)
                seconds = seconds_of(work, 5)
            except Exception as error:  # each library has errors of its own for what it does not compute
                figures.add(f"attention_{kind}_{form}", ms=str(error).strip().partition("\n")[0][:160])
                continue
            figures.add(f"attention_{kind}_{form}", ms=1e3 * seconds, tflops=flops / seconds / TERA)


def random_states(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=device.default_dtype("auto"), device=device.current()).requires_grad_()


def pack_lengths(size: Size, kind: str) -> np.ndarray:
    """Lengths of the texts that fill a pack, int64."""
    (batch,) = make_batches(size, kind, size.most_queries)
    return batch.lengths[np.cumsum(batch.lengths) <= size.pack_tokens]


def backward(outputs: list[Tensor], states: list[Tensor]) -> None:
    """With the output as its own gradient: making another would take longer than a part of what is timed."""
    torch.autograd.grad(outputs, states, [out.detach() for out in outputs])


def ours_packed(size: Size, states: list[Tensor], packing: Packing) -> Callable[[], None]:
    return lambda: backward([packed_attention(*states, packing)], states)


def te_packed(size: Size, states: list[Tensor], packing: Packing) -> Callable[[], None]:
    attend = te_attention(size, "thd")
    bounds = dict(cu_seqlens_q=packing.cu_seqlens_q, cu_seqlens_kv=packing.cu_seqlens_kv)
    bounds |= dict(max_seqlen_q=packing.max_seqlen_q, max_seqlen_kv=packing.max_seqlen_kv)
    return lambda: backward([attend(*states, **bounds)], states)


def te_padded(fp8: bool) -> Callable[[Size, list[Tensor], Packing], Callable[[], None]]:
    """Texts of similar length in rectangles [b, L, heads, d], as if they already lay there."""

    def make(size: Size, states: list[Tensor], packing: Packing) -> Callable[[], None]:
        from transformer_engine.common.recipe import DelayedScaling
        from transformer_engine.pytorch import autocast

        buckets, bounds = [], []
        for lengths in rectangles(packing):
            longest = -(-int(lengths.max()) // BUCKET) * BUCKET
            shapes = [(len(lengths), longest, *one.shape[1:]) for one in states]
            buckets.append([random_states(*shape) for shape in shapes])
            starts = torch.as_tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=device.current())
            bounds.append(dict(cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=longest, max_seqlen_kv=longest))
        attend, recipe = te_attention(size, "bshd"), DelayedScaling(fp8_dpa=True)

        def work() -> None:
            with autocast(enabled=fp8, recipe=recipe):
                outputs = [attend(*one, **where) for one, where in zip(buckets, bounds, strict=True)]
            backward(outputs, [one for triple in buckets for one in triple])

        return work

    return make


def rectangles(packing: Packing) -> list[np.ndarray]:
    """Lengths of the pack's texts, those together that round up to the same multiple."""
    lengths = np.diff(packing.cu_seqlens_q.cpu().numpy())
    classes = -(-lengths // BUCKET)
    return [lengths[classes == one] for one in np.unique(classes)]


def te_attention(size: Size, layout: str) -> torch.nn.Module:
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        size.heads, size.hidden // size.heads, size.groups, qkv_format=layout, attn_mask_type="padding", layer_number=1
    )


FORMS = {
    "packed": ours_packed,
    "te_packed": te_packed,
    "te_padded": te_padded(fp8=False),
    "te_padded_fp8": te_padded(fp8=True),
}
