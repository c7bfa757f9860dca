"""Runs whose whole state is recorded after every step, for proofs of resuming by bits. Called on all ranks."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import torch

from nvembed_mcore.config import RunConfig

Record = dict[str, str]
"""What a rank's run is at a moment, by name: SHA-256 of tensors, `float.hex` of floats, `repr` of anything else."""

_UNWATCHED = SimpleNamespace(enter=lambda *_: None)


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes, type and shape."""
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + content.tobytes()).hexdigest()


def record(run: Any, line: dict[str, float] | None = None) -> Record:
    """Everything that a run goes on with, and what it logged of its last step."""
    found = {}
    for number, chunk in enumerate(run.chunks):
        for name, tensor in [*chunk.module.named_parameters(), *chunk.module.named_buffers()]:
            found[f"chunk {number}: {name}"] = digest(tensor)
    for number, optimizer in enumerate(inner_optimizers(run.optimizer)):
        for place, group in enumerate(optimizer.param_groups):
            name = f"optimizer {number}, group {place}: "
            found |= {name + key: written(value) for key, value in group.items() if key != "params"}
            for index, parameter in enumerate(group["params"]):
                tensors = {"main": parameter, **optimizer.state[parameter]}
                found |= {f"{name}{index} {key}": digest(tensor) for key, tensor in tensors.items()}
    logged = {key: value for key, value in (line or {}).items() if "second" not in key and "mfu" not in key}
    return found | {f"logged {key}": written(value) for key, value in logged.items()}


def inner_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """torch's optimizers inside Megatron's."""
    return [one.optimizer for one in getattr(optimizer, "chained_optimizers", [optimizer])]


def written(value: Any) -> str:
    return value.hex() if isinstance(value, float) else repr(value)


def total(records: list[Record]) -> str:
    """One SHA-256 over the records of all ranks."""
    lines = (f"{rank} {name} {value}\n" for rank, one in enumerate(records) for name, value in sorted(one.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def straight_run(config: RunConfig, saves: Collection[int], evaluates: bool = False) -> list[Record]:
    """A run that nobody interrupts: its record after each step.

    Args:
        saves: steps after which it saves.
        evaluates: score the test set after each step.
    """
    from nvembed_mcore.parallel.groups import initialize
    from nvembed_mcore.train import _Run

    groups = initialize(config.parallel)
    run = _Run(config, groups, _UNWATCHED)
    records = []
    while run.done < config.steps:
        run.saver.poll()
        line = run.advance()
        if evaluates:
            run.data.evaluation(run.chunks, groups, config.step.tokens_per_microbatch)
        if run.done in saves:
            run.save()
        records.append(record(run, line))
    run.saver.wait()
    return records


def resumed_runs(
    config: RunConfig,
    points: dict[int, int],
    before: Callable[[Any], None] | None = None,
    threads: int = 1,
) -> dict[int, list[Record]]:
    """Runs that go on from the checkpoints of `straight_run`: their records before and after each step.

    Args:
        points: step to go on after -> step to end with.
        before: what is done to each run before it goes on.
        threads: of each process.
    """
    from nvembed_mcore.checkpoint.folders import folder_of
    from nvembed_mcore.parallel.groups import first_rank_does, initialize
    from nvembed_mcore.train import _Run

    groups = initialize(config.parallel)
    torch.set_num_threads(threads)
    found = {}
    for point, last in points.items():
        pointer = folder_of(config.run_dir) / "latest"
        first_rank_does(lambda: pointer.write_text(f"step-{point:08d}\n", encoding="utf-8"))  # noqa: B023
        run = _Run(config, groups, _UNWATCHED)
        assert run.done == point
        if before:
            before(run)
        found[point] = [record(run)]
        while run.done < last:
            found[point].append(record(run, run.advance()))
    torch.set_num_threads(1)
    return found


def read_ahead(run: Any) -> None:
    """Read batches long before they are due, and out of order."""
    for step in (5, 0, run.config.steps + 7, run.done + 1, run.done):
        run.data.source.batch(step)


def new_temperature(run: Any) -> None:
    """The learned temperature as a new object has it; its moments stay those of the checkpoint."""
    with torch.no_grad():
        run.chunks[-1].module.log_scale.fill_(-math.log(run.config.loss.temperature))


def new_moments(run: Any) -> None:
    """Second moments as a new optimizer has them."""
    for optimizer in inner_optimizers(run.optimizer):
        for state in optimizer.state.values():
            state["exp_avg_sq"].zero_()


def new_step_counter(run: Any) -> None:
    """The step of Adam's bias correction as a new optimizer has it."""
    for optimizer in inner_optimizers(run.optimizer):
        for group in optimizer.param_groups:
            group["step"] = 0


def other_dropout(run: Any) -> None:
    """Masks of another run, with the same samples."""
    run.step.seed += 1
