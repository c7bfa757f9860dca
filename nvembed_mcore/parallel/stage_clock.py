"""How long a pipeline stage waits for its neighbours, by the timers that Megatron's schedules call."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron.core.distributed import DistributedDataParallel

from nvembed_mcore import device
from nvembed_mcore.parallel.gather import numbers_of_all
from nvembed_mcore.parallel.traffic import Traffic

_WHOLE = "forward-backward"


class StageClock:
    """Stands for Megatron's timers: `clock(name, log_level=2).start()`, `clock(name).stop()`."""

    def __init__(self) -> None:
        self._seconds: Counter[str] = Counter()

    def __call__(self, name: str, log_level: int = 0) -> _Span:
        return _Span(self._seconds, name)

    @property
    def waiting(self) -> float:
        """Seconds of the schedules in which this stage neither computed nor reduced gradients: hand-overs, and the
        pipeline's bubble. Sends and receives lie between the computations, so their own spans are not asked for:
        those of interleaved stages end before the transfer does."""
        others = [
            seconds
            for name, seconds in self._seconds.items()
            if name != _WHOLE and not any(word in name for word in ("send", "recv"))
        ]
        return max(0.0, self._seconds[_WHOLE] - sum(others)) if self._seconds[_WHOLE] else 0.0


class _Span:
    def __init__(self, seconds: Counter[str], name: str) -> None:
        self._seconds, self._name = seconds, name

    def start(self, barrier: bool = False) -> None:
        """Without the barrier that Megatron may ask for: it would take the waiting to another place."""
        device.synchronize()
        self._seconds[self._name] -= time.perf_counter()

    def stop(self) -> None:
        device.synchronize()
        self._seconds[self._name] += time.perf_counter()


@contextmanager
def stage_clock(chunks: Sequence[DistributedDataParallel]) -> Iterator[StageClock]:
    """A clock that Megatron's schedules use within the block."""
    clock = StageClock()
    for chunk in chunks:
        chunk.config.timers = clock
    try:
        yield clock
    finally:
        for chunk in chunks:
            chunk.config.timers = None


def communication_of_all(traffic: Traffic, clock: StageClock) -> dict[str, float]:
    """Seconds by group in which a rank communicated or waited to, the mean of all ranks; every rank calls this."""
    own = Counter(traffic.seconds)
    own["pipeline"] += clock.waiting
    means = numbers_of_all([own[group] for group in traffic.groups]).mean(0).tolist()
    return {group: seconds for group, seconds in zip(traffic.groups, means, strict=True) if seconds > 0}
