"""Each kernel against plain torch and against `torch.compile` of it: time, memory, error.

    python -m nvembed_mcore.kernels.benchmark [--json PATH]

Shapes are those of NV-Embed on Mistral-7B. Plain torch is the kernel's reference; of InfoNCE it is the whole score
matrix, one `cross_entropy` and autograd, and ours is what a training step calls. A CPU runs no kernel, so there only
plain torch is timed: with --tiny, to see that the program works.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nvembed_mcore import device
from nvembed_mcore.kernels import reference_head
from nvembed_mcore.kernels.reference import Masks, allowed
from nvembed_mcore.loss import make_targets, score_rows

FIGURES = """
A key is the kernel's name, whose version (ours, torch, compile), and:

  ms            median milliseconds of forward and backward pass together
  gb_per_s      bytes that have to be moved (each input read, each output written, once a pass) over that time
  tflop_per_s   instead, where products are what takes time: operations over time
  extra_bytes   memory at most, beyond what was there before, less the output and the gradients
  error_ratio   largest error of the output or a gradient over that of plain torch in the same dtype, both against
                float32 of the same numbers (InfoNCE: float64), on a smaller problem; at most 2 is asked for

  matmul_tflop_per_s     fastest of three shapes of bfloat16 products, in this run
  info_nce_matmul_share  of that rate, what InfoNCE reaches: at least 0.6 is asked for
"""
SCALE, CALLS = 50.0, 10


@dataclass(frozen=True)
class Sizes:
    """Letters as in `latent_head`; InfoNCE has Q queries, M passages (a positive and hard negatives each), width D."""

    tokens: int = 16_384
    hidden: int = 4096
    heads: int = 8
    latents: int = 512
    queries: int = 16_384
    passages: int = 131_072
    sequence: int = 128
    product: int = 8192


TINY = Sizes(64, 32, 2, 8, 16, 64, 16, 32)
SMALL = Sizes(512, 1024, 8, 128, 256, 2048, 32, 1024)


@dataclass(frozen=True)
class Kernel:
    """One thing that is measured.

    Attributes:
        versions: for each version, a function of `inputs`.
        inputs: what gradients are made of, [.., n].
        work: bytes, or operations, of forward and backward.
        is_product: whether `work` counts operations.
        calls: how many are timed together, so that launching them is hidden.
    """

    versions: dict[str, Callable[..., Tensor]]
    inputs: list[Tensor]
    work: float
    is_product: bool = False
    calls: int = CALLS


def head_kernels(sizes: Sizes, where: torch.device, dtype: torch.dtype) -> dict[str, Kernel]:
    """What is between the products of the latent head, and those of its fold."""
    random = torch.Generator(where).manual_seed(0)

    def numbers(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        # The same numbers in every dtype: those that half precision holds.
        return torch.randn(*shape, generator=random, device=where).bfloat16().to(kind)

    def versions(name: str, *others) -> dict[str, Callable[..., Tensor]]:
        plain = getattr(reference_head, name)
        found = {"torch": lambda *inputs: plain(*inputs, *others)}
        if where.type == "cuda":
            from nvembed_mcore.kernels import latent_head

            kernel, compiled = getattr(latent_head, name), torch.compile(plain)
            found["ours"] = lambda *inputs: kernel(*inputs, *others)
            found["compile"] = lambda *inputs: compiled(*inputs, *others)
        return found

    tokens, hidden, columns = sizes.tokens, sizes.hidden, sizes.heads * sizes.latents
    segments = torch.arange(tokens, device=where) // sizes.sequence
    pooling = (torch.full((tokens,), 1 / sizes.sequence, device=where), segments, -(-tokens // sizes.sequence))
    # A few heads' keys: with all of them the other versions' float32 would be most of what is measured.
    fold = [
        torch.randn(sizes.latents, hidden, generator=random, device=where),
        numbers(hidden, 4 * hidden, kind=torch.float32),
    ]
    return {
        "group_softmax": Kernel(
            versions("group_softmax", sizes.heads), [3 * numbers(tokens, columns)], 10 * tokens * columns
        ),
        "geglu": Kernel(versions("geglu"), [numbers(tokens, 8 * hidden)], 16 * tokens * 4 * hidden),
        "segment_sum": Kernel(versions("segment_sum", *pooling), [numbers(tokens, hidden)], 4 * tokens * hidden),
        "pool": Kernel(versions("pool", *pooling), [numbers(tokens, hidden)], 4 * tokens * hidden),
        "fold_product": Kernel(versions("fold_product"), fold, 6 * sizes.latents * hidden * 4 * hidden, True),
    }


class InfoNce:
    """A batch in bfloat16: unit vectors and document ids, of which a few meet again."""

    def __init__(self, sizes: Sizes, where: torch.device) -> None:
        random = torch.Generator(where).manual_seed(0)
        self.anchors, self.candidates = (
            F.normalize(torch.randn(count, sizes.hidden, generator=random, device=where)).bfloat16()
            for count in (sizes.queries, sizes.passages)
        )
        each = sizes.passages // sizes.queries
        positive, owner = np.arange(sizes.queries) * each, np.arange(sizes.passages) // each
        documents = np.random.default_rng(0).integers(0, 8 * sizes.passages, sizes.passages)
        rows, columns = make_targets(
            query=np.arange(sizes.queries),
            positive=positive,
            weight=np.full(sizes.queries, 1 / sizes.queries),
            in_batch=np.ones(sizes.queries, dtype=bool),
            dataset=np.zeros(sizes.queries, dtype=int),
            documents=documents[positive][:, None],
            column_query=owner,
            column_hard=np.arange(sizes.passages) % each > 0,
            column_shared=np.ones(sizes.passages, dtype=bool),
            column_dataset=np.zeros(sizes.passages, dtype=int),
            column_documents=documents[:, None],
            masks=Masks(),
        )
        self.rows, self.columns = rows.to(where), columns.to(where)

    def streaming(self, anchors: Tensor, candidates: Tensor) -> list[Tensor]:
        """Loss and gradients, as a training step makes them."""
        found = score_rows(anchors, candidates, self.rows, self.columns, Masks(), SCALE, with_columns=True)
        return [found.loss, found.grad_rows, found.grad_columns]

    def naive(self, anchors: Tensor, candidates: Tensor, forward: Callable | None = None) -> list[Tensor]:
        """Loss and gradients of the whole score matrix."""
        inputs = [vectors.detach().requires_grad_() for vectors in (anchors, candidates)]
        with torch.enable_grad():
            loss = (forward or self.forward)(*inputs)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)]

    def forward(self, anchors: Tensor, candidates: Tensor) -> Tensor:
        scores = (anchors * SCALE) @ candidates.T
        keep = allowed(scores, scores[:, 0], self.rows, self.columns, Masks())
        losses = F.cross_entropy(scores.masked_fill(~keep, float("-inf")), self.rows.positive, reduction="none")
        return (losses.float() * self.rows.weight).sum()

    def kernel(self, sizes: Sizes) -> Kernel:
        """What is timed; each version returns loss and gradients itself."""
        versions = {"torch": self.naive}
        if self.anchors.is_cuda:
            compiled = torch.compile(self.forward)
            versions["ours"] = self.streaming
            versions["compile"] = lambda *inputs: self.naive(*inputs, compiled)
        work = 6.0 * sizes.queries * sizes.passages * sizes.hidden
        return Kernel(versions, [self.anchors, self.candidates], work, is_product=True, calls=1)


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients, from a gradient of the output that is the same for every version."""
    inputs = [one.detach().requires_grad_() for one in inputs]
    output = function(*inputs)
    upstream = torch.linspace(-1, 1, output.size(-1), device=output.device).to(output.dtype).expand_as(output)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


