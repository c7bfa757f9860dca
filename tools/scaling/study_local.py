"""Runs a study's points on this machine, one after the other."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import psutil
from study_runs import Run, end_of_log, environment

from nvembed_mcore.progress import show_each
from nvembed_mcore.status import write_json

Tell = Callable[[str], None]


def run_all(runs: Sequence[Run], minutes: float, tell: Tell) -> list[Run]:
    """Run what is not complete, in order; one that fails is told of and does not stop the others.

    Args:
        minutes: a run that takes longer is ended, and has failed.

    Returns:
        those that failed.
    """
    failed = []
    todo = [run for run in runs if not run.is_complete()]
    tell(f"{len(runs)} runs, {len(runs) - len(todo)} of them complete")
    for number, run in enumerate(show_each(todo, "study", "runs"), 1):
        begin = time.monotonic()
        ended = _run(run, 60 * minutes)
        what = f"{number} of {len(todo)}: {run.point.name}, repeat {run.repeat}"
        if run.is_complete():
            tell(f"{what}: {time.monotonic() - begin:.0f} s")
        else:
            failed.append(run)
            tell(f"{what} FAILED ({ended})\n{end_of_log(run)}")
    return failed


def command_of(run: Run) -> list[str]:
    """The command that starts all its processes on this machine."""
    train = ["-m", "nvembed_mcore", "train", *run.arguments]
    if run.point.gpus == 1:
        return [sys.executable, *train]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={run.point.gpus}"]
    return [sys.executable, *launch, *train]


def _run(run: Run, limit: float) -> str:
    """Start its processes and wait; how they ended. None remains, whatever happens here."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    begin, busy, own = time.monotonic(), _busy_seconds(), _own_seconds()
    with open(run.log, "w", encoding="utf-8") as log:
        process = subprocess.Popen(  # noqa: S603
            command_of(run), stdout=log, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
        )
        try:
            status = process.wait(limit)
            others = (_busy_seconds() - busy) - (_own_seconds() - own)
            share = max(0.0, others / (time.monotonic() - begin) / psutil.cpu_count())
            write_json(run.load, {"others_cpu": round(share, 4)})
            return f"status {status}"
        except subprocess.TimeoutExpired:
            return f"ended at its limit of {limit / 60:g} minutes"
        finally:
            _end(process)


def _busy_seconds() -> float:
    """Of all cores of this machine, since it started, but for processes of low priority, which take what is left."""
    times = psutil.cpu_times()
    return times.user + times.system


def _own_seconds() -> float:
    """Of the processes that this one started and waited for, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _end(process: subprocess.Popen) -> None:
    """End what is left of the run; the ranks are in their leader's session, torchrun's workers in their own."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(45)  # torchrun gives its workers 30 s
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
