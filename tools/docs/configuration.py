"""The page of all fields of a run's configuration, from the dataclasses themselves."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
from typing import Any, get_args, get_type_hints

from nvembed_mcore.config import RunConfig
from nvembed_mcore.identity import Kind, kind_of

_ON_RESUME: dict[Kind, str] = {
    "identity": "fixed",
    "content": "fixed by content",
    "resumable": "may change",
    "free": "free",
}
_HEAD = """\
# Configuration

Every field of a run, as `nvembed train` takes it: in a YAML file, where a dot is a level of indentation, or behind it
as `--parallel.tp 2`. This page is made from the classes in `nvembed_mcore/config*.py`; `nvembed train FILE
--print_config` prints a run's whole tree. An unknown field, a wrong type or a value that cannot work ends a run before
it starts, with the field and both values named.

Behind each field stand its type, its default, and what a resumed run may do with it:

| | when the run goes on from a checkpoint |
|---|---|
| *fixed* | a change is refused: it would be another run |
| *fixed by content* | what it names must hold the same; where that lies may change |
| *may change* | how the work is shared or computed: the same numbers within rounding; the change is logged |
| *free* | may differ |
"""


def page() -> str:
    """The page, as Markdown with definition lists."""
    own = [one for one in dataclasses.fields(RunConfig) if _class_of(RunConfig, one.name) is None]
    parts = [_HEAD, "## The run\n", *(_field(RunConfig, one, "") for one in own)]
    for one in dataclasses.fields(RunConfig):
        if (kind := _class_of(RunConfig, one.name)) is not None:
            parts += _section(kind, one.name)
    return "\n".join(parts)


def _section(kind: type, name: str) -> list[str]:
    """A class of the tree, and those below it as sections of their own."""
    fields = dataclasses.fields(kind)
    parts = [f"## {name}\n", inspect.cleandoc(kind.__doc__ or "") + "\n"]
    parts += [_field(kind, one, name) for one in fields if _class_of(kind, one.name) is None]
    for one in fields:
        if (below := _class_of(kind, one.name)) is not None:
            parts += _section(below, f"{name}.{one.name}")
    return parts


def _class_of(kind: type, field: str) -> type | None:
    """The class of a field that is a part of the tree, or a list of such parts."""
    hint = get_type_hints(kind)[field]
    return next((one for one in (hint, *get_args(hint)) if dataclasses.is_dataclass(one)), None)


def _field(kind: type, field: dataclasses.Field, section: str) -> str:
    path = f"{section}.{field.name}".removeprefix(".")
    facts = [f"`{_type(str(field.type))}`", _default(field), _ON_RESUME[kind_of(path)]]
    text = textwrap.indent(docstrings(kind)[field.name], "    ").strip()
    return f"`{path}`{{ #{path} }} {' · '.join(facts)}\n:   {text}\n"


def _type(annotation: str) -> str:
    """`Literal["a", "b"] | None` as a user writes it: `a | b | null`."""
    choices = re.sub(r"Literal\[([^\]]*)\]", lambda match: match[1].replace('"', "").replace(", ", " | "), annotation)
    return choices.replace("None", "null").replace("str", "text").replace("bool", "true | false")


def _default(field: dataclasses.Field) -> str:
    value: Any = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "**must be given**"
    return f"default `{json.dumps(value)}`"


def docstrings(kind: type) -> dict[str, str]:
    """Field -> the docstring under it."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
    found = {}
    for one, behind in zip(body, body[1:], strict=False):
        if isinstance(one, ast.AnnAssign) and isinstance(behind, ast.Expr) and isinstance(behind.value, ast.Constant):
            found[one.target.id] = inspect.cleandoc(behind.value.value)
    return found
