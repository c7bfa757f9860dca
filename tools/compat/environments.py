"""One virtual environment for each version of transformers and sentence-transformers.

torch and scikit-learn, and what they need, are borrowed from the running environment: they come last on the new one's
path, so whatever pip installs beside them goes first. Everything else is installed from pip's own configuration.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

BORROWED = ("torch", "scikit-learn")
REPORTED = ("transformers", "sentence-transformers", "tokenizers", "huggingface-hub", "numpy", "torch")


@dataclass(frozen=True)
class Environment:
    """Where it is, and the versions that are installed in it."""

    python: Path
    versions: dict[str, str]


def build_environment(directory: Path, requirements: list[str]) -> Environment:
    """Make an environment, or take the one that is there when it was made for the same requirements.

    Raises:
        subprocess.CalledProcessError: pip could not install the requirements; its output says why.
    """
    python, stamp = directory / "bin" / "python", directory / "versions.json"
    if stamp.is_file():
        found = json.loads(stamp.read_text(encoding="utf-8"))
        if found["requirements"] == requirements and found["from"] == sys.prefix:
            return Environment(python, found["versions"])
    if directory.exists():
        shutil.rmtree(directory)
    venv.create(directory, with_pip=True, symlinks=True)
    (packages,) = directory.glob("lib/python*/site-packages")
    borrowed = directory / "borrowed"
    borrowed.mkdir()
    _link_distributions(borrowed)
    (packages / "zz_borrowed.pth").write_text(f"{borrowed}\n", encoding="utf-8")
    _run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements])
    listed = json.loads(_run([python, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check"]))
    installed = {one["name"].lower().replace("_", "-"): one["version"] for one in listed}
    versions = {name: installed[name] for name in REPORTED if name in installed}
    stamp.write_text(json.dumps({"requirements": requirements, "from": sys.prefix, "versions": versions}))
    return Environment(python, versions)


def _link_distributions(folder: Path) -> None:
    """Links to the packages in `BORROWED` and to all that they need; pip adds what the running environment lacks."""
    for found in _with_requirements(BORROWED):
        for name in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
            if not (folder / name).exists():
                os.symlink(found.locate_file(name), folder / name)


def _with_requirements(names: tuple[str, ...]) -> list[Distribution]:
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        wanted = [Requirement(text) for text in found[name].requires or []]
        waiting += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    return list(found.values())


def _run(command: list[str | Path]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
    return done.stdout
