"""Where a run's time went: how much of it made steps that were kept.

An attempt is a dictionary of JSON values (run_record.py writes them to `RUN/run.json`). Its `seconds` by bucket, the
idle time before it included, add up to the time from the end of the attempt before it to its own end, so those of all
attempts are the wall time of the run. Pure arithmetic: no file, and no clock but the one that is given.

The idea of an effective time ratio is that of ByteRobust (arXiv 2509.16293); the best interval between checkpoints is
Young's (doi 10.1145/361147.361115).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

Attempt = dict[str, Any]

BUCKETS: dict[str, str] = {
    "productive": "steps whose result was kept",
    "evaluation": "evaluations",
    "save_stall": "waiting for checkpoints",
    "lost": "steps that a later attempt took again, and the one that a failure cut off",
    "restart": "from the start of the process to the loop: imports, joining, building, loading",
    "idle": "between attempts: queued, or nobody started it",
    "other": "the rest: logging, agreement, leaving",
}
FAILED = ("killed", "crashed", "hang", "storage_error")
"""Ends of attempts that came from outside the run's configuration and data."""


class Ledger:
    """The seconds of the attempt that runs, by bucket; what nothing claims is `restart` first and `other` later."""

    def __init__(self, clock: Callable[[], float], started: float) -> None:
        """
        Args:
            clock: seconds that never go back.
            started: the attempt's start, by this clock.
        """
        self._clock, self._started = clock, started
        self._seconds = dict.fromkeys(("productive", "evaluation", "save_stall", "lost"), 0.0)
        self._restart: float | None = None

    @contextmanager
    def spends(self, bucket: str) -> Iterator[None]:
        """The time of the `with` block; a step that does not come to its end is lost. Blocks do not nest."""
        begin = self._clock()
        try:
            yield
        except BaseException:
            self._seconds["lost" if bucket == "productive" else bucket] += self._clock() - begin
            raise
        self._seconds[bucket] += self._clock() - begin

    def starts_the_loop(self) -> None:
        """All until now was the restart."""
        self._restart = self.elapsed()

    def elapsed(self) -> float:
        return self._clock() - self._started

    def seconds(self) -> dict[str, float]:
        """By bucket; they add up to the time since the start."""
        restart = self.elapsed() if self._restart is None else self._restart
        other = self.elapsed() - restart - sum(self._seconds.values())
        return {**self._seconds, "restart": restart, "other": max(0.0, other)}


def opened(before: Attempt | None, number: int, now: datetime, elapsed: float) -> Attempt:
    """The record of an attempt that began `elapsed` seconds ago; the one before it must have an end.

    It never begins before the other ended: clocks of two hosts differ.
    """
    start, idle = now - timedelta(seconds=elapsed), 0.0
    if before is not None:
        end = datetime.fromisoformat(before["end"])
        start = max(start, end)
        idle = (start - end).total_seconds()
    return {
        "number": number,
        "start": start.isoformat(),
        "end": None,
        "from_step": None,
        "last_step": None,
        "kept_step": None,
        "saves": 0,
        "state": "running",
        "seconds": dict.fromkeys(BUCKETS, 0.0) | {"idle": idle},
    }


def check(attempt: Attempt) -> None:
    """Whether a record that comes from a file can be gone on with.

    Raises:
        ValueError, KeyError, TypeError: it was not written by this version.
    """
    datetime.fromisoformat(attempt["start"])
    if attempt["end"] is not None:
        datetime.fromisoformat(attempt["end"])
    if not attempt["seconds"].keys() >= BUCKETS.keys():
        raise ValueError(f"attempt {attempt['number']} has its seconds by {sorted(attempt['seconds'])}")
    for name in ("from_step", "last_step", "kept_step", "saves", "state"):
        attempt[name]


def update(attempt: Attempt, ledger: Ledger, step: int | None, saves: int) -> None:
    """Write down what the ledger says now. `step`: steps done, or None before the loop."""
    seconds = ledger.seconds()
    idle = attempt["seconds"]["idle"]
    attempt["seconds"] = {name: seconds.get(name, 0.0) for name in BUCKETS} | {"idle": idle}
    attempt |= {"last_step": step, "kept_step": step, "saves": saves}