def milliseconds(call: Callable[[], object], repeats: int, calls: int) -> float:
    """Median time of a call, after one round that does not count."""
    times = []
    for _ in range(repeats + 1):
        device.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        device.synchronize()
        times.append((time.perf_counter() - begin) / calls)
    return 1000 * statistics.median(times[1:])


def extra_bytes(call: Callable[[], list[Tensor]]) -> int:
    """Memory that a call takes at most, beyond what it returns; on CUDA."""
    device.synchronize()
    torch.accelerator.reset_peak_memory_stats()
    before = torch.accelerator.memory_allocated()
    results = call()
    device.synchronize()
    return torch.accelerator.max_memory_allocated() - before - sum(one.nbytes for one in results)


def measure(name: str, kernel: Kernel, call: Callable, repeats: int) -> dict[str, float]:
    """Time, rate and memory of each version. `call(function, inputs)` gives output and gradients."""
    figures = {}
    for version, function in kernel.versions.items():
        try:
            spent = milliseconds(lambda f=function: call(f, kernel.inputs), repeats, kernel.calls)
        except RuntimeError as error:  # what does not fit into memory, or does not compile, is left out
            print(f"{name} {version}: {str(error).splitlines()[0]}")
            continue
        rate = kernel.work / spent / (1e9 if kernel.is_product else 1e6)
        unit = "tflop_per_s" if kernel.is_product else "gb_per_s"
        figures |= {f"{name}_{version}_ms": spent, f"{name}_{version}_{unit}": rate}
        if kernel.inputs[0].is_cuda:
            figures[f"{name}_{version}_extra_bytes"] = extra_bytes(lambda f=function: call(f, kernel.inputs))
    return figures


