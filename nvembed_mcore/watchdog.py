"""Ranks that watch each other, so that a hang ends the run within `parallel.timeout_minutes` and names who is late.

Two threads a rank. The *courier* carries beats (`beats.py`) to the run's store and back, over a connection of its own:
a main thread that waits in a collective does not hold it up. It may get stuck itself, when the store's host freezes,
so the *watch* looks at what it brought and talks to nobody. Rank 0 sees all beats and decides; the others see its beat
and its verdict, so traffic grows with the number of ranks only.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from nvembed_mcore.beats import DISTRESS, ENDED, FAILED, LOST_BEATS, PATIENCE_BEATS, RUNNING, Beat, Table, Verdict
from nvembed_mcore.exits import Exit
from nvembed_mcore.parallel.groups import Groups, every_rank_does, own_connection
from nvembed_mcore.stragglers import host

log = logging.getLogger(__name__)

LONGEST_INTERVAL = 2.0
"""Seconds between beats; a tenth of the timeout where that is less. Rank 0 reads some 150 bytes a rank each time."""
LAST_WORDS_SECONDS = 10.0
"""A process that must end does so after this even if its stacks or its log cannot be written (a dead file system)."""
_PACKAGE = str(Path(__file__).parent)


class LostRankError(RuntimeError):
    """Why the ranks cannot go on together: one is silent, late, gone, or has failed."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.message)
        self.exit_status = Exit(verdict.status)


