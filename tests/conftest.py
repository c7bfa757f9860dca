"""Worlds of processes, shared by all tests of a session."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.helpers.world import World


@pytest.fixture(scope="module", autouse=True)
def no_groups_remain() -> Iterator[None]:
    """Groups that a module's tests made in this process end with it, and the threads that each of them has."""
    yield
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        from nvembed_mcore.parallel.groups import shutdown

        shutdown()
        gc.collect()


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    """Groups that nobody uses any more go with their threads, where a module makes them again and again."""
    yield
    if len(os.listdir("/proc/self/task")) > 200:
        gc.collect()


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], World]]:
    """`world(4).run(function, ...)` calls a function on four processes."""
    worlds: dict[int, World] = {}

    def get(size: int) -> World:
        if size not in worlds or not worlds[size].is_alive:
            worlds[size] = World(size)
        return worlds[size]

    yield get
    for one in worlds.values():
        one.stop()