def worst(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    return [float((one.double() - exact.double()).abs().max()) for one, exact in zip(found, truth, strict=True)]


def error_ratio(found: list[Tensor], plain: list[Tensor], truth: list[Tensor]) -> float:
    """Largest of the errors over plain torch's; a last digit of float32 counts for nothing."""
    room = [1e-7 * float(exact.abs().max()) for exact in truth]
    both = zip(worst(found, truth), worst(plain, truth), room, strict=True)
    return max(max(0.0, ours - digit) / (theirs + digit) for ours, theirs, digit in both)


def errors(sizes: Sizes, where: torch.device) -> dict[str, float]:
    """Of our kernels, on a smaller problem."""
    figures = {}
    exact = head_kernels(sizes, where, torch.float32)
    for name, kernel in head_kernels(sizes, where, torch.bfloat16).items():
        truth = with_gradients(exact[name].versions["torch"], exact[name].inputs)
        plain = with_gradients(kernel.versions["torch"], kernel.inputs)
        if name == "fold_product":  # what stands behind it is in half precision
            plain = [one.bfloat16() for one in plain]
        found = with_gradients(kernel.versions["ours"], kernel.inputs)
        figures[f"{name}_ours_error_ratio"] = error_ratio(found, plain, truth)
    batch = InfoNce(sizes, where)
    inputs = (batch.anchors, batch.candidates)
    truth = batch.streaming(*(vectors.double() for vectors in inputs))
    figures["info_nce_ours_error_ratio"] = error_ratio(batch.streaming(*inputs), batch.naive(*inputs), truth)
    return figures


def matmul_rate(sizes: Sizes, where: torch.device, repeats: int) -> float:
    """TFLOP/s of the fastest of three products in bfloat16."""
    rates, long = [], 2 * sizes.product
    for m, n, k in ((sizes.product,) * 3, (long, long, sizes.hidden), (sizes.hidden, long, long)):
        left, right = (torch.randn(*shape, device=where).bfloat16() for shape in ((m, k), (k, n)))
        spent = milliseconds(lambda a=left, b=right: torch.mm(a, b), repeats, CALLS)
        rates.append(2 * m * n * k / spent / 1e9)
    return max(rates)


def run(sizes: Sizes, small: Sizes, where: torch.device, repeats: int) -> dict[str, float]:
    """All figures; on a CPU those of plain torch."""
    figures = {}
    for name, kernel in head_kernels(sizes, where, torch.bfloat16).items():
        figures |= measure(name, kernel, with_gradients, repeats)
    figures["matmul_tflop_per_s"] = matmul_rate(sizes, where, repeats)
    kernel = InfoNce(sizes, where).kernel(sizes)
    figures |= measure("info_nce", kernel, lambda function, inputs: function(*inputs), repeats)
    if where.type == "cuda":
        figures |= errors(small, where)
        figures["info_nce_matmul_share"] = figures["info_nce_ours_tflop_per_s"] / figures["matmul_tflop_per_s"]
    return figures


def show(figures: dict[str, float]) -> None:
    """A line for each version of each kernel, and what belongs to no version."""
    columns = ("ms", "gb_per_s", "tflop_per_s", "extra_bytes", "error_ratio")
    print(f"{'':24}" + "".join(f"{column:>16}" for column in columns))
    for key in (key.removesuffix("_ms") for key in figures if key.endswith("_ms")):
        values = [figures.get(f"{key}_{column}") for column in columns]
        print(f"{key:24}" + "".join(f"{'' if value is None else format(value, ',.4g'):>16}" for value in values))
    for key in ("matmul_tflop_per_s", "info_nce_matmul_share"):
        if key in figures:
            print(f"{key:24}{figures[key]:16.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=FIGURES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = "cuda" if device.has_cuda() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=here, help=f"default: {here}")
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds of each (default: 10)")
    parser.add_argument("--tiny", action="store_true", help="sizes of a test; their times say nothing")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all figures to PATH as one flat object")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("a CPU would take hours: add --tiny")
    sizes, small = (TINY, TINY) if arguments.tiny else (Sizes(), SMALL)
    print(f"{device.name() if arguments.device == 'cuda' else 'cpu'}, torch {torch.__version__}, {sizes}")
    if arguments.device == "cpu":
        print("No kernel runs on a CPU: only plain torch is timed.")
    figures = run(sizes, small, torch.device(arguments.device), arguments.repeats)
    show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
