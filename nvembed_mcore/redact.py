"""Secrets do not go into files, logs or messages: what looks like one is replaced there.

What counts: user and password in a URL; values after names like `password=` and of signed URLs; tokens with the
prefixes of the usual services; the values of environment variables with names like `HF_TOKEN`; and in trees of values
what stands under such a key. Our own fields about tokens (`data.tokenizer`, `tokens_per_microbatch`) are none.

What is replaced once stays as it is, so a configuration that was stored compares equal to the same one replaced anew.
"""

from __future__ import annotations

import logging
import os
import re
from typing import Any

HIDDEN = "[redacted]"

_WORDS = r"secret|passw(?:or)?d|credential|api[_-]?key|access[_-]?key|private[_-]?key"
_TOKENS = r"(?:auth|access|api|hf|hub|hugging_?face|refresh|bearer|github|wandb)[_-]?token"
_KEY = re.compile(rf"{_WORDS}|{_TOKENS}", re.IGNORECASE)
_VARIABLE = re.compile(rf"{_WORDS}|(?:^|_)TOKEN$", re.IGNORECASE)
# Values end before what may close a string or a tag around them. Lengths are bounded so that no text takes long.
# A path library makes one slash of two.
_USER = re.compile(r"(?P<kept>\b[a-z][a-z0-9+.-]{0,20}:/{1,3})[^\s/@'\"<>\\]+(?=@)", re.IGNORECASE)
_ASSIGNED = re.compile(
    rf"(?P<kept>(?:[\w-]{{0,40}}(?:{_WORDS}|{_TOKENS})[\w-]{{0,40}}|[?&][\w-]{{0,40}}(?:token|key|signature|sig))=)"
    r"[^\s&'\",;<>\\]+",
    re.IGNORECASE,
)
_HEADER = re.compile(
    r"(?P<kept>\bauthorization\b['\"]?\s{0,2}[:=]\s{0,2}['\"]?(?:bearer|basic|token)\s)[^\s'\",<>\\]+", re.IGNORECASE
)
_PREFIXED = re.compile(
    r"(?P<kept>(?<![A-Za-z0-9]))"
    r"(?:hf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|sk-(?:[a-z0-9]{1,20}-){0,3}[A-Za-z0-9_]{20,}"  # OpenAI and others
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{20,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{35}|xox[abeoprs]-[A-Za-z0-9-]{10,}|nvapi-[A-Za-z0-9_-]{20,})"
)
_PATTERNS = (_USER, _ASSIGNED, _HEADER, _PREFIXED)
_SHORTEST_VALUE = 12


def text(message: str) -> str:
    """`message` with `[redacted]` in place of what looks like a secret."""
    for value in _values_of_environment():
        message = message.replace(value, HIDDEN)
    for pattern in _PATTERNS:
        message = pattern.sub(rf"\g<kept>{HIDDEN}", message)
    return message


def tree(values: Any, key: str = "") -> Any:
    """Dictionaries, lists and tuples of values, with texts as `text` makes them; under a secret's key any text goes.

    Keys stay. What is no text stays too.
    """
    if isinstance(values, dict):
        return {name: tree(value, str(name)) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(tree(value, key) for value in values)
    if not isinstance(values, str) or not values:
        return values
    return HIDDEN if _KEY.search(key) else text(values)


def _values_of_environment() -> list[str]:
    """Longest first: one may be a part of another. A short word without a digit could be any text's."""
    found = {
        value
        for name, value in os.environ.items()
        if _VARIABLE.search(name) and len(value) >= _SHORTEST_VALUE and any(map(str.isdigit, value))
    }
    return sorted(found, key=len, reverse=True)


class Filter(logging.Filter):
    """Of a handler: replaces secrets in its messages and tracebacks."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = text(record.getMessage()), None
        if record.exc_info:
            record.exc_text = text(record.exc_text or logging.Formatter().formatException(record.exc_info))
        return True
