"""Parts of a step on their own: matrix products, the streaming loss, our kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_measure import Figures, seconds_of
from gpu_workload import Size
from torch import Tensor

from nvembed_mcore import device
from nvembed_mcore.kernels import benchmark

TERA = 1e12
REPEATS = 5


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


def loss(figures: Figures, size: Size) -> None:
    """The streaming loss and its gradients against the whole score matrix, by torch and by `torch.compile`."""
    kernel = benchmark.InfoNce(sizes_here(), device.current()).kernel(sizes_here())
    measured = benchmark.measure("info_nce", kernel, lambda function, inputs: function(*inputs), REPEATS)
    figures.add("kernel", **measured)


def kernels(figures: Figures, size: Size) -> None:
    """Our other kernels, likewise, and all kernels' errors."""
    dtype = torch.bfloat16
    for name, kernel in benchmark.head_kernels(sizes_here(), device.current(), dtype).items():
        figures.add("kernel", **benchmark.measure(name, kernel, benchmark.with_gradients, REPEATS))
    if device.has_cuda():
        figures.add("kernel", **benchmark.errors(benchmark.SMALL, device.current()))


def sizes_here() -> benchmark.Sizes:
    """Those of NV-Embed, on a GPU."""
    return benchmark.Sizes() if device.has_cuda() else benchmark.TINY
