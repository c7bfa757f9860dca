"""What ranks tell of themselves while they run, and what follows when one of them is silent or late. No threads here.

A rank's beat says which operation of which step its main thread is in, and since when. Operations of a step may last
`parallel.timeout_minutes`; others (building, evaluation, saving) may last longer, but the beats must go on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nvembed_mcore.exits import Exit

ORDER = ("begin", "data", "embed", "score", "backward", "optimizer", "end")
"""The limited operations, as a step goes through them; others come behind `end`."""
RUNNING, DISTRESS, FAILED, ENDED = "running", "distress", "failed", "ended"
LOST_BEATS, PATIENCE_BEATS = 3, 8
"""After a collective has failed: beats that a rank lacks to be taken for dead, and beats to wait for one that does."""


@dataclass(frozen=True)
class Beat:
    """What one rank says.

    Attributes:
        count: rises with every beat.
        operation, step: what its main thread is in, and of which step.
        seconds: for how long.
        line: where that is in the code.
        state: `running`; `distress` (a collective failed on it); `failed` (it ends with `error`); `ended`.
    """

    count: int = 0
    operation: str = "start"
    step: int = 0
    seconds: float = 0.0
    line: str = ""
    state: str = RUNNING
    error: str = ""

    def encode(self) -> str:
        return json.dumps(dataclasses.astuple(self))

    @classmethod
    def decode(cls, text: bytes) -> Beat:
        return cls(*json.loads(text))

    @property
    def is_limited(self) -> bool:
        return self.state == RUNNING and self.operation in ORDER

    @property
    def progress(self) -> tuple[int, int]:
        """Less is further behind."""
        place = ORDER.index(self.operation) if self.operation in ORDER else len(ORDER)
        return self.step, place

    @property
    def what(self) -> str:
        return f"{self.operation!r} of step {self.step}" if self.step else f"{self.operation!r}"


@dataclass(frozen=True)
class Verdict:
    """Why the run ends, in the same words on every rank, and the exit status."""

    status: int
    message: str

    def encode(self) -> str:
        return json.dumps([self.status, self.message])

    @classmethod
    def decode(cls, text: bytes) -> Verdict | None:
        return cls(*json.loads(text)) if text else None


class Table:
    """The newest beats of some ranks, and for how many seconds each has stood still.

    Time counts only as it is seen to pass, in pieces of two intervals at most: who was frozen itself, with its whole
    host perhaps, accuses nobody when it wakes up.
    """

    def __init__(self, ranks: Iterable[int], places: Sequence[str], interval: float, timeout: float) -> None:
        """
        Args:
            ranks: those to watch.
            places: of every rank, as `host n2, pid 123`.
            interval: seconds between beats.
            timeout: seconds that an operation may last, and that a rank may be silent.
        """
        self.places, self.interval, self.timeout = places, interval, timeout
        self.beats = {rank: Beat() for rank in ranks}
        self.silent = dict.fromkeys(self.beats, 0.0)
        self._distress = 0.0

    def see(self, beats: Mapping[int, Beat], elapsed: float) -> None:
        """Take in the newest beats, `elapsed` seconds after the last time."""
        elapsed = min(elapsed, 2 * self.interval)
        for rank, beat in beats.items():
            stands_still = beat.count == self.beats[rank].count and beat.state in (RUNNING, DISTRESS)
            self.silent[rank] = self.silent[rank] + elapsed if stands_still else 0.0
            self.beats[rank] = beat
        self._distress += elapsed if any(beat.state == DISTRESS for beat in self.beats.values()) else 0.0

    def judge(self) -> Verdict | None:
        """Whether the run must end, and why."""
        if self._distress:
            return self._of_distress()
        is_late = any(beat.is_limited and beat.seconds >= self.timeout for beat in self.beats.values())
        # Others wait for a silent rank, so they are late no later than it is silent.
        enough = LOST_BEATS * self.interval if is_late else self.timeout
        silent = [rank for rank, seconds in self.silent.items() if seconds >= enough]
        if silent:
            return Verdict(Exit.HANG, "; ".join(self.silence(rank) for rank in silent[:3]) + _more(silent))
        return Verdict(Exit.HANG, self._lateness()) if is_late else None

    def name(self, rank: int) -> str:
        return f"rank {rank} ({self.places[rank]})"

    def silence(self, rank: int) -> str:
        seconds = f"{self.silent[rank]:.0f} s"
        return (
            f"{self.name(rank)} has been silent for {seconds}: frozen, or its host is gone; it was last in "
            f"{self.beats[rank].what}"
        )

    def _lateness(self) -> str:
        """Names who is furthest behind: the others wait for it. Where nobody is, the lines of code tell them apart."""
        least = min(beat.progress for beat in self.beats.values())
        behind = [rank for rank, beat in self.beats.items() if beat.progress == least]
        ahead = [rank for rank in self.beats if rank not in behind]
        seconds = max(self.beats[rank].seconds for rank in behind)
        names = " and ".join(self.name(rank) for rank in behind[:3]) + _more(behind)
        text = f"{names} {'has' if len(behind) == 1 else 'have'} been in {self._where(behind)} for {seconds:.0f} s"
        return text + (f" while {self._waiting(ahead)}" if ahead else "")

    def _where(self, ranks: list[int]) -> str:
        """The operation, and each line of code with its ranks where they differ."""
        by_line: dict[str, list[int]] = {}
        for rank in ranks:
            by_line.setdefault(self.beats[rank].line, []).append(rank)
        if len(by_line) == 1:
            return f"{self.beats[ranks[0]].what} ({next(iter(by_line))})"
        lines = "; ".join(f"{ranks_of(some)}: {line}" for line, some in by_line.items())
        return f"{self.beats[ranks[0]].what} ({lines})"

    def _waiting(self, ranks: list[int]) -> str:
        by_what: dict[str, list[int]] = {}
        for rank in ranks:
            by_what.setdefault(self.beats[rank].what, []).append(rank)
        return " and ".join(
            f"{ranks_of(some)} {'wait' if len(some) > 1 else 'waits'} in {self._where(some)}"
            for some in by_what.values()
        )

    def _of_distress(self) -> Verdict | None:
        """Who failed by itself is to blame, then who is dead; a moment passes until that shows."""
        blamed = [rank for rank, beat in self.beats.items() if beat.state == FAILED]
        if not blamed:
            blamed = [rank for rank, seconds in self.silent.items() if seconds >= LOST_BEATS * self.interval]
        if blamed:
            return Verdict(Exit.CRASHED, "; ".join(self.fate(rank) for rank in blamed[:3]))
        if self._distress < PATIENCE_BEATS * self.interval:
            return None
        rank, error = next((rank, beat.error) for rank, beat in self.beats.items() if beat.state == DISTRESS)
        status = Exit.HANG if "timed out" in error.lower() else Exit.CRASHED
        return Verdict(status, f"a collective failed on {self.name(rank)}, though all ranks live: {error}")

    def fate(self, rank: int) -> str:
        """What became of a rank whose absence another has noticed."""
        beat = self.beats[rank]
        if beat.state == FAILED:
            return f"{self.name(rank)} failed in {beat.what}: {beat.error}"
        return f"lost {self.name(rank)}, last seen in {beat.what}"


def _more(ranks: Sequence[int]) -> str:
    return f" and {len(ranks) - 3} more" if len(ranks) > 3 else ""


def ranks_of(numbers: Sequence[int]) -> str:
    """`ranks 0-2, 5` of 0, 1, 2, 5; `rank 7` of 7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    word = "ranks" if len(numbers) > 1 else "rank"
    return f"{word} {', '.join('-'.join(map(str, part)) for part in parts)}"
