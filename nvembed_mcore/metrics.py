"""How fast a step was: tokens, padding, seconds by phase, MFU.

Every rate counts **real** tokens, those of texts. Padding and forward passes done again for memory are work of the
machine but not of the model, so they lower tokens/s and MFU instead of raising them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from nvembed_mcore.scaling.hardware import peak_flops


def device_peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Peak of one device in FLOP/s without sparsity, or None where it is not known.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it, for example `NVIDIA H100 80GB HBM3`.
        dtype: type of the matrix products. Only bfloat16 and float16 are known: for float32 the peak depends on
            whether TF32 is allowed.
    """
    return peak_flops(device_name) if dtype in (torch.bfloat16, torch.float16) else None


class PhaseTimer:
    """Seconds by named phase of a step.

    A phase may be entered any number of times in a step; its seconds add up. Phases do not nest.

        timer = PhaseTimer(device.synchronize)
        with timer("embed"):
            ...
        seconds = timer.lap()  # {"embed": ..., "total": ...}, and the timer starts over
    """

    def __init__(
        self, synchronize: Callable[[], None] = lambda: None, entered: Callable[[str], None] = lambda phase: None
    ) -> None:
        """
        Args:
            synchronize: waits for the device, so that work still queued counts for the phase that queued it.
            entered: is told of each phase that begins.
        """
        self._synchronize, self._entered = synchronize, entered
        self._open: str | None = None
        self._start_over()

    def _start_over(self) -> None:
        self._seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time of the `with` block for `phase`; a block that raises counts too."""
        assert self._open is None, f"phase {phase!r} inside phase {self._open!r} would be counted twice"
        assert phase != "total", "`total` is the whole step"
        self._open = phase
        self._entered(phase)
        self._synchronize()
        start = time.perf_counter()
        try:
            yield
            self._synchronize()
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start
            self._open = None

    def lap(self) -> dict[str, float]:
        """Seconds of each phase and `total`, the time since the timer was made or since the last lap; starts over."""
        seconds = self._seconds | {"total": time.perf_counter() - self._began}
        self._start_over()
        return seconds


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One training line of `metrics.jsonl`: a step of all ranks together."""

    step: int
    """Optimizer steps done, counted from 1."""
    loss: float
    """Mean contrastive loss over the queries of the global batch."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    lr: float
    """Learning rate of this step."""
    real_tokens: int
    """Tokens of texts in the step, over all ranks."""
    padded_tokens: int
    """Tokens that went through the model, over all ranks: the real ones and those that only fill."""
    seconds: dict[str, float]
    """Seconds by phase (`data`, `embed`, `score`, `backward`, `optimizer`) and `total`: `PhaseTimer.lap`."""
    texts: int
    """Queries and documents of the global batch."""
    flops: float | None = None
    """Model FLOPs of the step over all ranks: the sum of `scaling.flops.pack_flops`."""
    peak_flops: float | None = None
    """Sum of the peaks of all devices in FLOP/s; None where it is not known."""
    communication: dict[str, float] = field(default_factory=dict)
    """Seconds in which a rank communicated or waited to, by group; the mean of all ranks. Empty: not measured in this
    step."""

    def __post_init__(self) -> None:
        assert "total" in self.seconds, f"seconds lack `total`: {sorted(self.seconds)}"
        assert self.padded_tokens >= self.real_tokens, f"{self.padded_tokens} tokens cannot hold {self.real_tokens}"

    @property
    def pad_fraction(self) -> float:
        """Share of the tokens that only fill."""
        return 1 - self.real_tokens / self.padded_tokens if self.padded_tokens else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Real tokens a second over the whole step."""
        return self.real_tokens / self.seconds["total"]

    @property
    def padded_tokens_per_second(self) -> float:
        """What the machine did, fill included: as close to `tokens_per_second` as packing is good."""
        return self.padded_tokens / self.seconds["total"]

    @property
    def mfu(self) -> float | None:
        """Model FLOPs a second as a share of the devices' peak; None where one of both is not known."""
        if self.flops is None or self.peak_flops is None:
            return None
        return self.flops / (self.seconds["total"] * self.peak_flops)

    def as_dict(self) -> dict[str, float]:
        """The flat line: `seconds` for the total, `seconds_<phase>` for each phase, what is not known left out."""
        line: dict[str, float] = {
            "step": self.step,
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "lr": self.lr,
            "real_tokens": self.real_tokens,
            "padded_tokens": self.padded_tokens,
            "texts": self.texts,
            "pad_fraction": self.pad_fraction,
            "tokens_per_second": self.tokens_per_second,
            "padded_tokens_per_second": self.padded_tokens_per_second,
            "seconds": self.seconds["total"],
        }
        line |= {f"seconds_{phase}": value for phase, value in self.seconds.items() if phase != "total"}
        if self.flops is not None:
            line["flops"] = self.flops
        if self.mfu is not None:
            line["mfu"] = self.mfu
        if self.communication:
            line["communication_seconds"] = sum(self.communication.values())
        for group, value in self.communication.items():
            line[f"communication_seconds_{group.replace(' ', '_')}"] = value
        return line
