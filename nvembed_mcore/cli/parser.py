"""The parser of every subcommand: what all of them take, and what was meant where a word is mistyped."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from difflib import get_close_matches

from nvembed_mcore.cli.errors import DEBUG
from nvembed_mcore.progress import QUIET

FLAGS = {"--quiet": QUIET, "--debug": DEBUG}
"""Options that every command takes at any place -> the variable of the environment that says the same."""

_CHOICE = re.compile(r"invalid choice: '(?P<word>[^']*)' \(choose from (?P<choices>.*)\)")


def take_flags(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The flags among the arguments, up to a `--`, and the other arguments."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = [word for word in arguments[:end] if word in FLAGS]
    return flags, [word for word in arguments[:end] if word not in FLAGS] + arguments[end:]


class Parser(argparse.ArgumentParser):
    """argparse's, with the options of every command. What it does not know is an error that says what is like it.

    A subcommand with the default `takes_fields` gets what it does not know: it reads fields of a configuration.
    """

    def __init__(self, **how) -> None:
        super().__init__(**how)
        flags = self.add_argument_group("with every command")
        # Before any parser sees them, they are taken out (`take_flags`): here they are for the help.
        how = {"action": "store_true", "default": argparse.SUPPRESS}
        flags.add_argument("--quiet", help=f"nothing on stderr but errors (or {QUIET}=1)", **how)
        flags.add_argument("--debug", help=f"the trace of an error (or {DEBUG}=1)", **how)

    def parse_known_args(self, args=None, namespace=None) -> tuple[argparse.Namespace, list[str]]:
        found, rest = super().parse_known_args(args, namespace)
        if rest and not getattr(found, "takes_fields", False):
            options = [option for action in self._actions for option in action.option_strings]
            self.error(f"unrecognized arguments: {' '.join(rest)}{meant(rest, options)}")
        return found, rest

    def error(self, message: str) -> None:
        """As argparse: the usage and one line on stderr, and status 2."""
        choice = _CHOICE.search(message)
        if choice is not None:
            message += meant([choice["word"]], re.findall(r"[^\s,']+", choice["choices"]))
        super().error(message)


def meant(words: Iterable[str], known: Iterable[str]) -> str:
    """`; did you mean --top?` where one of the words is like a known one, else nothing."""
    known = list(known)
    for word in words:
        likely = get_close_matches(word.partition("=")[0], known, n=1)
        if likely:
            return f"; did you mean {likely[0]}?"
    return ""
