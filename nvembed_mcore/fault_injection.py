"""Failures on request, to rehearse them: `NVEMBED_FAULT=kill@before_pointer:0:500 nvembed train ...`.

The variable holds faults with commas between: `ACTION@POINT[:RANK[:STEP]]`. Without a rank every rank does it, without
a step it happens at the first. Points:

    step_begin, data, step_end                          in every step
    before_shard, mid_shard, after_shard                while a rank writes its file of a checkpoint
    before_publish, before_pointer, after_pointer, during_prune     on rank 0, when all files are written

Actions: `kill` (SIGKILL to this process), `stop` (SIGSTOP), `sleep=SECONDS`, `full` (`No space left on device`),
`error` (a plain RuntimeError), `barrier` (one that only the ranks of the fault enter).
"""

from __future__ import annotations

import errno
import os
import signal
import time

import torch

VARIABLE = "NVEMBED_FAULT"
_done: set[str] = set()


def point(name: str, step: int | None = None) -> None:
    """Fail here if `NVEMBED_FAULT` says so for this point, rank and step; each fault happens once a process."""
    for fault in os.environ.get(VARIABLE, "").split(",") if VARIABLE in os.environ else ():
        action, _, place = fault.partition("@")
        wanted, rank, at_step, *_ = [*place.split(":"), "", ""]
        here = wanted == name and rank in ("", os.environ.get("RANK", "0")) and at_step in ("", str(step))
        if here and fault not in _done:
            _done.add(fault)
            _fail(action, fault)


def _fail(action: str, fault: str) -> None:
    kind, _, value = action.partition("=")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "sleep":
        time.sleep(float(value))
    elif kind == "barrier":
        torch.distributed.barrier()
    elif kind == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif kind == "error":
        raise RuntimeError(f"the failure that {fault} asked for")
    else:
        raise ValueError(f"{VARIABLE}: no action {action!r} in {fault!r}")
