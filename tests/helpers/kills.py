"""A supervisor that strikes a run by a seeded schedule and starts the same command again until the run is done.

Shared by the tests and by `tools/soak.py`.
"""

from __future__ import annotations

import hashlib
import random
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from nvembed_mcore.checkpoint import folders, store
from nvembed_mcore.exits import Exit
from nvembed_mcore.log import read_metrics
from tests.helpers.supervisor import Ranks, last_step

STEP_POINTS = ("step_begin", "data", "step_end")
IN_VAIN = ("before_shard", "mid_shard", "after_shard", "before_publish", "before_pointer")
"""Points of a save after which the run goes on from the save before."""
OF_RANK_0 = ("before_publish", "before_pointer", "after_pointer", "during_prune")
PAUSE_SECONDS = 0.3


@dataclass(frozen=True)
class Blow:
    """What happens to an attempt: SIGKILL at a point of a step or of its save, or anything at a moment.

    Attributes:
        what: `SIGKILL`; `SIGTERM`, `SIGUSR1` or `STOP file`, which ask the run to stop; `SIGSTOP`, which freezes.
        rank: whom it hits; the file hits all.
        point, step: of `fault_injection`.
        seconds: since the start, where there is no point.
        pause: whether the rank of a blow at a point is frozen for a moment before, `seconds` after the start.
    """

    what: str = "SIGKILL"
    rank: int = 0
    point: str = ""
    step: int = 0
    seconds: float = 0.0
    pause: bool = False

    def __str__(self) -> str:
        when = f"{self.point} of step {self.step}" if self.point else f"{self.seconds:.2f} s"
        pause = f" after a pause at {self.seconds:.2f} s" if self.pause else ""
        return f"{self.what} to rank {self.rank} at {when}{pause}"

    @property
    def fault(self) -> dict[str, str]:
        """The environment that makes it happen at its point; the first removal of an attempt, also at its start."""
        step = "" if self.point == "during_prune" else self.step
        return {"NVEMBED_FAULT": f"kill@{self.point}:{self.rank}:{step}"} if self.point else {}

    def strike(self, ranks: Ranks, run_dir: Path) -> None:
        """Wait for the moment, then strike; what `fault` does is not done here."""
        if self.point and not self.pause:
            return
        time.sleep(self.seconds)
        if self.pause:
            ranks.kill(self.rank, signal.SIGSTOP)
            time.sleep(PAUSE_SECONDS)
            ranks.kill(self.rank, signal.SIGCONT)
        elif self.what == "STOP file":
            run_dir.mkdir(exist_ok=True)
            (run_dir / "STOP").touch()
        else:
            ranks.kill(self.rank, signal.Signals[self.what])

    def explains(self, codes: list[int], began: int, reached: int) -> bool:
        """Whether an attempt that was struck so may end with these codes."""
        if self.point:
            # The step before was done, so it was no other failure that ended the attempt earlier.
            before = began if self.point == "during_prune" else self.step - 1
            return codes[self.rank] == -signal.SIGKILL and reached >= before >= began
        if not any(codes):
            return True  # it was done before
        if self.what in ("SIGTERM", "SIGUSR1"):
            # Before `nvembed` listens, such a signal ends a process.
            return {*codes} == {Exit.PREEMPTED} or codes[self.rank] == -signal.Signals[self.what]
        if self.what == "STOP file":  # a start is refused while it is there
            return {*codes} in ({Exit.PREEMPTED}, {Exit.CONFIGURATION})
        if self.what == "SIGSTOP":
            return codes[self.rank] == -signal.SIGKILL and {*codes} - {-signal.SIGKILL} <= {Exit.HANG}
        return self.what == "SIGKILL" and codes[self.rank] == -signal.SIGKILL


