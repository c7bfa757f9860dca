"""Mining's exact search against one plain blocked matrix product and `torch.topk`, on the CPU.

Run from the root of the repository: PYTHONPATH=. python tools/bench/mining.py

Ours reads the documents from memory-mapped shards, as `nvembed mine` does, looks for numbers that are not finite, and
orders ties by document. The plain one has all documents in memory, scores them block by block and knows none of this.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # both are compared on the CPU

import numpy as np
import torch
from torch import Tensor

from nvembed_mcore.mining.search import exact_search

FIGURES = """
Random unit vectors in float32. Times are medians of --repeats runs of each in turn, in one process, the files in the
page cache.

  seconds, plain_seconds   of ours and of the plain one
  time_ratio               seconds over plain_seconds: the bound is 1.3
  gflops                   of ours, counting the products alone
  differing_documents      ranks at which the two name different documents (scores within rounding of each other)
  largest_difference       of two scores at the same rank
  queries, documents, width, k, threads
"""
BLOCK = 8192
BOUND = 1.3


def unit_vectors(count: int, width: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def plain_search(queries: Tensor, documents: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best of each block, and the best of those."""
    scores, indices = [], []
    for start in range(0, len(documents), BLOCK):
        block_scores, columns = (queries @ documents[start : start + BLOCK].T).topk(k)
        scores.append(block_scores)
        indices.append(columns + start)
    best, order = torch.cat(scores, dim=1).topk(k)
    return best, torch.cat(indices, dim=1).gather(1, order)


def bench(arguments: argparse.Namespace, room: Path) -> dict[str, float]:
    queries = unit_vectors(arguments.queries, arguments.width, 0)
    documents = unit_vectors(arguments.documents, arguments.width, 1)
    shards = []
    for start in range(0, len(documents), arguments.shard_size):
        np.save(room / f"{start}.npy", documents[start : start + arguments.shard_size])
        shards.append(np.load(room / f"{start}.npy", mmap_mode="r"))
    search, in_memory = exact_search(shards), torch.from_numpy(documents)
    ours, plain = [], []
    for _ in range(arguments.repeats + 1):
        begin = time.perf_counter()
        found = search(queries, arguments.k)
        middle = time.perf_counter()
        scores, indices = plain_search(torch.from_numpy(queries), in_memory, arguments.k)
        ours.append(middle - begin)
        plain.append(time.perf_counter() - middle)
    # The first run of each warms the page cache and the threads.
    seconds, plain_seconds = statistics.median(ours[1:]), statistics.median(plain[1:])
    return {
        "queries": arguments.queries,
        "documents": arguments.documents,
        "width": arguments.width,
        "k": arguments.k,
        "threads": torch.get_num_threads(),
        "seconds": seconds,
        "plain_seconds": plain_seconds,
        "time_ratio": seconds / plain_seconds,
        "gflops": 2e-9 * arguments.queries * arguments.documents * arguments.width / seconds,
        "differing_documents": int((indices.numpy() != found.documents).sum()),
        "largest_difference": float(np.abs(scores.numpy() - found.scores).max()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=FIGURES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--shard-size", type=int, default=10_000, help="documents in a file (default: 10000)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each (default: 3)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all figures to PATH as one flat object")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="nvembed-bench-") as room:
        figures = bench(arguments, Path(room))
    for name, value in figures.items():
        print(f"{name:>20} {value:12,.6g}" if isinstance(value, float) else f"{name:>20} {value:12,}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return int(figures["time_ratio"] > BOUND)


if __name__ == "__main__":
    raise SystemExit(main())
