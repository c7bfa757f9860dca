"""The attempts of a run: logs of their own, the state for scripts, and which rank failed first.

    RUN/logs/0003/rank-0.log            what rank 0 said in the third attempt
                  first-failure.json    which rank failed first, if one did: the others' failures follow from it
    RUN/status.json                     what the newest attempt is at or came to (status.py)
    RUN/run.json                        all attempts and where their time went (run_record.py, goodput.py)

Nothing of an attempt overwrites the logs of another.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from nvembed_mcore import goodput, redact
from nvembed_mcore.checkpoint.best import read_best
from nvembed_mcore.checkpoint.folders import folder_of
from nvembed_mcore.config import RunConfig
from nvembed_mcore.data.faults import DataError
from nvembed_mcore.exits import Exit, Preempted, exit_of
from nvembed_mcore.log import TO_FILE_ONLY
from nvembed_mcore.run_lock import RunInUseError, lock
from nvembed_mcore.run_record import RunRecord
from nvembed_mcore.status import FIRST_FAILURE, STATUS_FILE, Status, read_status, write_json

log = logging.getLogger(__name__)

_STATES = {
    Exit.DONE: "done",
    Exit.NON_FINITE: "nonfinite",
    Exit.CRASHED: "crashed",
    Exit.STORAGE: "storage_error",
    Exit.PREEMPTED: "preempted",
    Exit.HANG: "hang",
    Exit.CONFIGURATION: "config_error",
    Exit.INTERRUPTED: "interrupted",
}
_OPERATIONS = {
    "productive": "step",
    "evaluation": "the evaluation after step",
    "save_stall": "the checkpoint of step",
}
_LOST_CONNECTION = ("closed by peer", "reset by peer", "Broken pipe", "Connection refused", "recvValue failed")
_LEFT_WITHOUT_A_WORD = "another rank went away before, without a word: killed (out of memory?), or its host is down"
_TRACEBACK_CHARACTERS = 8000
_WRITING_SECONDS = 2.0


class Attempt(AbstractContextManager):
    """One attempt at a run as one rank sees it, from the start of its process to its end.

    On the way out it records how the attempt ended. The rank that fails first says so for all. An error on another
    rank gets the first one's exit status, and an attribute `follows`: which rank it was, and why. Both get one more,
    `log`: the file of this rank that has the trace.

    Attributes:
        folder: of this attempt's logs; None before it has begun.
    """

    def __init__(self, config: RunConfig, started: float) -> None:
        """
        Args:
            started: `time.monotonic()` at the start of the process.
        """
        self._config, self._run_dir = config, Path(config.run_dir)
        self._rank = int(os.environ.get("RANK", "0"))
        self._ledger = goodput.Ledger(time.monotonic, started)
        self._record: RunRecord | None = None
        self._step, self._saved, self._saves = 0, None, 0
        self._in_loop = False
        self._operation = "the start"
        self._lock: TextIO | None = None
        self.folder: Path | None = None

    def take(self) -> Path:
        """Rank 0: keep other processes out of the run, and make the folder of this attempt's logs.

        Raises:
            RunInUseError: another process is at this run; its record is left alone.
        """
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self._run_dir)
        return next_folder(self._run_dir)

    def begin(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Every rank, with the folder that rank 0 made (`next_folder`).

        Args:
            facts: JSON values for `run.json`: layout and hardware.
        """
        self.folder = folder
        before = self._go_on_from_status()
        if self._rank == 0:
            ended = before is not None and before.exit_status is not None
            self._record = RunRecord(self._run_dir)
            self._record.begin(int(folder.name), self._ledger.elapsed(), before.state if ended else "killed", facts)
            self._write_status("running", None)

    def _go_on_from_status(self) -> Status | None:
        """Until the loop begins, the run stands where the attempt before left it."""
        try:
            before = read_status(self._run_dir)
        except ValueError as error:
            log.warning("%s", error)
            return None
        if before is not None:
            self._step, self._saved = before.step, before.checkpoint_step
        return before

    def starts_the_loop(self, step: int) -> None:
        """The run is built and goes on after `step`, that of its newest checkpoint, or 0."""
        self._ledger.starts_the_loop()
        self._in_loop = True
        self._step, self._saved = step, step or None
        if self._record is not None:
            self._record.go_on_after(self._ledger, step)
            self._write_status("running", None)

    @contextmanager
    def does(self, bucket: str, step: int) -> Iterator[None]:
        """Book the time of the block (goodput.BUCKETS), and know what went on where it fails.

        Args:
            step: optimizer steps done at its end.
        """
        self._operation = f"{_OPERATIONS[bucket]} {step}"
        with self._ledger.spends(bucket):
            yield
        self._operation, self._step = f"after step {step}", step

    def has_saved(self, step: int | None) -> None:
        """The newest checkpoint that this attempt completed is that of `step`; None: it has completed none."""
        if step in (None, self._saved):
            return
        self._saved, self._saves = step, self._saves + 1
        if self._record is not None:
            self._record.update(self._ledger, self._step, self._saves)
            self._write_status("running", None)

    def used(self, memory: Mapping[str, int]) -> None:
        """The memory of the attempt, for `run.json`; at its end."""
        if self._record is not None:
            self._record.add_facts({"peak_memory": dict(memory)})

    def hangs(self, error: Exception) -> None:
        """The watchdog ends this process, whose main thread may never come back: record why."""
        self.__exit__(type(error), error, None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._end("done", Exit.DONE)
            elif isinstance(error, Preempted):
                self._end("preempted", Exit.PREEMPTED, error.reason)
            else:
                self.fail(error)
        finally:
            if self._lock is not None:
                self._lock.close()

    def fail(self, error: BaseException) -> None:
        """Record that this rank fails; also for a thread that is about to end the process."""
        try:
            self._fail(error)
        except OSError:
            # The disk may be full. What ends the run matters more than its record.
            log.warning("could not record in %s how the run ended", self._run_dir, exc_info=True)

    def _fail(self, error: BaseException) -> None:
        if self._in_loop:
            _set_status_of_a_running_run(error)
        if self.folder is None:
            # Refused before it began: told in a folder that is there, and no reason to make one.
            if self._rank != 0 or not self._run_dir.is_dir() or isinstance(error, RunInUseError):
                return
            try:
                self._lock = self._lock or lock(self._run_dir, patience=0)
            except RunInUseError:
                return  # the record is that of a run that goes on
            self.folder = next_folder(self._run_dir)
            self._go_on_from_status()
        status = exit_of(error)
        error.log = str(self.folder / f"rank-{self._rank}.log")
        first = _claim(self.folder / FIRST_FAILURE, self._failure(error, status))
        if first["rank"] == self._rank:
            log.error("this rank fails first, with status %d", status, exc_info=error, extra=TO_FILE_ONLY)
            self._write_status(first["state"], status, first["error"])
        else:
            error.exit_status = status = Exit(first["exit_status"])
            error.follows = "rank {rank} on {host} failed first, in {operation}: {error}".format(**first)
            log.error("status %d follows: %s", status, error.follows, exc_info=error, extra=TO_FILE_ONLY)
        self._end(first["state"], status, first["error"])

    def _failure(self, error: BaseException, status: Exit) -> dict[str, Any]:
        """What this rank would write as the first that fails."""
        trace = traceback.format_exception(type(error), error, error.__traceback__)
        failure = {
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": self._step,
            "operation": self._operation,
            "error": f"{type(error).__name__}: {error}",
            "hint": _LEFT_WITHOUT_A_WORD if _is_lost_connection(error) else "",
            "state": "data_error" if isinstance(error, DataError) else _STATES[status],
            "exit_status": int(status),
            "time": _time(),
            "traceback": redact.text("".join(trace))[-_TRACEBACK_CHARACTERS:].splitlines(),
        }
        return redact.tree(failure)

    def _end(self, state: str, status: Exit, reason: str = "") -> None:
        """Rank 0 writes how it ended, even where another rank has: a write of its own may have come in between."""
        if self._rank == 0:
            self._write_status(state, status, reason)
        if self._record is not None:
            step = self._step if self._in_loop else None
            self._record.close(self._ledger, step, self._saves, state, status)

    def _write_status(self, state: str, exit_status: Exit | None, reason: str = "") -> None:
        best = None
        with suppress(ValueError):  # what others made of the file is told where it is needed
            best = read_best(folder_of(self._run_dir))
        status = Status(
            state=state,
            exit_status=None if exit_status is None else int(exit_status),
            step=self._step,
            steps=self._config.steps,
            samples_seen=self._step * self._config.batch_size,
            checkpoint_step=self._saved,
            best_step=best and best.step,
            best_value=best and best.value,
            reason=reason,
            attempt=int(self.folder.name),
            host=socket.gethostname(),
            time=_time(),
        )
        write_json(self._run_dir / STATUS_FILE, dataclasses.asdict(status))


def next_folder(run_dir: str | Path) -> Path:
    """Make the folder of the next attempt's logs, and the run's own where it is missing; rank 0 alone calls this."""
    logs = Path(run_dir) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in logs.iterdir() if path.name.isdigit()), default=0) + 1
    folder = logs / f"{number:04d}"
    folder.mkdir()
    return folder


