"""Real processes over gloo, started once for each world size and reused by every case."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

TIMEOUT_SECONDS = 180


def _serve(rank: int, pipe, first: Callable[[], None] | None) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        OMP_NUM_THREADS="1",
    )
    if first is not None:
        first()
    import torch

    from nvembed_mcore.parallel.groups import shutdown

    torch.set_num_threads(1)
    is_first = True
    while True:
        job = pipe.recv()
        if job is None:
            return
        port, size, function, args, kwargs = job
        os.environ.update(MASTER_PORT=str(port), WORLD_SIZE=str(size))
        try:
            pipe.send((True, function(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        # Each group over gloo has threads of its own that wake up now and then: hundreds of them slow every test down.
        # Models and optimizers refer to their groups in circles, so the groups are there until these are collected.
        shutdown()
        gc.collect()
        if is_first:
            gc.freeze()  # what the first job imported: not to be looked through after each
        is_first = False


def free_port() -> int:
    """A port of the loopback that nobody listens on, and from which the kernel takes none for outgoing connections:
    other tests make many of these before this one is used."""
    draw = random.SystemRandom()
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", draw.randrange(10_000, 17_000)))
            return probe.getsockname()[1]


class World:
    """`world_size` processes that run the same function, as torchrun's workers do."""

    def __init__(self, world_size: int, first: Callable[[], None] | None = None) -> None:
        """`first`: called in each process before it imports Megatron-Core."""
        # Imports take 5 seconds of processor time, so they are made once and the processes forked from there.
        context = multiprocessing.get_context("spawn" if first else "forkserver")
        if first is None:
            context.set_forkserver_preload(["nvembed_mcore.train"])
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, there, first), daemon=False)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(
        self,
        function: Callable,
        *args,
        timeout_seconds: float = TIMEOUT_SECONDS,
        ranks: int | None = None,
        **kwargs,
    ) -> list:
        """Call `function` on every rank; return each rank's result, or raise with the first failing rank's trace.

        `ranks`: run a smaller world on the first so many processes.
        """
        port, pipes = free_port(), self.pipes[:ranks]
        for pipe in pipes:
            pipe.send((port, len(pipes), function, args, kwargs))
        deadline = time.monotonic() + timeout_seconds
        results, failures = [], []
        for rank, pipe in enumerate(pipes):
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
