"""Parts of a step on their own: matrix products, attention in its forms, the streaming loss, our kernels."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gpu_measure import Figures, begin_peak, peak, release, seconds_of
from gpu_workload import KINDS, Size, make_batches
from loss import DOCUMENTS, MASKS, SCALE, Problem, targets
from torch import Tensor

from nvembed_mcore import device
from nvembed_mcore.loss import score_rows
from nvembed_mcore.model.attention import Packing, packed_attention, packing_of

TERA = 1e12
LOSS_SIZES = {True: (16_384, 131_072), False: (64, 512)}
"""Queries and passages, on a GPU and elsewhere."""
BUCKET = 64
"""Texts whose lengths round up to the same multiple share a rectangle."""


def half() -> torch.dtype:
    return device.default_dtype("auto")


def matmul(figures: Figures, size: Size) -> None:
    """The best rate of matrix products that this machine shows, the denominator of MFU; and that of a layer's own."""
    figures.add(device=device.name(), cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    tokens, fused = size.pack_tokens, size.hidden + 2 * size.groups * size.hidden // size.heads
    layer = [(fused, size.hidden), (size.hidden, size.hidden), (2 * size.ffn, size.hidden), (size.hidden, size.ffn)]
    square = [(2 * size.hidden,) * 3, (size.hidden,) * 3, (4 * size.hidden, size.hidden, 2 * size.hidden)]
    shapes = [(tokens, *one) for one in layer] + [(tokens - tokens // 32, size.hidden, 4 * size.hidden), *square]
    for name, product in (("bf16", plain_product), ("fp8", fp8_product)):
        if name == "fp8" and not (device.has_cuda() and torch.cuda.get_device_capability() >= (8, 9)):
            figures.add(matmul_fp8_tflops="this device has no FP8 products")
            continue
        seconds = [seconds_of(product(*shape), 5, calls=10) for shape in shapes]
        flops = [2.0 * m * n * k for m, n, k in shapes]
        figures.add(
            f"matmul_{name}",
            tflops=max(flop / one for flop, one in zip(flops, seconds, strict=True)) / TERA,
            tflops_of_a_layer=sum(flops[:4]) / sum(seconds[:4]) / TERA,
        )


def plain_product(m: int, n: int, k: int) -> Callable[[], Tensor]:
    left, right = (torch.randn(rows, k, dtype=half(), device=device.current()) for rows in (m, n))
    out = left.new_empty(m, n)
    return lambda: torch.mm(left, right.T, out=out)


def fp8_product(m: int, n: int, k: int) -> Callable[[], Tensor]:
    """One scale a tensor, both sides e4m3, the output in bfloat16; without the rounding to FP8."""
    left, right = (
        torch.randn(rows, k, device=device.current()).clamp(-448, 448).to(torch.float8_e4m3fn) for rows in (m, n)
    )
    one = torch.ones((), device=device.current())
    return lambda: torch._scaled_mm(
        left, right.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def attention(figures: Figures, size: Size) -> None:
    """Forward and backward of one layer's attention over a pack, in each form that can be computed here."""
    width = size.hidden // size.heads
    for kind in KINDS:
        lengths = pack_lengths(size, kind)
        packing = packing_of(lengths, device.current())
        shapes = [(int(lengths.sum()), heads, width) for heads in (size.heads, size.groups, size.groups)]
        states = [torch.randn(shape, dtype=half(), device=device.current()).requires_grad_() for shape in shapes]
        flops = 12.0 * size.heads * width * float((lengths**2).sum())
        for form, make in FORMS.items():
            try:
                work = make(size, states, packing)
                seconds = seconds_of(work, 5)
            except Exception as error:  # each library has errors of its own for what it does not compute
                figures.add(f"attention_{kind}_{form}", ms=str(error).strip().partition("\n")[0][:160])
                continue
            figures.add(f"attention_{kind}_{form}", ms=1e3 * seconds, tflops=flops / seconds / TERA)


def pack_lengths(size: Size, kind: str) -> np.ndarray:
    """Lengths of the texts that fill a pack, int64."""
    (batch,) = make_batches(size, kind, size.most_queries)
    return batch.lengths[np.cumsum(batch.lengths) <= size.pack_tokens]


def backward(outputs: list[Tensor], states: list[Tensor]) -> None:
    torch.autograd.grad([out.float().sum() for out in outputs], states)


def ours_packed(size: Size, states: list[Tensor], packing: Packing) -> Callable[[], None]:
    return lambda: backward([packed_attention(*states, packing)], states)


def te_packed(size: Size, states: list[Tensor], packing: Packing) -> Callable[[], None]:
    attend = te_attention(size, "thd")
    bounds = dict(cu_seqlens_q=packing.cu_seqlens_q, cu_seqlens_kv=packing.cu_seqlens_kv)
    bounds |= dict(max_seqlen_q=packing.max_seqlen_q, max_seqlen_kv=packing.max_seqlen_kv)
    return lambda: backward([attend(*states, **bounds)], states)


def te_padded(fp8: bool) -> Callable[[Size, list[Tensor], Packing], Callable[[], None]]:
    """Texts of similar length in rectangles [L, b, heads, d] with a mask of pads, as if they already lay there."""

    def make(size: Size, states: list[Tensor], packing: Packing) -> Callable[[], None]:
        from transformer_engine.common.recipe import DelayedScaling
        from transformer_engine.pytorch import autocast

        buckets, masks = [], []
        for lengths in rectangles(packing):
            longest = -(-int(lengths.max()) // BUCKET) * BUCKET
            shapes = [(longest, len(lengths), *one.shape[1:]) for one in states]
            buckets.append([torch.randn(shape, dtype=half(), device="cuda").requires_grad_() for shape in shapes])
            is_token = torch.arange(longest)[None] < torch.as_tensor(lengths)[:, None]
            masks.append(~is_token[:, None, None].cuda())  # true hides here
        attend, recipe = te_attention(size, "sbhd"), DelayedScaling(fp8_dpa=True)

        def work() -> None:
            with autocast(enabled=fp8, recipe=recipe):
                outputs = [attend(*one, attention_mask=mask) for one, mask in zip(buckets, masks, strict=True)]
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


def plain_loss(queries: Tensor, passages: Tensor, positive: Tensor, documents: Tensor) -> Tensor:
    """The loss as one writes it: the whole score matrix, a mask, cross entropy."""
    is_same = documents[positive][:, None] == documents[None]
    is_same = is_same.scatter(1, positive[:, None], False)
    return F.cross_entropy(((queries * SCALE) @ passages.T).masked_fill(is_same, float("-inf")), positive)


def loss(figures: Figures, size: Size) -> None:
    """The streaming loss and its gradients against the whole score matrix, by torch and by `torch.compile`."""
    num_queries, num_passages = LOSS_SIZES[device.has_cuda()]
    positive = np.arange(num_queries) * (num_passages // num_queries)
    documents = np.random.default_rng(0).integers(0, DOCUMENTS, num_passages)
    flops = 6.0 * num_queries * num_passages * size.hidden
    for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        torch.manual_seed(0)
        made = (torch.randn(n, size.hidden, device=device.current()) for n in (num_queries, num_passages))
        vectors = [F.normalize(one).to(dtype) for one in made]
        rows, columns = targets(Problem(*vectors, documents, positive))

        def ours(vectors=vectors, rows=rows, columns=columns) -> list[Tensor]:
            with torch.no_grad():
                found = score_rows(*vectors, rows, columns, MASKS, SCALE, with_columns=True)
            return [found.grad_rows, found.grad_columns]

        before = begin_peak()
        returned = sum(grad.nbytes for grad in ours())
        if device.has_cuda():  # elsewhere the peak is that of the whole process, libraries included
            figures.add(f"loss_{name}", extra_bytes=peak() - before - returned)
        seconds = seconds_of(ours, 3)
        figures.add(f"loss_{name}", seconds=seconds, tflops=flops / seconds / TERA)
        inputs = (*vectors, *(torch.as_tensor(one, device=device.current()) for one in (positive, documents)))
        # Its compiler for CPUs needs minutes and a C++ compiler.
        compiled = torch.compile(plain_loss, backend="inductor" if device.has_cuda() else "eager")
        for other, function in (("torch", plain_loss), ("compiled", compiled)):
            figures.add(f"loss_{name}", **{f"{other}_seconds": seconds_of_plain(function, inputs)})


def seconds_of_plain(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> float | str:
    queries, passages = (one.detach().requires_grad_() for one in inputs[:2])
    try:
        return seconds_of(
            lambda: torch.autograd.grad(function(queries, passages, *inputs[2:]), [queries, passages]), 3
        )
    except torch.OutOfMemoryError:
        return "out of memory"
    finally:
        release()


def kernels(figures: Figures, size: Size) -> None:
    """The figures of `kernels/benchmark.py`."""
    if importlib.util.find_spec("nvembed_mcore.kernels.benchmark") is None:
        figures.add(kernels="there is no kernels/benchmark.py")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.json"
        command = [sys.executable, "-m", "nvembed_mcore.kernels.benchmark", "--json", str(path)]
        subprocess.run(command, check=True, stdout=sys.stderr)  # noqa: S603
        figures.add("kernel", **json.loads(path.read_text(encoding="utf-8")))
