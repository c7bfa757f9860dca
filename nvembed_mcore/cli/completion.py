"""`nvembed completion SHELL`: a script with which a shell completes commands, options and fields."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

_DESCRIPTION = """\
Print a script that completes the words of nvembed, the fields of a configuration among them. For this shell:

  bash  nvembed completion bash > ~/.local/share/bash-completion/completions/nvembed
  zsh   nvembed completion zsh > "${fpath[1]}/_nvembed"
  fish  nvembed completion fish > ~/.config/fish/completions/nvembed.fish
  tcsh  nvembed completion tcsh > ~/.nvembed.tcsh      (and `source` it in ~/.tcshrc)

In bash, `eval "$(nvembed completion bash)"` is enough for the shell that runs."""


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "completion",
        help="print a script that completes nvembed's words in a shell",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("shell", choices=["bash", "zsh", "fish", "tcsh"])
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    import shtab

    from nvembed_mcore.cli import parser
    from nvembed_mcore.config import RunConfig

    whole = parser()
    for name, command in _commands(whole):
        if name == "train" or command.get_default("takes_fields"):
            command.add_argument("config", nargs="*", metavar="CONFIG.yaml")
            for field, kind in _fields(RunConfig):
                if f"--{field}" not in command._option_string_actions:
                    command.add_argument(f"--{field}", choices=_choices(kind))
        for action in command._actions:
            if action.nargs != 0 and not action.choices and (action.type in (None, str) or action.dest == "json"):
                action.complete = shtab.FILE
    print(shtab.complete(whole, arguments.shell))


def _commands(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """The parser and all below it."""
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                yield from _commands(below, word)


def _fields(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names of all fields of the tree, as `optim.lr`, and their types."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        parts = [one for one in _alternatives(hint) if dataclasses.is_dataclass(one)]
        if parts:
            yield from _fields(parts[0], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hint


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """Of `A | B` both, of another type itself."""
    return (hint,) if get_origin(hint) in (None, list, dict, tuple, Literal) else get_args(hint)


def _choices(hint: Any) -> list[str] | None:
    """The words that a field takes; None where they are not few."""
    words: list[str] = []
    for one in _alternatives(hint):
        words += map(str, get_args(one)) if get_origin(one) is Literal else []
        words += ["true", "false"] if one is bool else []
    return words or None
