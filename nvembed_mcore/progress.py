"""Progress of what takes long, with the time left: a bar on a terminal, now and then a line elsewhere, on stderr.

    with progress("tokenise", len(records), "records") as shown:
        for done, record in enumerate(records, 1):
            ...
            shown.update(done, "12,000 tokens/s")

Nothing here needs torch.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

logger = logging.getLogger(__name__)
Item = TypeVar("Item")

QUIET = "NVEMBED_QUIET"
"""Variable of the environment that `--quiet` sets: with 1 nothing is shown but errors and results."""
LINE_EVERY_SECONDS = 10.0
_REDRAW_SECONDS = 0.05
console = Console(stderr=True)
"""The one console of messages and bars: rich then prints messages above a bar instead of through it."""


class Progress(Protocol):
    """What `progress` gives to the work that it shows."""

    def update(self, done: float, status: str = "", *, total: float | None = None) -> None:
        """`done` of the whole are done, and `status` says how it goes; `total` once it is known."""


def is_quiet() -> bool:
    """Whether only errors and results are wanted."""
    return os.environ.get(QUIET, "0") not in ("", "0")


@contextmanager
def progress(
    description: str,
    total: float | None,
    unit: str = "",
    *,
    start: float = 0,
    bar: bool = True,
    eager: bool = False,
) -> Iterator[Progress]:
    """Show how far a piece of work is, on the first rank; one within another adds a bar that goes with it.

    Lines go to the log where logging is set up, so that a run's file has them, else to stderr.

    Args:
        description: what is done.
        total: of what is counted; None while it is not known: then there is no time left either.
        unit: what is counted, as `records`. Whole numbers are shown as such, others with two decimals.
        start: what an earlier attempt has done; the pace is that of the rest.
        bar: lines instead, even on a terminal, where false.
        eager: lines for the first and the last update too, and the bar stays on the screen; otherwise work under ten
            seconds leaves nothing.
    """
    count = _Count(total, unit)
    if os.environ.get("RANK", "0") != "0":
        yield _Nothing()
    elif bar and not is_quiet() and _is_screen():
        with _on_screen(description, count, start, stays=eager) as shown:
            yield shown
    else:
        with closing(_Lines(description, count, start, eager)) as shown:
            yield shown


def show_each(items: Iterable[Item], description: str, unit: str, total: int | None = None) -> Iterator[Item]:
    """The items, and the progress through them; `total` where they have no length of their own.

    An item is kept until the next one is asked for.
    """
    with progress(description, len(items) if isinstance(items, Sized) else total, unit) as shown:
        for done, item in enumerate(items, 1):
            yield item
            shown.update(done)


def _is_screen() -> bool:
    """A terminal that can redraw a line. Colours that are forced into a file (FORCE_COLOR) make none of it."""
    return console.is_interactive and console.file.isatty()


_bars: Bars | None = None
"""On the screen now: rich draws one display at a time, so works that overlap share it."""


@contextmanager
def _on_screen(description: str, count: _Count, start: float, *, stays: bool) -> Iterator[_Bar]:
    """A bar of the display, which lasts as long as any of its bars; the last one may stay on the screen."""
    global _bars
    if _bars is None:
        _bars = _display()
        _bars.start()
    bar = _Bar(_bars, description, count, start)
    try:
        with closing(bar):
            yield bar
    finally:
        if len(_bars.task_ids) > 1:
            _bars.remove_task(bar.task)
        else:
            _bars.live.transient = not stays
            _bars.stop()
            _bars = None


def _display() -> Bars:
    texts = ("{task.description}", "{task.fields[count]}", "{task.fields[status]}")
    description, count, status = (TextColumn(text, markup=False) for text in texts)
    columns = (description, BarColumn(), count, status, TimeRemainingColumn())
    # What is printed meanwhile goes above the bar, but never from a stdout that is a file to the screen.
    return Bars(*columns, console=console, redirect_stdout=sys.stdout.isatty())


@dataclass
class _Count:
    """What is counted, and of how many."""

    total: float | None
    unit: str

    def text(self, done: float) -> str:
        """`3/10 steps`."""
        numbers = [done] if self.total is None else [done, self.total]
        words = [f"{number:,}" if isinstance(number, int) else f"{number:,.2f}" for number in numbers]
        return "/".join(words) + (f" {self.unit}" if self.unit else "")


class _Nothing:
    def update(self, done: float, status: str = "", *, total: float | None = None) -> None:
        pass


class _Bar:
    def __init__(self, bars: Bars, description: str, count: _Count, start: float) -> None:
        self._bars, self._count = bars, count
        self.task = bars.add_task(description, total=count.total, completed=start, count=count.text(start), status="")
        self._drawn_at = 0.0
        self._waiting: tuple[float, str] | None = None

    def update(self, done: float, status: str = "", *, total: float | None = None) -> None:
        self._count.total = self._count.total if total is None else total
        self._waiting = done, status
        if time.monotonic() - self._drawn_at >= _REDRAW_SECONDS:
            self._draw()

    def close(self) -> None:
        if self._waiting is not None:
            self._draw()

    def _draw(self) -> None:
        done, status = self._waiting
        count = self._count.text(done)
        self._bars.update(self.task, completed=done, total=self._count.total, count=count, status=status)
        self._waiting, self._drawn_at = None, time.monotonic()


class _Lines:
    """For files and the output of batch jobs."""

    def __init__(self, description: str, count: _Count, start: float, eager: bool) -> None:
        self._description, self._count, self._start, self._eager = description, count, start, eager
        self._started_at = time.monotonic()
        self._said_at = -math.inf if eager else self._started_at
        self._waiting: tuple[float, str, float] | None = None

    def update(self, done: float, status: str = "", *, total: float | None = None) -> None:
        self._count.total = self._count.total if total is None else total
        now = time.monotonic()
        self._waiting = done, status, now
        if now - self._said_at >= LINE_EVERY_SECONDS:
            self._say()

    def close(self) -> None:
        if self._eager and self._waiting is not None:
            self._say()

    def _say(self) -> None:
        done, status, now = self._waiting
        parts = [f"{self._description}: {self._count.text(done)}", status, self._time_left(done, now)]
        line = "  ".join(part for part in parts if part)
        if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
            logger.info("%s", line)
        elif not is_quiet():
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
        self._waiting, self._said_at = None, now

    def _time_left(self, done: float, now: float) -> str:
        """At the pace since the start, pauses included; nothing where no pace is known."""
        if self._count.total is None or not self._start < done < self._count.total:
            return ""
        seconds = (now - self._started_at) / (done - self._start) * (self._count.total - done)
        return f"ETA {timedelta(seconds=round(seconds))}"
