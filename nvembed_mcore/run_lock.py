"""One attempt at a time: a requeued job must not meet the ranks of the one before it in the same run folder."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from nvembed_mcore.exits import Exit

log = logging.getLogger(__name__)

LOCK_FILE = "lock"
PATIENCE_SECONDS = 15.0
"""Ranks of an attempt that failed are ended by their launcher within seconds."""


class RunInUseError(RuntimeError):
    """Another process trains in this run folder; another attempt may find it free."""

    exit_status = Exit.CRASHED


def lock(run_dir: Path, patience: float = PATIENCE_SECONDS) -> TextIO:
    """Take a run for this process, which has it until the file is closed or the process ends, however it does.

    Rank 0 alone calls this. File systems without locks are trusted, with a warning.

    Raises:
        RunInUseError: another process has had it for `patience` seconds.
    """
    file = (run_dir / LOCK_FILE).open("a+", encoding="utf-8")
    deadline = time.monotonic() + patience
    while not _is_taken(file):
        if time.monotonic() >= deadline:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise RunInUseError(f"{run_dir} is in use by {owner}; end it, or wait for its end")
        time.sleep(0.1)
    file.truncate(0)
    file.write(f"host {socket.gethostname()}, pid {os.getpid()}\n")
    file.flush()
    return file


def _is_taken(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning("%s cannot be locked (%s): nothing keeps a second process out of this run", file.name, error)
    return True
