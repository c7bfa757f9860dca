"""Parts of a step on their own: matrix products, the streaming loss, our kernels."""

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
from gpu_workload import Size
from loss import DOCUMENTS, MASKS, SCALE, Problem, targets
from torch import Tensor

from nvembed_mcore import device
from nvembed_mcore.loss import score_rows

TERA = 1e12
LOSS_SIZES = {True: (16_384, 131_072), False: (64, 512)}
"""Queries and passages, on a GPU and elsewhere."""


def matmul(figures: Figures, size: Size) -> None:
    """The best rate of matrix products that this machine shows, the denominator of MFU; and that of a layer's own."""
    from nvembed_mcore.metrics import device_peak_flops

    figures.add(device=device.name(), cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    if spec := device_peak_flops(device.name(), torch.bfloat16):
        # Tensor cores of these devices compute FP8 at twice the rate.
        figures.add(matmul_bf16_spec_tflops=spec / TERA, matmul_fp8_spec_tflops=2 * spec / TERA)
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
    left, right = (
        torch.randn(rows, k, dtype=device.default_dtype("auto"), device=device.current()) for rows in (m, n)
    )
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
