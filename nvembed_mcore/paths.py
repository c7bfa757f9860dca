"""Names that stand in files, joined to a folder: what they mean stays inside it.

A path that a user gives may lie anywhere, and may be a link or hold links: Hugging Face's cache is made of links to
`../../blobs`. A name that stands *in a file* says which of the folder's files is meant, nothing else, whoever wrote
that file. So it is judged as text; a link that has a good name is the folder's owner's.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

_LONGEST = 255


def member(folder: Path, name: Any, named_in: Path, error: type[ValueError] = ValueError) -> Path:
    """The file of a folder that another file names.

    Args:
        folder: where the file must lie; it itself may be anything.
        name: what stands in `named_in`: a file name, or several with `/` between them.
        error: the class of the error.

    Raises:
        ValueError (`error`): the name is no such thing, or leads out of the folder; the message has both.
    """
    reason = why_unsafe(name)
    if reason is not None:
        raise error(f"{named_in} names {name!r}, which is no file of {folder}: {reason}")
    return folder / name


def why_unsafe(name: Any) -> str | None:
    """Why a name may not be joined to a folder; None: it may.

    Characters that a file system or a reader may take for dots and slashes count as such (Unicode's form NFKC).
    """
    if not isinstance(name, str):
        return f"it is no text but {type(name).__name__}"
    if any(unicodedata.category(one).startswith("C") for one in name):
        return "it has characters that cannot be seen"
    shown = unicodedata.normalize("NFKC", name).replace("\\", "/")
    if shown.startswith("/") or shown[1:2] == ":":
        return "it is an absolute path"
    parts = shown.split("/")
    if "\\" in name or len(parts) != len(name.split("/")):
        return "it has something like a slash that is none"
    if any(part.strip(". ") == "" for part in parts):
        return "a part of it is empty or only dots"
    if any(len(part.encode()) > _LONGEST for part in name.split("/")):
        return f"a part of it is longer than {_LONGEST} bytes"
    return None
