"""What a model is told of each task of MTEB, as data: a table by name and kind of task.

`instructions/paper.yaml` and `published.yaml` are two such tables; a user's own file has the same form:

    base: published          # optional: another table, for everything that is not said here
    tasks:
      NFCorpus: Given a question, retrieve relevant documents
      MyDuplicates: {query: Find the same question, document: Find the same question}
    types:                   # for tasks that are not named, by mteb's kind of task
      STS: Retrieve semantically similar text

One text stands before all texts of a task but the documents of retrieval and reranking, which get none (NV-Embed,
section 4); `query` and `document` give the sides their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nvembed_mcore.data.prompts import query_prompt

FOLDER = Path(__file__).parent / "instructions"
PAPER, PUBLISHED = "paper", "published"
_KEYS = ("base", "tasks", "types")
_SIDES = ("query", "document")


class MtebError(ValueError):
    """An evaluation on MTEB cannot be run as it is asked for; the message names the task, the option or the file."""


@dataclass(frozen=True)
class Sides:
    """Instructions of a task, without the words around them; empty for none.

    Attributes:
        query: before queries, and before all texts of a task whose texts have no sides.
        document: before documents.
    """

    query: str
    document: str


@dataclass(frozen=True)
class Instructions:
    """A table of instructions.

    Attributes:
        name: `paper`, `published`, or the name of the user's file without its ending.
        tasks, types: by name and by kind of task.
    """

    name: str
    tasks: dict[str, Sides]
    types: dict[str, Sides]

    def of(self, task: str, kind: str) -> Sides:
        """The instructions of a task.

        Raises:
            MtebError: there are none.
        """
        found = self.tasks.get(task) or self.types.get(kind)
        if found is None:
            raise MtebError(
                f"the instructions {self.name!r} have none for {task} ({kind}): write a file with `base: {self.name}` "
                f"and, under `tasks:`, `{task}: ...`, and give it with --instructions; --instructions none embeds as "
                f"the model was trained"
            )
        return found

    def prompts(self) -> dict[str, str]:
        """The table in mteb's form, with the words around an instruction, for a model of sentence-transformers."""
        found = {}
        for name, sides in (self.types | self.tasks).items():
            found[name] = query_prompt(sides.query)
            found[f"{name}-document"] = query_prompt(sides.document)
        return found


def load_instructions(source: str | Path) -> Instructions:
    """A table by its name, `paper` or `published`, or from a file.

    Raises:
        MtebError: there is no such file, or it is not of the form above.
    """
    return _load(str(source), Path(), [])


def _load(source: str, beside: Path, above: list[Path]) -> Instructions:
    """`beside`: the folder of the file that names `source`; `above`: the files that led here."""
    file = FOLDER / f"{source}.yaml" if source in (PAPER, PUBLISHED) else beside / source
    if file in above:
        raise MtebError(f"{file} is its own base, by way of {above[-1]}")
    content = _read(file)
    tasks, types = (
        {name: _sides(file, part, name, value) for name, value in content[part].items()} for part in _KEYS[1:]
    )
    if content["base"] is not None:
        base = _load(str(content["base"]), file.parent, [*above, file])
        tasks, types = base.tasks | tasks, base.types | types
    return Instructions(file.stem, tasks, types)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MtebError(
            f"there are no instructions at {file}: give a file, {PAPER}, {PUBLISHED} or none with --instructions"
        ) from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise MtebError(f"cannot read the instructions in {file}: {error}") from error
    if not isinstance(content, dict) or set(content) - set(_KEYS):
        raise MtebError(f"{file} must have no other keys than {', '.join(_KEYS)}, got {content!r:.200}")
    content = {"base": None} | content
    for part in _KEYS[1:]:
        content[part] = content.get(part) or {}
        if not isinstance(content[part], dict):
            raise MtebError(f"{file}: {part} must map names to instructions, got {content[part]!r:.200}")
    return content


def _sides(file: Path, part: str, name: str, value: Any) -> Sides:
    if isinstance(value, str) and value.strip():
        return Sides(value, "")
    if isinstance(value, dict) and value and not set(value) - set(_SIDES):
        if all(isinstance(one, str) for one in value.values()):
            return Sides(value.get("query", ""), value.get("document", ""))
    raise MtebError(f"{file}: {part}.{name} must be a text, or a text for query and document, got {value!r}")
