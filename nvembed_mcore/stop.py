"""Stopping where somebody asks: a signal to any rank, the wall clock, a file. All ranks stop after the same step."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType

from nvembed_mcore.config import ConfigError, RunConfig

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
"""Schedulers warn with either. SIGINT is a person at a terminal, who need not wait for a checkpoint."""
STOP_FILE = "STOP"
BAD_DATA = "a token store cannot be used"
_ASKED_BY = ("", "the file", "the clock", BAD_DATA, *(one.name for one in SIGNALS))


class StopRequests:
    """What asks this process to stop, and the agreement of all ranks on whether to.

        with StopRequests() as stops:               # before anything slow: a signal must not end the process
            while ...:
                reason = stops.agreed(config, groups.rank, groups.world_size)       # every rank, after each step

    A handler only sets a flag, so it does no harm wherever it interrupts, during a save too, and however often.
    Handlers are installed in the main thread only (Python allows no other) and put back at the end; it may be entered
    again inside itself.

    Attributes:
        signal: name of the first signal that came, or None.
        started: `time.monotonic()` when this was made: the start of the process, for `max_minutes`.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.started = time.monotonic()
        self._before: list[dict[int, object]] = []

    def __enter__(self) -> StopRequests:
        is_main = threading.current_thread() is threading.main_thread()
        self._before.append({number: signal.signal(number, self._note) for number in SIGNALS if is_main})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.pop().items():
            signal.signal(number, handler)

    def ignore_signals(self) -> None:
        """The process ends: a signal that comes now is not to change its exit status."""
        self._before[-1] = dict.fromkeys(self._before[-1], signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or signal.Signals(number).name

    def agreed(self, config: RunConfig, rank: int, world_size: int, bad_data: bool = False) -> str | None:
        """Why to stop, the same on all ranks, or None; every rank calls this after the same step.

        One number goes over the world. Where several ask, one reason is given.

        Args:
            bad_data: this rank cannot make another batch; the reason then begins with `BAD_DATA`.
        """
        # Not before: the signals' handlers are there long before torch is.
        from nvembed_mcore.parallel.groups import largest

        asked = _ASKED_BY.index(self._asked(config, rank) or (BAD_DATA if bad_data else ""))
        by, of_rank = divmod(largest(asked * world_size + rank if asked else 0), world_size)
        if by == 0:
            return None
        if by == 1:
            return f"the file {stop_file(config)}"
        if by == 2:
            return f"the wall-clock limit of {config.max_minutes:g} minutes"
        return f"{_ASKED_BY[by]} on rank {of_rank}"

    def _asked(self, config: RunConfig, rank: int) -> str:
        if self.signal:
            return self.signal
        if config.max_minutes is not None and time.monotonic() - self.started >= 60 * config.max_minutes:
            return "the clock"
        return "the file" if rank == 0 and stop_file(config).exists() else ""


def stop_file(config: RunConfig) -> Path:
    """The file that ends a run where it is: `touch RUN/STOP`."""
    return Path(config.run_dir) / STOP_FILE


def refuse_if_stopped(config: RunConfig) -> None:
    """
    Raises:
        ConfigError: the run's stop file is there already.
    """
    if stop_file(config).exists():
        raise ConfigError(f"{os.fspath(stop_file(config))} is there, which stops this run: remove it to go on")