@dataclass(frozen=True)
class Attempt:
    """What came of one start.

    Attributes:
        arguments: it was started with.
        blow: what was to happen to it; None for the last.
        codes: exit codes by rank.
        began, reached: the step that it went on from, and the last one in `metrics.jsonl` when it had ended.
        seconds: from its start to the end of its last rank.
        checkpoints: steps of the complete checkpoints that it left, from old to new.
    """

    arguments: list[str]
    blow: Blow | None
    codes: list[int]
    began: int
    reached: int
    seconds: float
    checkpoints: list[int]


def schedule(draw: random.Random, world_size: int, steps: int, every: int, keep: int) -> Iterator[Blow]:
    """SIGKILLs in the order in which they can happen: at every point of a save and of a step, at each of them once.

    Between two saves all but the last throw the run back to the earlier one.

    Args:
        steps, every, keep: of the run and its checkpoints; `steps` is a multiple of `every`.
    """
    saves = range(every, steps + 1, every)
    # The first save that removes an older checkpoint, or a later one; the pointer moves in another.
    prune_at = draw.choice(saves[keep:])
    pointer_at = draw.choice([save for save in saves if save != prune_at])
    in_vain = {point: draw.choice(saves) for point in IN_VAIN}
    between = dict(zip(draw.sample(STEP_POINTS, 3), draw.sample(saves, 3), strict=True))
    # Before anything is saved: while rank 0 tokenises, while the ranks find each other, or later.
    yield Blow(rank=draw.randrange(world_size), seconds=draw.uniform(0.0, 0.4))
    for save in saves:
        places = [(point, save) for point, at in in_vain.items() if at == save]
        places += [(point, draw.randint(save - every + 1, save)) for point, at in between.items() if at == save]
        draw.shuffle(places)
        places += [("after_pointer", save)] * (save == pointer_at) + [("during_prune", save)] * (save == prune_at)
        for point, step in places:
            yield Blow(rank=0 if point in OF_RANK_0 else draw.randrange(world_size), point=point, step=step)
    yield Blow(rank=draw.randrange(world_size), seconds=draw.uniform(0.3, 1.2))


def supervise(
    commands: list[list[str]], run_dir: Path, world_size: int, blows: Iterable[Blow], kill_others_after: float = 0.3
) -> Iterator[Attempt]:
    """Start, strike and start again: one attempt a blow, and a last one that nobody strikes.

    Attempts take the commands by turns, each of which is what follows `nvembed train`.

    A blow at a step that is saved already cannot happen and is left out.

    Raises:
        AssertionError: an attempt ended as its blow does not explain, or the last one did not succeed.
    """
    for number, blow in enumerate([*blows, None], 1):
        began = newest(run_dir)
        if blow and blow.point and blow.step <= began:
            continue
        begin = time.monotonic()
        log_dir = run_dir.with_name(f"{run_dir.name}-output") / f"{number:04d}"
        arguments = commands[number % len(commands)]
        with Ranks(arguments, world_size, log_dir, blow and blow.fault, kill_others_after=kill_others_after) as ranks:
            if blow:
                blow.strike(ranks, run_dir)
            codes = ranks.wait(60)
        seconds, reached = time.monotonic() - begin, last_step(run_dir)
        is_expected = blow.explains(codes, began, reached) if blow else not any(codes)
        assert is_expected, f"attempt {number} from step {began}, {blow}: {codes} at {reached}\n{ranks.outputs()}"
        (run_dir / "STOP").unlink(missing_ok=True)
        yield Attempt(arguments, blow, codes, began, reached, seconds, complete(run_dir))


def newest(run_dir: Path) -> int:
    """The step that the run would go on from; 0 without a checkpoint."""
    found = store.find_checkpoint(run_dir)
    return found.step if found else 0


def complete(run_dir: Path) -> list[int]:
    """Steps of the checkpoints of which every tensor can be read, from old to new."""
    found = []
    for path in sorted(folders.folder_of(run_dir).glob("step-*")):
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
    return {path.name for path in folders.folder_of(run_dir).iterdir()}
