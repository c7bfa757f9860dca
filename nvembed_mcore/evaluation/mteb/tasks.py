"""Tasks of mteb by name. Imports mteb, so only those import this who run it."""

from __future__ import annotations

import difflib

import mteb
from mteb.abstasks import AbsTask
from mteb.abstasks.aggregated_task import AbsTaskAggregate

from nvembed_mcore.evaluation.mteb.instructions import MtebError

ENGLISH = "english"
_BENCHMARK = "MTEB(eng, v1)"


def english_tasks() -> list[AbsTask]:
    """The 56 tasks that NV-Embed's table 1 averages: their English texts, `dev` of MSMARCO and `test` of the rest."""
    return list(mteb.get_benchmark(_BENCHMARK).tasks)


def find_tasks(names: list[str | AbsTask]) -> list[AbsTask]:
    """Tasks by name, each once, in the order given.

    A name is that of a task, of one of mteb's benchmarks, or `english`. One of the 56 English tasks is what it is
    there, whatever other languages and splits mteb has for it. A task object stands for itself.

    Raises:
        MtebError: mteb has no task and no benchmark of that name.
    """
    english = {task.metadata.name: task for task in english_tasks()}
    found: dict[str, AbsTask] = {}
    for name in names:
        for task in [name] if isinstance(name, AbsTask) else _find(name, english):
            found.setdefault(task.metadata.name, task)
    return list(found.values())


def _find(name: str, english: dict[str, AbsTask]) -> list[AbsTask]:
    if name == ENGLISH:
        return list(english.values())
    if name in english:
        return [english[name]]
    try:
        return [mteb.get_task(name)]
    except KeyError:
        pass
    try:
        return list(mteb.get_benchmark(name).tasks)
    except KeyError as error:
        known = [task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)]
        close = difflib.get_close_matches(name, known, 3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise MtebError(f"mteb {mteb.__version__} has no task and no benchmark {name!r}{hint}") from error


def parts_of(task: AbsTask) -> list[AbsTask]:
    """The tasks that are run for a task: itself, or those whose scores it averages."""
    if not isinstance(task, AbsTaskAggregate):
        return [task]
    return [part for one in task.metadata.tasks for part in parts_of(one)]
