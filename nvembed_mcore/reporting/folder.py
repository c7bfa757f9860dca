"""What a run folder says of its run, read with suspicion: what cannot be read costs that file, and a note says so."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from nvembed_mcore import goodput
from nvembed_mcore.config import ConfigError
from nvembed_mcore.log import METRICS_FILE, read_metrics
from nvembed_mcore.run_record import RUN_FILE
from nvembed_mcore.status import STATUS_FILE, Status, read_status

CONFIG_FILE = "config.yaml"
FILES = (CONFIG_FILE, METRICS_FILE, RUN_FILE, STATUS_FILE)
_MOST_FIELDS = 10_000
_MOST_BYTES = 4_000_000
"""Of a configuration and of a record; a run of this size would have a hundred thousand fields or attempts."""

Line = dict[str, float]


@dataclass(frozen=True)
class RunFolder:
    """A run, as its files tell it."""

    name: str
    """The folder's, or with as much of the path as tells it from the others."""
    path: Path
    fields: dict[str, Any] = field(default_factory=dict)
    """Every field of its configuration by name, as `data.datasets.0.weight`; empty where it is not known."""
    config: str = ""
    """The text of its configuration."""
    lines: list[Line] = field(default_factory=list)
    """Those of `metrics.jsonl`."""
    attempts: list[goodput.Attempt] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    """Of the libraries that it ran with, and the commit."""
    status: Status | None = None
    last_sign: float = 0.0
    """When its newest file was written, in seconds since 1970."""
    notes: list[str] = field(default_factory=list)
    """What could not be read."""

    @property
    def training(self) -> list[Line]:
        """Lines of steps, in order."""
        return [line for line in self.lines if "loss" in line]

    @property
    def evaluations(self) -> list[Line]:
        """Lines of evaluations, in order."""
        return [line for line in self.lines if "loss" not in line]


def read_runs(folders: Sequence[str]) -> list[RunFolder]:
    """Runs in the order of their folders.

    Raises:
        ConfigError: a folder is missing, stands twice, or holds none of a run's files.
    """
    paths = [Path(one) for one in folders]
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"no run folder at {path}")
        if not any((path / name).is_file() for name in FILES):
            raise ConfigError(f"{path} holds no run: none of {', '.join(FILES)}")
    places = [os.path.realpath(path) for path in paths]
    twice = [str(path) for path, place in zip(paths, places, strict=True) if places.count(place) > 1]
    if twice:
        raise ConfigError(f"one run is named {len(twice)} times: {', '.join(twice)}")
    return [_read(path, name) for path, name in zip(paths, _names(places), strict=True)]


def _names(places: Sequence[str]) -> list[str]:
    """The last parts of paths that are all different: as many as tell them apart."""
    parts = [Path(place).parts for place in places]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read(path: Path, name: str) -> RunFolder:
    notes: list[str] = []
    found: dict[str, Any] = {"notes": notes}
    readers = {CONFIG_FILE: _read_config, METRICS_FILE: _read_lines, RUN_FILE: _read_record, STATUS_FILE: _read_status}
    for file, read in readers.items():
        if not (path / file).is_file():
            notes.append(f"{file} is missing")
            continue
        try:
            found |= read(path / file)
        except (ValueError, KeyError, TypeError, OSError, AttributeError, RecursionError, yaml.YAMLError) as error:
            notes.append(f"{file} cannot be read: {_words(error).removeprefix(f'{path / file}').lstrip(',: ')}")
    signs = [(path / file).stat().st_mtime for file in readers if (path / file).is_file()]
    return RunFolder(name, path, last_sign=max(signs), **found)


def _words(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error}"
    return " ".join(str(error).split())[:400] or type(error).__name__


def _text_of(file: Path) -> str:
    size = file.stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(f"it has {size:,} bytes, more than {_MOST_BYTES:,}")
    return file.read_text(encoding="utf-8")


def _read_config(file: Path) -> dict[str, Any]:
    text = _text_of(file)
    tree = yaml.safe_load(text)
    if not isinstance(tree, dict):
        raise ValueError(f"it holds no fields, but {type(tree).__name__}")
    # Counted as they come: references inside the file can make few bytes to any number of fields.
    fields = dict(islice(_fields(tree), _MOST_FIELDS + 1))
    if len(fields) > _MOST_FIELDS:
        raise ValueError(f"it has more than {_MOST_FIELDS:,} fields")
    return {"fields": fields, "config": text}


def _fields(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with its name; a list of plain values is one."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _fields(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, list) and any(isinstance(one, (dict, list)) for one in tree):
        for number, value in enumerate(tree):
            yield from _fields(value, f"{name}.{number}")
    else:
        yield name, json.loads(json.dumps(tree, default=str))  # YAML has dates and sets, too


def _read_lines(file: Path) -> dict[str, Any]:
    lines = read_metrics(file)
    for number, line in enumerate(lines, 1):
        for name, value in line.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
                raise ValueError(f"line {number}: {name} is no number that can be drawn, but {str(value)[:80]!r}")
        if not isinstance(line["step"], int) or line["step"] < 0:
            raise ValueError(f"line {number}: step is {line['step']!r}")
    return {"lines": lines}


def _read_record(file: Path) -> dict[str, Any]:
    record = json.loads(_text_of(file))
    attempts = list(record["attempts"])
    for one in attempts:
        goodput.check(one)
        for name in ("layout", "hardware", "peak_memory"):
            dict(one.setdefault(name, {}))
        if not isinstance(one.setdefault("world_size", 0), int):
            raise TypeError(f"attempt {one['number']} has world_size {one['world_size']!r}")
    if not all(math.isfinite(value) for value in goodput.totals(attempts).values()):
        raise ValueError("seconds that are no numbers")
    versions = dict(record.get("versions") or {}) | {"commit": record.get("commit")}
    return {"attempts": attempts, "versions": {str(name): str(value) for name, value in versions.items() if value}}


def _read_status(file: Path) -> dict[str, Any]:
    status = read_status(file.parent)
    if not (isinstance(status.step, int) and isinstance(status.steps, int) and isinstance(status.state, str)):
        raise ValueError(f"state {status.state!r}, step {status.step!r} of {status.steps!r}")
    return {"status": status}
