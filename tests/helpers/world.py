"""Real processes over gloo, started once for each world size and reused by every case."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable

TIMEOUT_SECONDS = 180


def _serve(rank: int, world_size: int, pipe) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        OMP_NUM_THREADS="1",
    )
    import torch

    from nvembed_mcore.parallel.groups import shutdown

    torch.set_num_threads(1)
    while True:
        job = pipe.recv()
        if job is None:
            return
        port, function, args, kwargs = job
        os.environ["MASTER_PORT"] = str(port)
        try:
            pipe.send((True, function(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        # Each group over gloo has threads of its own that wake up now and then: hundreds of them slow every test down.
        shutdown()


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class World:
    """`world_size` processes that run the same function, as torchrun's workers do."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, there), daemon=False)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable, *args, timeout_seconds: float = TIMEOUT_SECONDS, **kwargs) -> list:
        """Call `function` on every rank; return each rank's result, or raise with the first failing rank's trace."""
        port = free_port()
        for pipe in self.pipes:
            pipe.send((port, function, args, kwargs))
        deadline = time.monotonic() + timeout_seconds
        results, failures = [], []
        for rank, pipe in enumerate(self.pipes):
            # A failed rank leaves the others inside a collective: do not wait for them as long.
            if not pipe.poll(
                max(0.0, (min(deadline, time.monotonic() + 5) if failures else deadline) - time.monotonic())
            ):
                failures.append(f"rank {rank} did not answer")
                continue
            try:
                worked, result = pipe.recv()
            except EOFError:
                worked, result = False, "the process died"
            results.append(result)
            if not worked:
                failures.append(f"rank {rank}:\n{result}")
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return results

    @property
    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def stop(self) -> None:
        """End all processes, whatever they are doing."""
        for pipe in self.pipes:
            try:
                pipe.send(None)
            except OSError:
                pass
        for process in self.processes:
            process.join(timeout=3)
            if process.is_alive():
                process.kill()
                process.join()