def _claim(file: Path, failure: dict[str, Any]) -> dict[str, Any]:
    """Write the first failure unless another rank has; returns the first one's."""
    try:
        with open(file, "x", encoding="utf-8") as new:
            new.write(json.dumps(failure, indent=1) + "\n")
            new.flush()
            os.fsync(new.fileno())
        return failure
    except FileExistsError:
        pass
    until = time.monotonic() + _WRITING_SECONDS
    while time.monotonic() < until:
        with suppress(ValueError):  # the first rank is still at it
            first = json.loads(file.read_text(encoding="utf-8"))
            if failure.keys() <= first.keys():
                return first
        time.sleep(0.01)
    return failure  # its disk was full


def _set_status_of_a_running_run(error: BaseException) -> None:
    """What a user could mend was found at the start; the same classes mean something else in the middle of a run."""
    if getattr(error, "exit_status", None) is not None or isinstance(error, KeyboardInterrupt):
        return
    if isinstance(error, OSError) and not isinstance(error, (ConnectionError, TimeoutError)):
        error.exit_status = Exit.STORAGE
    elif not type(error).__module__.startswith("nvembed_mcore."):
        error.exit_status = Exit.CRASHED


def _is_lost_connection(error: BaseException) -> bool:
    return any(words in str(error) for words in _LOST_CONNECTION)


def _time() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
