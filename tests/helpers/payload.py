"""Things that write a file, the canary, when somebody runs them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch


class Payload:
    """Makes the canary where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self._canary = str(canary)

    def __reduce__(self):
        return open, (self._canary, "w")


def pickled(canary: Path) -> bytes:
    return pickle.dumps(Payload(canary))


def code(canary: Path) -> str:
    """A module that makes the canary where it is imported, with classes of the names that are asked for."""
    names = "class Model:\n    def __init__(self, *a, **k): pass\nNVEmbedModel = NVEmbedConfig = Tokenizer = Model\n"
    return f"open({str(canary)!r}, 'w').close()\n{names}"


def save_torch(canary: Path, file: Path) -> None:
    torch.save({"weight": Payload(canary)}, file)


def objects(canary: Path) -> np.ndarray:
    """An array of objects, which NumPy writes as a pickle."""
    return np.array([Payload(canary)], dtype=object)
