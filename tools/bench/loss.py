"""The streaming contrastive loss against the naive one that holds the whole score matrix: time and memory.

Run from the root of the repository: PYTHONPATH=. python tools/bench/loss.py

Both are given the same unit vectors and document ids, in float32, and make the loss and its gradient to queries and
passages under the default masks: all passages of the batch are candidates, except that those with the document id of
a query's positive are none of its negatives. Ours is what a training step calls, `make_targets` with its host arrays
and `score_rows`; it also makes the accuracy and the temperature's gradient, which the naive one is spared. Inf-CL
(arXiv 2410.17243, package `inf-cl`) knows no masks and runs on CUDA only; where it and a GPU are there, it is timed
too, with ours and the naive one on that GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nvembed_mcore.kernels.reference import Masks
from nvembed_mcore.loss import make_targets, score_rows

SCALE, DOCUMENTS, WIDTH = 50.0, 1_000_000, 256
QUERIES, PASSAGES = 4096, 32_768
LARGE_QUERIES, LARGE_PASSAGES = 16_384, 131_072
MASKS = Masks()

FIGURES = f"""
Sizes are {QUERIES:,} queries and {PASSAGES:,} passages (a positive and seven hard negatives a query) of width {WIDTH};
document ids are drawn from {DOCUMENTS:,}, so that one query in thirty meets its positive's document once more. Times
are medians of --repeats runs of each in turn, in one process. Memory is the most that a process of its own held
beyond what it held before, less the gradients that it returns.

  time_ratio           seconds of ours over seconds of the naive one
  memory_ratio         memory of ours over that of the naive score matrix and its gradient: 8 bytes a score
  seconds, naive_seconds, bytes, naive_bytes
                       what the ratios are made of; naive_bytes is measured like ours
  gradient_difference  largest difference of a gradient's entry from the naive one's, over the largest entry
  large_seconds, large_extra_bytes
                       of ours with {LARGE_QUERIES:,} queries and {LARGE_PASSAGES:,} passages, one run
  cuda_seconds, cuda_naive_seconds, infcl_seconds, infcl_time_ratio
                       with a GPU and inf-cl only; the ratio is ours over Inf-CL
