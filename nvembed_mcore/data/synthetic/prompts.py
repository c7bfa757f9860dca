"""Prompts for synthetic data in two steps: NV-Embed's section 4.3, E5-Mistral's method, words of our own.

Step one asks a language model to think of search tasks, step two asks it for one example of a task. What makes prompts
differ (field, length, style, language, ...) is drawn by seed from `choices.json`. Prompts and answers are files: no
model is called here.

A folder of templates has `choices.json`, `brainstorm.txt`, `short_long.txt`, `long_short.txt` and `short_short.txt`.
In these texts `$name` is a placeholder. Step one fills in `tasks`, `given`, `wanted` and `example`, step two `task`
and `language`, and both what the choices name.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any

from nvembed_mcore.data.convert.intake import Intake, check_output, text_of
from nvembed_mcore.data.convert.rows import json_document
from nvembed_mcore.data.faults import DataError, Fault
from nvembed_mcore.data.records import content_id, write_records
from nvembed_mcore.data.synthetic.answers import tasks_in

TEMPLATES = Path(__file__).parent / "templates"
SHAPES = {
    "short-long": {
        "given": "a short query",
        "wanted": "long documents",
        "example": "Given a question about a household device, find the pages of manuals that answer it",
    },
    "long-short": {
        "given": "a long text",
        "wanted": "short texts, such as titles, answers, names or categories",
        "example": "Given the story of a court case, find the point of law that decides it",
    },
    "short-short": {
        "given": "a sentence or less",
        "wanted": "texts that are as short",
        "example": "Given a proverb, find one that gives the opposite advice",
    },
}
"""The shapes of NV-Embed's synthetic data: what stands in the first prompt of each."""


class _Templates:
    """The texts of a folder with the choices that fill them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._choices = json_document(folder / "choices.json")

    def fill(self, name: str, rng: random.Random, **values: str) -> tuple[str, dict[str, str]]:
        """Template `name` with values and drawn choices; the text, and what was drawn.

        Raises:
            DataError: a file is missing or wrong.
        """
        drawn = {what: rng.choice(some) for what, some in self._of(name).items()}
        path = self._folder / f"{name.replace('-', '_')}.txt"
        try:
            text = Template(path.read_text(encoding="utf-8")).substitute(drawn, **values)
        except FileNotFoundError as error:
            raise DataError(f"no template at {path}") from error
        except KeyError as error:
            raise DataError(f"{path}: nothing fills in ${error.args[0]}; choices.json of its folder may") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8: byte {error.start} ({error.reason})") from error
        except ValueError as error:
            raise DataError(f"{path}: {str(error)[0].lower()}{str(error)[1:]}; a dollar sign is written $$") from error
        return text.strip(), drawn

    def _of(self, name: str) -> dict[str, list[str]]:
        choices = self._choices.get(name, {})
        lists = choices.values() if isinstance(choices, dict) else [None]
        if not all(isinstance(some, list) and some and all(isinstance(one, str) for one in some) for some in lists):
            raise DataError(f"{self._folder / 'choices.json'}: {name} must be an object with lists of strings")
        return choices


def brainstorm(
    output: str | Path,
    *,
    count: int,
    tasks: int = 20,
    shapes: Sequence[str] = tuple(SHAPES),
    seed: int = 0,
    templates: str | Path = TEMPLATES,
) -> dict[str, int]:
    """Write the prompts of step one: rows of `id`, `shape`, `prompt` and `choices`, in turn one of each shape.

    Args:
        output: JSONL file to write.
        count: prompts.
        tasks: tasks that each asks for.
        shapes: keys of `SHAPES`.
        seed: decides what is drawn.
        templates: folder of templates.

    Returns:
        Figures under the names that a user reads.

    Raises:
        DataError: a template is missing or wrong, or `output` is not named `.jsonl`.
    """
    check_output(output)
    source = _Templates(Path(templates))

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(count):
            shape = shapes[number % len(shapes)]
            rng = random.Random(f"{seed}/brainstorm/{shape}/{number}")
            prompt, drawn = source.fill("brainstorm", rng, tasks=str(tasks), **SHAPES[shape])
            yield {"id": f"brainstorm/{shape}/{number}", "shape": shape, "prompt": prompt, "choices": drawn}

    return {"prompts written": write_records(output, rows())}


def write(
    answers: Sequence[str | Path],
    output: str | Path,
    *,
    per_task: int = 2,
    languages: Sequence[str] = ("English",),
    seed: int = 0,
    templates: str | Path = TEMPLATES,
    max_bad_records: int = 0,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write the prompts of step two, `per_task` for each task that answers to step one hold.

    A row has `id`, `shape`, `task`, `prompt` and `choices`. A task that several answers name counts once.

    Args:
        answers: JSONL files of rows with `id` (of a prompt of step one) and `answer` (the model's text).
        output: JSONL file to write.
        per_task: prompts of each task (NV-Embed: 120,000 examples of 60,000 tasks).
        languages: one is drawn for each prompt.
        seed: decides what is drawn, together with the task.
        templates: folder of templates.
        max_bad_records: so many rows that are no answers are left out.
        overwrite: replace `output`. Where it exists, a file of answers may have been taken for it.

    Returns:
        Figures under the names that a user reads.

    Raises:
        DataError: a file cannot be read, no answer holds a task, or `output` exists or is not named `.jsonl`.
    """
    check_output(output, overwrite=overwrite)
    source, intake = _Templates(Path(templates)), Intake(answers, max_bad_records)
    tasks: dict[tuple[str, str], str] = {}
    for shape, found in intake.rows(_tasks_of):
        for task in found:
            tasks.setdefault((shape, " ".join(task.casefold().split())), task)
    intake.stop_if_bad()
    if not tasks:
        raise DataError(f"{intake.names()}: none of {intake.counts.rows} answers holds a task")

    def rows() -> Iterator[dict[str, Any]]:
        for (shape, _), task in tasks.items():
            for number in range(per_task):
                rng = random.Random(f"{seed}/{shape}/{task}/{number}")
                language = languages[rng.randrange(len(languages))]
                prompt, drawn = source.fill(shape, rng, task=task, language=language)
                key = f"{shape}/{content_id(task)}/{number}"
                yield {
                    "id": key,
                    "shape": shape,
                    "task": task,
                    "prompt": prompt,
                    "choices": {**drawn, "language": language},
                }

    written = write_records(output, rows())
    figures = {"answers read": intake.counts.rows, "tasks": len(tasks), "prompts written": written}
    left_out = {f"left out: {reason}": number for reason, number in intake.counts.left_out.most_common()}
    return {**figures, "bad rows": intake.counts.bad, **left_out}


def _tasks_of(row: dict[str, Any]) -> tuple[str, list[str]]:
    """Shape and tasks of an answer to step one."""
    key, answer = text_of(row, "id"), text_of(row, "answer")
    step, _, rest = key.partition("/")
    shape = rest.partition("/")[0]
    if step != "brainstorm" or shape not in SHAPES:
        raise Fault(f"id must be that of a prompt of step one, got {key!r}", "id")
    return shape, tasks_in(answer)
