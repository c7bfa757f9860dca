"""A supervisor that kills ranks by a seeded schedule and starts the same command again until the run is done.

Shared by the tests and by `tools/soak.py`.
"""

from __future__ import annotations

import hashlib
import random
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nvembed_mcore.checkpoint import store
from nvembed_mcore.log import read_metrics
from tests.helpers.supervisor import Ranks, last_step

STEP_POINTS = ("step_begin", "data", "step_end")
IN_VAIN = ("before_shard", "mid_shard", "after_shard", "before_publish", "before_pointer")
"""Points of a save after which the run goes on from the save before."""
OF_RANK_0 = ("before_publish", "before_pointer", "after_pointer", "during_prune")


@dataclass(frozen=True)
class Kill:
    """SIGKILL to a rank: at a point of a step or of its save (`fault_injection`), or `seconds` after the start."""

    rank: int
    point: str = ""
    step: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"rank {self.rank} " + (f"{self.point} of step {self.step}" if self.point else f"at {self.seconds:.2f} s")


@dataclass(frozen=True)
class Attempt:
    """What came of one start.

    Attributes:
        kill: what was to happen to it; None for the last.
        codes: exit codes by rank.
        began, reached: the step that it went on from, and the last one in `metrics.jsonl` when it had ended.
        seconds: from its start to the end of its last rank.
        checkpoints: steps of the complete checkpoints that it left, from old to new.
    """

    kill: Kill | None
    codes: list[int]
    began: int
    reached: int
    seconds: float
    checkpoints: list[int]


def schedule(seed: int, world_size: int, steps: int, every: int, keep: int) -> Iterator[Kill]:
    """Kills in the order in which they can happen: every point of a save and of a step, at each of them once.

    Between two saves all kills but the last throw the run back to the earlier one.

    Args:
        steps, every, keep: of the run and its checkpoints; `steps` is a multiple of `every`.
    """
    draw = random.Random(seed)
    saves = range(every, steps + 1, every)
    # The first save that removes an older checkpoint, or a later one; the pointer moves in another.
    prune_at = draw.choice(saves[keep:])
    pointer_at = draw.choice([save for save in saves if save != prune_at])
    in_vain = {point: draw.choice(saves) for point in IN_VAIN}
    between = dict(zip(draw.sample(STEP_POINTS, 3), draw.sample(saves, 3), strict=True))
    # Before anything is saved: while rank 0 tokenises, while the ranks find each other, or later.
    yield Kill(draw.randrange(world_size), seconds=draw.uniform(0.0, 0.4))
    for save in saves:
        kills = [(point, save) for point, at in in_vain.items() if at == save]
        kills += [(point, draw.randint(save - every + 1, save)) for point, at in between.items() if at == save]
        draw.shuffle(kills)
        kills += [("after_pointer", save)] * (save == pointer_at) + [("during_prune", save)] * (save == prune_at)
        for point, step in kills:
            yield Kill(0 if point in OF_RANK_0 else draw.randrange(world_size), point, step)


def supervise(
    arguments: list[str], run_dir: Path, world_size: int, kills: list[Kill], env: Mapping[str, str] | None = None
) -> Iterator[Attempt]:
    """Start, kill and start again: one attempt a kill, and a last one that nobody kills."""
    for number, kill in enumerate([*kills, None], 1):
        began = newest(run_dir)
        fault = {"NVEMBED_FAULT": f"kill@{kill.point}:{kill.rank}:{kill.step}"} if kill and kill.point else {}
        begin = time.monotonic()
        log_dir = run_dir.parent / f"{run_dir.name}-output" / f"{number:04d}"
        with Ranks(arguments, world_size, log_dir, env={**(env or {}), **fault}) as ranks:
            if kill and not kill.point:
                time.sleep(kill.seconds)
                ranks.kill(kill.rank)
            codes = ranks.wait(60)
            said = ranks.outputs()
        seconds = time.monotonic() - begin
        ended_as_planned = not any(codes) if kill is None else codes[kill.rank] == -signal.SIGKILL
        assert ended_as_planned, f"attempt {number} ({kill}) ended with {codes}\n{said}"
        yield Attempt(kill, codes, began, last_step(run_dir), seconds, complete(run_dir))


def newest(run_dir: Path) -> int:
    """The step that the run would go on from; 0 without a checkpoint."""
    found = store.find_checkpoint(run_dir)
    return found.step if found else 0


def complete(run_dir: Path) -> list[int]:
    """Steps of the checkpoints of which every tensor can be read, from old to new."""
    found = []
    for path in sorted(store.folder_of(run_dir).glob("step-*")):
        try:
            digest(path)
        except store.CheckpointError:
            continue
        found.append(store.read_checkpoint(path).step)
    return found


def digest(path: Path) -> str:
    """SHA-256 of all tensors of a checkpoint, weights and optimizer state: names, shapes, dtypes and numbers."""
    checkpoint = store.find_checkpoint(path)
    read = store.open_weights(checkpoint)
    found = hashlib.sha256()
    for name, (shape, dtype) in sorted(store.stored_tensors(checkpoint).items()):
        found.update(f"{name} {shape} {dtype}".encode())
        found.update(read(name).contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def curve(run_dir: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of each training line of `metrics.jsonl`, in the order of the file."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def files(run_dir: Path) -> set[str]:
    """What is in `checkpoints/`."""
    return {path.name for path in store.folder_of(run_dir).iterdir()}