def close(attempt: Attempt, state: str, exit_status: int) -> None:
    """End an attempt whose ledger has just been written down."""
    attempt |= {"end": _after(attempt).isoformat(), "state": state, "exit_status": exit_status}


def close_killed(attempt: Attempt, last_sign: datetime, lines: Sequence[Mapping[str, float]], state: str) -> None:
    """End an attempt that could not say so itself.

    Args:
        last_sign: when it wrote a file last; what happened between that and its end counts as idle.
        lines: those of `metrics.jsonl`: steps that it took since it wrote itself down last.
    """
    if attempt["from_step"] is not None:
        unwritten = {line["step"]: line["seconds"] for line in lines if _is_step_after(line, attempt["last_step"])}
        attempt["seconds"]["productive"] += sum(unwritten.values())
        attempt["last_step"] = attempt["kept_step"] = max(unwritten, default=attempt["last_step"])
    unclaimed = max(0.0, (last_sign - _after(attempt)).total_seconds())
    attempt["seconds"]["restart" if attempt["from_step"] is None else "other"] += unclaimed
    attempt |= {"end": _after(attempt).isoformat(), "end_is_estimated": True, "state": state}


def _after(attempt: Attempt) -> datetime:
    """The end that the attempt's start and its seconds give."""
    spent = sum(attempt["seconds"].values()) - attempt["seconds"]["idle"]
    return datetime.fromisoformat(attempt["start"]) + timedelta(seconds=spent)


def go_on_after(attempts: Sequence[Attempt], step: int, lines: Sequence[Mapping[str, float]]) -> None:
    """The last attempt begins after `step`: what earlier ones did beyond it is lost.

    Args:
        lines: those of `metrics.jsonl` before any is dropped. Where only every n-th step has one (`log.every_steps`),
            the steps between count as the mean of those that have.
    """
    for one in attempts[:-1]:
        if one["from_step"] is None or one["kept_step"] <= step:
            continue
        first, last = max(step, one["from_step"]), one["kept_step"]
        seconds = [line["seconds"] for line in lines if _is_step_after(line, first) and line["step"] <= last]
        mean = sum(seconds) / len(seconds) if seconds else one["seconds"]["productive"] / (last - one["from_step"])
        lost = min(one["seconds"]["productive"], mean * (last - first))
        one["seconds"]["productive"] -= lost
        one["seconds"]["lost"] += lost
        one["kept_step"] = first
    attempts[-1] |= {"from_step": step, "last_step": step, "kept_step": step}


def _is_step_after(line: Mapping[str, float], step: int) -> bool:
    """Lines of evaluations have no loss and no seconds."""
    return "loss" in line and line["step"] > step


def totals(attempts: Sequence[Attempt]) -> dict[str, float]:
    """Seconds of the whole run by bucket."""
    return {name: sum(one["seconds"][name] for one in attempts) for name in BUCKETS}


def share(attempts: Sequence[Attempt]) -> float:
    """Productive time by wall time."""
    seconds = totals(attempts)
    return seconds["productive"] / max(sum(seconds.values()), 1e-9)


def best_interval(attempts: Sequence[Attempt]) -> tuple[float, float, float] | None:
    """Seconds between checkpoints that would lose least, of a save, and between failures.

    Young's approximation `sqrt(2 * save * between failures)`; None where no failure or no save was seen.
    """
    failures = sum(one["state"] in FAILED for one in attempts)
    saves = sum(one["saves"] for one in attempts)
    seconds = totals(attempts)
    if not failures or not saves:
        return None
    between = (sum(seconds.values()) - seconds["idle"]) / failures
    save = seconds["save_stall"] / saves
    return math.sqrt(2 * save * between), save, between


def describe(attempts: Sequence[Attempt]) -> str:
    """One line for people: the share of productive time, all buckets, and after failures a hint."""
    parts = [f"{name.replace('_', ' ')} {_text(value)}" for name, value in totals(attempts).items()]
    line = f"goodput {100 * share(attempts):.1f} %: {', '.join(parts)}; attempts: {len(attempts)}"
    hint = best_interval(attempts)
    if hint is None:
        return line
    best, save, between = (_text(one) for one in hint)
    return f"{line}; a save costs {save}, a failure came every {between}: best saved every {best} (Young)"


def _text(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.1f} s"
