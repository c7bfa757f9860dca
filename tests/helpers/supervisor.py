"""The ranks of a run as fresh processes that may be killed, stopped and signalled: what srun does on one host.

A fresh Python takes seconds to import torch and Megatron-Core. So ranks are forked from a server process that has
imported them once and has no thread, no group and no run of its own; a rank begins in a few hundredths of a second.

    with Ranks([str(config)], 2, tmp_path / "logs", env={"NVEMBED_FAULT": "kill@data:1:5"}) as ranks:
        assert ranks.wait(60) == [-signal.SIGKILL, -signal.SIGKILL]
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing import connection
from pathlib import Path

from nvembed_mcore.log import METRICS_FILE, read_metrics
from tests.helpers.world import free_port

PRELOAD = (
    "nvembed_mcore.cli.train",
    "nvembed_mcore.cli.run_config",
    "nvembed_mcore.train",
    "datasets",
    "jsonargparse",
    "tests.helpers.runs",
    "tests.helpers.supervisor",
)
POLL_SECONDS = 0.02
# Of the allocator in pyarrow: its thread would run in the server.
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"


class Ranks:
    """The processes of `nvembed train ...`, started at once; each leads a session of its own.

    `with` leaves nothing behind: no rank, and no process that a rank started.
    """

    def __init__(
        self,
        arguments: list[str],
        world_size: int,
        log_dir: str | Path,
        env: Mapping[str, str] | None = None,
        env_of_rank: Mapping[int, Mapping[str, str]] | None = None,
        kill_others_after: float | None = 3.0,
    ) -> None:
        """
        Args:
            arguments: what follows `nvembed train`.
            log_dir: gets `output-RANK.txt`, to which a rank's stdout and stderr are appended.
            env: variables of every rank, over those of this process.
            env_of_rank: variables of single ranks, over `env`.
            kill_others_after: seconds that the other ranks may live, while `wait` looks, after one ended with a status
                that is not 0 (srun's `--kill-on-bad-exit`); None: as long as they like.
        """
        self.arguments = arguments
        self.log_dir = Path(log_dir)
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self._kill_others_after = kill_others_after
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOAD])
        shared = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", **(env or {})}
        self.processes = []
        for rank in range(world_size):
            own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | dict((env_of_rank or {}).get(rank, {}))
            args = (arguments, {**os.environ, **own}, self._output_file(rank))
            # Not daemonic: those may have no children.
            process = context.Process(target=_run_rank, args=args, name=f"rank {rank}", daemon=False)
            process.start()
            self.processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def exit_codes(self) -> list[int | None]:
        """By rank: the exit status, minus the signal that ended it, or None while it runs."""
        return [process.exitcode for process in self.processes]

    def wait(self, timeout: float) -> list[int]:
        """Exit codes by rank when all ranks have ended.

        Raises:
            AssertionError: some still run after `timeout` seconds; all are killed, and the message has what they said.
        """
        deadline, bad_since = time.monotonic() + timeout, None
        while running := [process for process in self.processes if process.exitcode is None]:
            now = time.monotonic()
            if bad_since is None and any(self.exit_codes()):
                bad_since = now
            if bad_since is not None and self._kill_others_after is not None:
                if now >= bad_since + self._kill_others_after:
                    self.stop()
                    break
            if now >= deadline:
                codes = self.exit_codes()
                self.stop()
                raise AssertionError(f"after {timeout} s the exit codes are {codes}\n{self.outputs()}")
            connection.wait([process.sentinel for process in running], timeout=0.1)
        return [process.exitcode for process in self.processes]

    def wait_until(self, condition: Callable[[], bool], timeout: float = 60.0) -> None:
        """Return as soon as `condition()` holds.

        Raises:
            AssertionError: it does not within `timeout` seconds, or all ranks ended before it did.
        """
        deadline = time.monotonic() + timeout
        while not condition():
            # What the last rank did last may have made it true.
            if None not in self.exit_codes() and not condition():
                raise AssertionError(f"all ranks ended before it, with {self.exit_codes()}\n{self.outputs()}")
            if time.monotonic() >= deadline:
                raise AssertionError(f"not within {timeout} s\n{self.outputs()}")
            time.sleep(POLL_SECONDS)

    def wait_for_step(self, step: int, timeout: float = 60.0) -> None:
        """Return as soon as `metrics.jsonl` of the run has the training step."""
        from nvembed_mcore.cli.run_config import read_run_config

        run_dir = read_run_config(self.arguments).run_dir
        self.wait_until(lambda: last_step(run_dir) >= step, timeout)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to one rank; nothing when it has ended."""
        if self.processes[rank].exitcode is None:
            os.kill(self.processes[rank].pid, number)

    def stop(self) -> None:
        """SIGKILL to every rank and to what ranks have started; returns when the ranks are gone."""
        for process in self.processes:
            process.kill()  # also one that has no session yet; a stopped process dies of it too
        for process in self.processes:
            process.join()
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it started nothing, or nothing that is left

    def output(self, rank: int) -> str:
        """What a rank has written to stdout and stderr."""
        file = self._output_file(rank)
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    def outputs(self) -> str:
        """The end of what each rank has said, for a failing test's message."""
        return "\n".join(f"rank {rank}:\n{self.output(rank)[-3000:]}" for rank in range(len(self.processes)))

    def _output_file(self, rank: int) -> Path:
        return self.log_dir / f"output-{rank}.txt"


def last_step(run_dir: str | Path) -> int:
    """The last training step in a run's `metrics.jsonl`; 0 when there is none."""
    file = Path(run_dir) / METRICS_FILE
    lines = read_metrics(file) if file.exists() else []
    return max((line["step"] for line in lines if "loss" in line), default=0)


def _run_rank(arguments: list[str], env: dict[str, str], output: Path) -> None:
    """A rank's whole life. The server must have one thread: a lock that another holds stays locked in a fork."""
    gc.freeze()  # a full collection of what the server imported takes a third of a second
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    assert "nvembed_mcore.train" in sys.modules, "the server did not import the trainer"
    assert len(os.listdir(f"/proc/{os.getppid()}/task")) == 1, "the server has threads"
    os.environ.clear()
    os.environ.update(env)
    from nvembed_mcore.cli import end_now, main

    end_now(main(["train", *arguments]))
