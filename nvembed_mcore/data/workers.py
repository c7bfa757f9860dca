"""Work spread over processes, with results in the order of the work."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2
"""Items handed to each worker beyond the one it works on: enough to keep it busy, few enough for the memory."""


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    processes: int | None = None,
    start: Callable[..., None] | None = None,
    start_arguments: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """`function` of every item, in order; at most a few items and results are held at once.

    One item alone, or one process, is worked on here: starting others takes seconds.

    Args:
        function: a function of a module; like items and results it goes to other processes.
        items: drawn as they are needed.
        processes: workers; None: one a core.
        start: called in each worker with `start_arguments` before its first item.

    Raises:
        what `function` or the iteration of `items` raises.
    """
    processes = num_cores() if processes is None else processes
    items = iter(items)
    begin = list(islice(items, 2))
    if len(begin) < 2 or processes == 1:
        if start:
            start(*start_arguments)
        yield from map(function, chain(begin, items))
        return
    # Not forked: this process may have threads (a tokenizer's, a process group's) that a fork would freeze.
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[Result]] = deque()
    with ProcessPoolExecutor(processes, context, initializer=start, initargs=start_arguments) as pool:
        try:
            for item in chain(begin, items):
                waiting.append(pool.submit(function, item))
                if len(waiting) > processes * (1 + AHEAD):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
