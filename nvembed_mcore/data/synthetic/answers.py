"""What is usable in a language model's answers: JSON, whatever stands around it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from nvembed_mcore.data.convert.intake import LeftOut
from nvembed_mcore.data.faults import Fault, check_string

TEXTS = ("query", "positive", "negative")
"""The keys of an answer to step two."""


def tasks_in(answer: str) -> list[str]:
    """The tasks of an answer to step one: the first list of texts in it, one line each.

    Raises:
        LeftOut: there is none.
    """
    for value in _json_values(answer, "["):
        tasks = [" ".join(one.split()) for one in value if isinstance(one, str) and _is_usable(one)]
        if tasks:
            return tasks
    raise LeftOut("no JSON list of texts in the answer")


def example_in(answer: str) -> dict[str, str]:
    """The texts of an answer to step two, by key: those of the first object that has one of the keys.

    Raises:
        LeftOut: there is no such object, or one of its texts is missing, blank or no text.
    """
    for value in _json_values(answer, "{"):
        if not any(name in value for name in TEXTS):
            continue
        for name in TEXTS:
            if not isinstance(value.get(name), str) or not _is_usable(value[name]):
                raise LeftOut(f"no usable {name} in the answer's object")
        return {name: value[name].strip() for name in TEXTS}
    raise LeftOut("no JSON object with the keys in the answer")


def _json_values(answer: str, bracket: str) -> Iterator[Any]:
    """The JSON values in an answer that begin with a bracket, also those inside of others that are broken.

    Models break lines inside of strings; that is taken as it is meant.
    """
    decoder = json.JSONDecoder(strict=False)
    end = 0
    for found in re.finditer(re.escape(bracket), answer):
        if found.start() < end:
            continue
        try:
            value, end = decoder.raw_decode(answer, found.start())
        except ValueError:
            continue
        except RecursionError:  # from each of thousands of brackets again
            return
        yield value


def _is_usable(text: str) -> bool:
    """Whether a text has more than spaces, and nothing that a data file may not hold."""
    try:
        check_string(text, "", "")
    except Fault:
        return False
    return bool(text.strip())
