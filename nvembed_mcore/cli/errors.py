"""How a command ends: its exit status, and one line for whoever started it; the trace is for whoever asks."""

from __future__ import annotations

import os
import select
import sys
import tempfile
import traceback
from collections.abc import Callable

from nvembed_mcore import redact
from nvembed_mcore.exits import Exit, exit_of

DEBUG = "NVEMBED_DEBUG"
"""Variable of the environment that `--debug` sets: with 1 every error is told with its trace."""
_LONGEST_MESSAGE = 500


def guarded(work: Callable[[], int | None], if_interrupted: str = "") -> int:
    """The status that `work` returns, or that its error means.

    What somebody foresaw becomes one message, on rank 0; anything else one line, on the rank where it happened. That
    nobody reads stdout any more, as in `nvembed search ... | head -1`, is no error.
    """
    try:
        status = work() or Exit.DONE
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        if _is_first():
            _say(f"nvembed: interrupted{if_interrupted}")
        return Exit.INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return Exit.DONE
        status = exit_of(error)
        _tell(error, status)
        return status


def _is_debugging() -> bool:
    return os.environ.get(DEBUG, "0") not in ("", "0")


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _nobody_reads() -> bool:
    """Whether it is stdout whose reader is gone; what is still to be written then goes nowhere."""
    try:
        pipe, poll = sys.stdout.fileno(), select.poll()
    except (AttributeError, OSError):  # it is no file
        return False
    poll.register(pipe, 0)
    if not any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, pipe)
    os.close(nowhere)
    return True


def _tell(error: Exception, status: int) -> None:
    """Say on stderr what ended the run: rank 0 what was foreseen, or who failed first; a rank that crashed its own.

    What ends another rank stands in that rank's log.
    """
    first = getattr(error, "follows", None)
    trace = redact.text("".join(traceback.format_exception(type(error), error, error.__traceback__)))
    if _is_debugging():
        sys.stderr.write(trace)
    if first is None and status == Exit.CRASHED:
        message = redact.text(" ".join(f"{type(error).__name__}: {error}".split()))[:_LONGEST_MESSAGE]
        where = "" if _is_debugging() else f" (its trace: {_keep(error, trace)}, or again with --debug)"
        _say(f"nvembed: error: internal: {message}{where}")
    elif _is_first():
        _say(f"nvembed: {'' if status == Exit.PREEMPTED else 'error: '}{redact.text(str(first or error))}")


def _keep(error: Exception, trace: str) -> str:
    """The file that has the trace: the log of this rank's attempt, or else a new one."""
    log = getattr(error, "log", "")
    if os.path.isfile(log):
        return log
    try:
        with tempfile.NamedTemporaryFile("w", prefix="nvembed-", suffix=".trace", delete=False) as file:
            file.write(trace)
    except OSError as unwritten:
        return f"nowhere, for {unwritten}"
    return file.name


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
