"""Answers of a language model to the prompts of `nvembed data prompts` as records."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nvembed_mcore.data.convert.intake import Document, Draft, Intake, LeftOut, text_of
from nvembed_mcore.data.convert.rows import file_items
from nvembed_mcore.data.faults import DataError, Fault
from nvembed_mcore.data.synthetic.answers import example_in


def synthetic(intake: Intake) -> Iterator[Draft]:
    """The first source holds the prompts of step two, the others rows of `id` and `answer`.

    A record's `query_id` is the prompt's id and its field `instruction` the task, for each record has one of its own.

    Raises:
        DataError: there is one source only, or a row of the prompts is wrong.
    """
    if len(intake.sources) < 2:
        raise DataError(f"give the file of prompts, then files of answers: there is only {intake.names()}")
    tasks = _tasks(intake)
    answered: set[str] = set()

    def parse(row: dict[str, Any]) -> Draft:
        key = text_of(row, "id")
        if key not in tasks:
            raise Fault(f"no prompt has the id {key!r}", "id")
        if key in answered:
            raise LeftOut("the prompt has an earlier answer")
        texts = example_in(text_of(row, "answer"))
        answered.add(key)
        more = {"instruction": tasks[key]}
        return Draft(texts["query"], [Document(texts["positive"])], [Document(texts["negative"])], key, more)

    for path in intake.sources[1:]:
        yield from intake.each(file_items(path, intake.bad), parse)
    if len(answered) < len(tasks):
        intake.counts.notes["prompts without a usable answer"] += len(tasks) - len(answered)


def _tasks(intake: Intake) -> dict[str, str]:
    """Id of each prompt -> its task."""
    reader = Intake(intake.sources[:1])
    tasks = dict(reader.rows(lambda row: (text_of(row, "id"), text_of(row, "task"))))
    reader.stop_if_bad()
    return tasks
