"""Work spread over processes, with results in the order of the work."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from nvembed_mcore.data.faults import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2
"""Items handed to each worker beyond the one it works on: enough to keep it busy, few enough for the memory."""
MOST_PROCESSES = 32
"""More workers would wait for the one process that reads, and all that they are handed is in its memory."""


def num_workers() -> int:
    """One for each core that this process may use, up to `MOST_PROCESSES`."""
    return min(len(os.sched_getaffinity(0)), MOST_PROCESSES)


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    processes: int | None = None,
    start: Callable[..., None] | None = None,
    start_arguments: tuple[Any, ...] = (),
    what: str = "the data",
) -> Iterator[Result]:
    """`function` of every item, in order; at most a few items and results are held at once.

    One item alone, or one process, is worked on here: starting others takes seconds.

    Args:
        function: a function of a module; like items and results it goes to other processes.
        items: drawn as they are needed.
        processes: workers; None: as `num_workers` says.
        start: called in each worker with `start_arguments` before its first item.
        what: how a message calls what is read.

    Raises:
        DataError: a worker was ended from outside.
        what `function` or the iteration of `items` raises.
    """
    processes = num_workers() if processes is None else processes
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
    with ProcessPoolExecutor(processes, context, _begin, (start, start_arguments)) as pool:
        try:
            for item in chain(begin, items):
                waiting.append(pool.submit(function, item))
                if len(waiting) > processes * (1 + AHEAD):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(f"a process that read {what} was ended from outside (out of memory?)") from error
        finally:
            for future in waiting:
                future.cancel()


def _begin(start: Callable[..., None] | None, start_arguments: tuple[Any, ...]) -> None:
    """The first thing that a worker does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if start:
        start(*start_arguments)


def _end_with_parent() -> None:
    """A process that is killed cannot end its workers, which would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)
