"""YAML 1.2 as configurations have it: `off` and `no` are words, `1e-5` is a number."""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """PyYAML reads YAML 1.1, where `off` is false, `1e-5` a text and `2024-01-01` a date."""


_KINDS = {
    "bool": (re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    "float": (
        re.compile(
            r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+0123456789.",
    ),
}
_Loader.yaml_implicit_resolvers = {
    letter: [
        (tag, pattern) for tag, pattern in kinds if tag.rpartition(":")[2] not in ("bool", "float", "timestamp", "int")
    ]
    for letter, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, (_pattern, _letters) in _KINDS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _pattern, list(_letters))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile("^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))


def load(text: str) -> Any:
    """The value that a YAML text holds.

    Raises:
        yaml.YAMLError: it is none.
    """
    return _Loader(text).get_single_data()