"""


@dataclass(frozen=True)
class Problem:
    """Unit vectors, document ids, and of each query the number of its positive."""

    queries: Tensor
    passages: Tensor
    documents: np.ndarray
    positive: np.ndarray


def make_problem(num_queries: int, num_passages: int) -> Problem:
    """Each positive is near its query, as in a model that has begun to learn."""
    random = torch.Generator().manual_seed(0)
    queries = torch.randn(num_queries, WIDTH, generator=random)
    passages = torch.randn(num_passages, WIDTH, generator=random)
    positive = np.arange(num_queries) * (num_passages // num_queries)
    passages[positive] += 0.4 * queries
    documents = np.random.default_rng(0).integers(0, DOCUMENTS, num_passages)
    return Problem(F.normalize(queries), F.normalize(passages), documents, positive)


@torch.no_grad()
def streaming(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and its gradients, by the trainer's own functions."""
    num_queries, num_passages = len(problem.queries), len(problem.passages)
    owner = np.repeat(np.arange(num_queries), num_passages // num_queries)
    is_hard = np.ones(num_passages, dtype=bool)
    is_hard[problem.positive] = False
    rows, columns = make_targets(
        query=np.arange(num_queries),
        positive=problem.positive,
        weight=np.full(num_queries, 1 / num_queries),
        in_batch=np.ones(num_queries, dtype=bool),
        dataset=np.zeros(num_queries, dtype=int),
        documents=problem.documents[problem.positive][:, None],
        column_query=owner,
        column_hard=is_hard,
        column_shared=np.ones(num_passages, dtype=bool),
        column_dataset=np.zeros(num_passages, dtype=int),
        column_documents=problem.documents[:, None],
        masks=MASKS,
    )
    device = problem.queries.device
    found = score_rows(
        problem.queries, problem.passages, rows.to(device), columns.to(device), MASKS, SCALE, with_columns=True
    )
    return found.loss, found.grad_rows, found.grad_columns


def naive(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and its gradients as one writes them plainly: the score matrix, a mask, cross entropy, autograd."""
    queries, passages = (vectors.detach().requires_grad_() for vectors in (problem.queries, problem.passages))
    positive = torch.as_tensor(problem.positive, device=queries.device)
    documents = torch.as_tensor(problem.documents, device=queries.device)
    is_same = documents[positive][:, None] == documents[None]
    is_same[torch.arange(len(queries), device=queries.device), positive] = False
    scores = (queries * SCALE) @ passages.T
    loss = F.cross_entropy(scores.masked_fill_(is_same, float("-inf")), positive)
    loss.backward()
    return loss.detach(), queries.grad, passages.grad


def infcl(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Inf-CL's loss and its gradients, without masks."""
    from inf_cl import cal_flash_loss

    queries, passages = (vectors.detach().requires_grad_() for vectors in (problem.queries, problem.passages))
    positive = torch.as_tensor(problem.positive, device=queries.device)
    loss = cal_flash_loss(queries, passages, positive, SCALE).mean()
    loss.backward()
    return loss.detach(), queries.grad, passages.grad


def seconds_of(function, problem: Problem) -> float:
    begin = time.perf_counter()
    function(problem)
    if problem.queries.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def interleaved(functions, problem: Problem, repeats: int) -> list[float]:
    """Median seconds of each function; they take turns, after one run of each that does not count."""
    rounds = [[seconds_of(function, problem) for function in functions] for _ in range(repeats + 1)]
    return [statistics.median(times) for times in zip(*rounds[1:], strict=True)]


def resident(field: str) -> int:
    """Bytes of `VmRSS` (now) or `VmHWM` (the most since `mark_memory`)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def mark_memory() -> int:
    """Bytes resident now; the high-water mark is taken back to them."""
    ctypes.CDLL(None).malloc_trim(0)  # nothing freed is left over to be used again unseen
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return resident("VmRSS")


def memory(function, num_queries: int, num_passages: int) -> tuple[int, float]:
    """Bytes beyond inputs and returned gradients, and seconds, of a first call. To be run in a process of its own."""
    function(make_problem(64, 128))  # so that libraries are loaded and threads have begun
    problem = make_problem(num_queries, num_passages)
    before = mark_memory()
    begin = time.perf_counter()
    _, *grads = function(problem)
    seconds = time.perf_counter() - begin
    return resident("VmHWM") - before - sum(grad.nbytes for grad in grads), seconds


def memory_apart(function, num_queries: int, num_passages: int) -> tuple[int, float]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(memory, function, num_queries, num_passages).result()


def difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


def on_cuda(problem: Problem, repeats: int) -> dict[str, float]:
    """Ours, the naive one and Inf-CL on a GPU; nothing where there is none or the package is missing."""
    if not torch.cuda.is_available() or importlib.util.find_spec("inf_cl") is None:
        print("Inf-CL was not run: it needs a CUDA GPU and the package inf-cl (its kernels refuse tensors on a CPU).")
        return {}
    there = Problem(problem.queries.cuda(), problem.passages.cuda(), problem.documents, problem.positive)
    ours, plain, theirs = interleaved((streaming, naive, infcl), there, repeats)
    return dict(cuda_seconds=ours, cuda_naive_seconds=plain, infcl_seconds=theirs, infcl_time_ratio=ours / theirs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=FIGURES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each (default: 5)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all figures to PATH as one flat object")
    arguments = parser.parse_args()
    used, _ = memory_apart(streaming, QUERIES, PASSAGES)
    used_naively, _ = memory_apart(naive, QUERIES, PASSAGES)
    large_used, large_seconds = memory_apart(streaming, LARGE_QUERIES, LARGE_PASSAGES)
    problem = make_problem(QUERIES, PASSAGES)
    gap = difference(streaming(problem), naive(problem))
    ours, plain = interleaved((streaming, naive), problem, arguments.repeats)
    figures = dict(
        time_ratio=ours / plain,
        memory_ratio=used / (2 * QUERIES * PASSAGES * 4),
        seconds=ours,
        naive_seconds=plain,
        bytes=used,
        naive_bytes=used_naively,
        gradient_difference=gap,
        large_seconds=large_seconds,
        large_extra_bytes=large_used,
        threads=torch.get_num_threads(),
    )
    figures |= on_cuda(problem, arguments.repeats)
    for name, value in figures.items():
        print(f"{name:>20} {value:14,.0f}" if isinstance(value, int) else f"{name:>20} {value:14.4g}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
