"""What the exit status of `nvembed` means, and which failure ends with which (docs/operations.md)."""

from __future__ import annotations

import errno
from enum import IntEnum


class Exit(IntEnum):
    """Exit statuses; those from 64 on are of sysexits.h where it has a name for the same thing."""

    DONE = 0
    NON_FINITE = 65
    """The loss or its gradient is not a number: the same data and weights would give it again. Never requeue."""
    CRASHED = 70
    """Anything that nobody foresaw; one line says where its trace is. Requeue if the run made progress."""
    STORAGE = 74
    """A checkpoint or the data could not be written or read. Requeue if the run made progress."""
    PREEMPTED = 75
    """Saved and stopped because somebody asked. Requeue."""
    HANG = 76
    """A rank was silent for too long. Requeue if the run made progress."""
    CONFIGURATION = 78
    """The configuration or the data cannot work, and nothing was changed. Never requeue."""
    INTERRUPTED = 130


class Preempted(Exception):
    """The run stopped where it was asked to, with a checkpoint; the same command goes on.

    Attributes:
        step: optimizer steps done.
        reason: who asked.
    """

    exit_status = Exit.PREEMPTED

    def __init__(self, step: int, reason: str, *, is_saved: bool = True) -> None:
        """`is_saved`: whether these steps are; not where `checkpoint.every_steps` is 0."""
        then = "goes on" if is_saved else "takes these steps again, for checkpoint.every_steps is 0: nothing was saved"
        super().__init__(f"stopped after step {step}: {reason}; the same command {then}")
        self.step, self.reason = step, reason


class StorageError(OSError):
    """Something could not be written or read while a run was going; the message names the file and why."""

    exit_status = Exit.STORAGE


_OF_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EROFS)


def exit_of(error: BaseException) -> Exit:
    """The exit status that an error means: its own, STORAGE for a full or broken disk, CONFIGURATION for what a user
    can mend.
    """
    own = getattr(error, "exit_status", None)
    if own is not None:
        return own
    if isinstance(error, KeyboardInterrupt):
        return Exit.INTERRUPTED
    if isinstance(error, OSError) and error.errno in _OF_STORAGE:
        return Exit.STORAGE
    if isinstance(error, (ConnectionError, TimeoutError)):
        return Exit.CRASHED
    return Exit.CONFIGURATION if isinstance(error, (ValueError, OSError)) else Exit.CRASHED
