"""What the sections of the GPU benchmark measure with: clocks, memory, figures that outlive a section that fails."""

from __future__ import annotations

import gc
import json
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch

from nvembed_mcore import device

Figure = float | int | str | None


@dataclass
class Figures:
    """What a section found. Each figure is a line of JSON at once: what is stopped has told what it knew."""

    out: TextIO
    found: dict[str, Figure] = field(default_factory=dict)

    def add(self, prefix: str = "", **values: Figure) -> None:
        """Write figures down; `prefix` and `_` go in front of their names."""
        named = {f"{prefix}_{name}" if prefix else name: value for name, value in values.items()}
        self.found |= named
        print(json.dumps(named), file=self.out, flush=True)


def seconds_of(work: Callable[[], Any], repeats: int, calls: int = 1) -> float:
    """Median seconds of a call, of `repeats` times `calls` in a row, behind one call that is not timed."""
    work()
    times = []
    for _ in range(repeats):
        device.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        device.synchronize()
        times.append((time.perf_counter() - begin) / calls)
    return statistics.median(times)


def queueing_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median seconds until a call returns, with an idle device before it: what the host needs to queue its work."""
    work()
    times = []
    for _ in range(repeats):
        device.synchronize()
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    device.synchronize()
    return statistics.median(times)


def begin_peak() -> int:
    """Let `peak` begin anew; bytes that are held now."""
    if not device.has_cuda():
        return peak()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak() -> int:
    """Most bytes of tensors since `begin_peak`; on a CPU the high-water mark of the process."""
    if device.has_cuda():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def release() -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.has_cuda():
        torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch has a class for it; libraries that allocate for themselves have only the words."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


@dataclass(frozen=True)
class Fastest:
    """The batch of the highest rate, size 0 if none fits; `too_large` is the first that did not, if any was met."""

    size: int
    rate: float
    too_large: int | None = None

    @property
    def figure(self) -> float | str:
        return self.rate if self.size else f"out of memory at {self.too_large}"


def fastest(rate_of: Callable[[int], float], first: int, most: int) -> Fastest:
    """Double a batch until it does not fit, or is no faster by more than a hundredth."""
    best, size = Fastest(0, 0.0), first
    while size <= most:
        try:
            rate = rate_of(size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            best = Fastest(best.size, best.rate, size)
            break
        is_faster = rate > 1.01 * best.rate
        if rate > best.rate:
            best = Fastest(size, rate)
        if not is_faster:
            break
        size *= 2
    release()  # what a batch that did not fit has left behind
    return best