class Watch:
    """The watchdog of one rank; use it in a `with` block, on every rank at once.

    In the block `kill -USR2` to a rank writes its threads' stacks to `stacks-rank-R.txt`, and the run goes on. A hang
    writes those of every rank that lives and ends the process with `Exit.HANG`. A collective that failed leaves the
    block as `LostRankError`.
    """

    def __init__(
        self, groups: Groups, timeout_seconds: float, folder: Path, record: Callable[[LostRankError], None]
    ) -> None:
        """
        Args:
            timeout_seconds: that an operation of a step may last, and a rank may be silent.
            folder: of the attempt's logs, for the stacks.
            record: keeps why the process ends, where its main thread cannot.
        """
        self.rank, self.folder, self._record = groups.rank, folder, record
        self.timeout, self.interval = timeout_seconds, min(LONGEST_INTERVAL, timeout_seconds / 10)
        self._now = ("start", 0, time.monotonic())
        self._looked = time.monotonic()
        self._count, self._state, self._error = 0, RUNNING, ""
        self._verdict: Verdict | None = None
        self._store_error = ""
        self._closing, self._call, self._carried = threading.Event(), threading.Event(), threading.Event()
        self._decided, self._taken = threading.Event(), threading.Event()
        places = every_rank_does(lambda: f"host {host()}, pid {os.getpid()}", dist.group.WORLD)
        self._store = None
        watched = range(groups.world_size) if self.rank == 0 else [0]
        self._table = Table(watched, places, self.interval, self.timeout)
        self._news = dict(self._table.beats)
        if groups.world_size > 1:
            self._store = dist.PrefixStore(f"watch/{folder.name}", own_connection())

    def enter(self, operation: str, step: int | None = None) -> None:
        """The main thread begins something else: of this step, if it does not say of which."""
        self._now = (operation, self._now[1] if step is None else step, time.monotonic())

    def __enter__(self) -> Watch:
        self._stacks = (self.folder / f"stacks-rank-{self.rank}.txt").open("a", encoding="utf-8")
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        if self._store is not None:
            # Before anybody reads: reading waits for what is not there.
            self._store.set(str(self.rank), Beat().encode())
            if self.rank == 0:
                self._store.set("verdict", "")
        self._threads = [threading.Thread(target=self._watch, name="watch", daemon=True)]
        if self._store is not None:
            self._threads.append(threading.Thread(target=self._carry, name="courier", daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        lost = self._explain(error) if error is not None and self._store is not None and _is_of(error) else None
        if error is not None and not lost:
            self._say(FAILED, f"{kind.__name__}: {error}")
        else:
            self._say(ENDED)
        if error is not None and self.rank == 0 and self._store is not None:
            self._linger()
        self._close()
        if lost:
            raise LostRankError(lost) from error

    def _close(self) -> None:
        self._closing.set()
        self._call.set()
        for thread in self._threads:
            # A courier may be stuck for ever. It is daemonic.
            thread.join(timeout=2 * self.interval + 1)
        faulthandler.unregister(signal.SIGUSR2)
        self._stacks.close()
        path = Path(self._stacks.name)
        if path.stat().st_size == 0:
            path.unlink()

    # What the threads do.

    def _beat(self) -> Beat:
        operation, step, began = self._now
        # Frozen and just awake, the courier may be quicker than the watch, which sees that (`_watch`).
        now = min(time.monotonic(), self._looked + 2 * self.interval)
        seconds = round(max(0.0, now - began), 1)
        return Beat(self._count, operation, step, seconds, _line_of_main_thread(), self._state, self._error)

    def _carry(self) -> None:
        """Every interval, or when called: the own beat to the store, and the beats to watch from it."""
        watched = [str(rank) for rank in self._table.beats]
        try:
            while True:
                self._call.clear()
                is_last = self._closing.is_set()
                self._count += 1
                self._store.set(str(self.rank), self._beat().encode())
                if self.rank == 0 and self._verdict:
                    self._store.set("verdict", self._verdict.encode())
                *beats, verdict = self._store.multi_get([*watched, "verdict"])
                self._news = {int(rank): Beat.decode(beat) for rank, beat in zip(watched, beats, strict=True)}
                self._verdict = self._verdict or Verdict.decode(verdict)
                self._carried.set()
                if is_last:
                    return
                self._call.wait(self.interval)
        except RuntimeError as error:
            self._store_error = str(error).partition("\n")[0]

    def _watch(self) -> None:
        while not self._closing.wait(self.interval):
            elapsed = time.monotonic() - self._looked
            if elapsed > self.interval + self.timeout / 2:
                # This process was frozen: its operation did not last as long as the clock says.
                self._now = (*self._now[:2], self._now[2] + elapsed)
            self._looked += elapsed
            if self._store is None:
                self._count += 1
                self._news = {0: self._beat()}
            self._table.see(self._news, elapsed)
            self._verdict = self._verdict or self._judge()
            if self._verdict:
                self._act(self._verdict)
                return

    def _judge(self) -> Verdict | None:
        table, silent = self._table, self._table.silent[0]
        if self.rank == 0:
            if silent >= self.timeout:
                return Verdict(Exit.HANG, f"the store at which the ranks meet has not answered for {silent:.0f} s")
            return table.judge()
        # Who is late is for rank 0 to say, as long as it speaks.
        if self._state == DISTRESS and (self._store_error or silent >= LOST_BEATS * self.interval):
            return Verdict(Exit.CRASHED, table.fate(0))
        return Verdict(Exit.HANG, table.silence(0)) if silent >= self.timeout else None

    def _act(self, verdict: Verdict) -> None:
        """End this process; but if its main thread knows already that something failed, it may do so itself."""
        self._decided.set()
        self._call.set()
        if verdict.status != Exit.HANG and (self._state == FAILED or self._taken.wait(3 * self.interval)):
            return
        at_last = threading.Timer(LAST_WORDS_SECONDS, os._exit, [verdict.status])
        at_last.daemon = True
        at_last.start()
        # A write of stacks that never returns holds Python's lock, so that the timer cannot run. The kernel can.
        signal.alarm(math.ceil(2 * LAST_WORDS_SECONDS))
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        log.critical(
            "%s. Stacks of all ranks that could write them: %s. This rank ends with status %d",
            verdict.message,
            self.folder / "stacks-rank-*.txt",
            verdict.status,
        )
        self._record(LostRankError(verdict))
        self._say(ENDED)
        if self.rank == 0 and self._store is not None:
            self._linger()
        logging.shutdown()
        os._exit(verdict.status)

    # What both may do.

    def _say(self, state: str, error: str = "") -> None:
        """Tell the others at once, if the store still answers."""
        self._state, self._error = state, error[:500]
        if self._store is not None:
            self._carried.clear()
            self._call.set()
            self._carried.wait(self.interval)

    def _linger(self) -> None:
        """Rank 0 may host the store: it waits until the others have read what it says, or have fallen silent."""
        deadline = time.monotonic() + (LOST_BEATS + 1) * self.interval
        while time.monotonic() < deadline and any(
            beat.state in (RUNNING, DISTRESS) and self._table.silent[rank] < LOST_BEATS * self.interval
            for rank, beat in self._news.items()
            if rank != self.rank
        ):
            self._call.set()
            time.sleep(self.interval / 10)

    def _explain(self, error: BaseException) -> Verdict:
        """Which rank is behind a failed collective; the main thread calls this."""
        text = str(error).partition("\n")[0]
        if not self._decided.is_set():
            log.error("a collective failed: %s. Finding out which rank is behind it", text)
            self._say(DISTRESS, text)
        self._decided.wait((PATIENCE_BEATS + 2) * self.interval)
        self._taken.set()
        return self._verdict or Verdict(Exit.CRASHED, f"a collective failed, and nobody says why: {text}")


def _is_of(error: BaseException) -> bool:
    """Whether it is of a collective: gloo raises plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _line_of_main_thread() -> str:
    """The innermost line of this package that the main thread is in, as `step.py:120 in _share`."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "outside nvembed_mcore"
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
