"""Steps in which communication is timed."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tests.helpers.cases import Case, build_step, training_batch


@dataclass(frozen=True)
class Timed:
    """Two steps: loss and norm of each, seconds of the second, in which communication was timed, and what it says."""

    numbers: list[tuple[float, float]]
    seconds: float
    communication: dict[str, float]


def two_steps(case: Case, every: int) -> Timed:
    """`every`: as `log.time_communication_every`."""
    from nvembed_mcore.metrics import PhaseTimer

    step, *_ = build_step(case)
    step.time_communication_every = every
    outputs = []
    for number in (1, 2):
        begin = time.perf_counter()
        outputs.append(step(training_batch(case.queries, 1), number, PhaseTimer()))
        seconds = time.perf_counter() - begin
    assert not outputs[0].communication
    numbers = [(output.loss, output.grad_norm) for output in outputs]
    return Timed(numbers, seconds, outputs[1].communication)
