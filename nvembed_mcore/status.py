"""`RUN/status.json`: how a run stands, for people and for job scripts; one flat object, one key a line."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATUS_FILE = "status.json"
FIRST_FAILURE = "first-failure.json"
"""In an attempt's folder of logs: which rank failed first."""


@dataclass(frozen=True)
class Status:
    """What `RUN/status.json` says; written when an attempt begins, at each checkpoint, and at the end."""

    state: str
    """running, done, preempted, config_error, data_error, storage_error, nonfinite, hang, crashed or interrupted. A
    run whose rank was killed without a word may stay at `running`."""
    exit_status: int | None
    """Of every rank (exits.py); null while the run goes on."""
    step: int
    """Optimizer steps done."""
    steps: int
    """Those of the whole run."""
    samples_seen: int
    """Queries in the steps done."""
    checkpoint_step: int | None
    """Step of the newest checkpoint: where the same command goes on; null where there is none."""
    reason: str
    """Why the attempt stopped or failed; empty otherwise."""
    attempt: int
    """Number of the attempt, that of its folder in `logs/`."""
    host: str
    """Of the rank that wrote this."""
    time: str
    """When it was written, in UTC."""
    best_step: int | None = None
    """Step of the checkpoint of the best evaluation (`eval.metric`); null where there is none."""
    best_value: float | None = None
    """That metric of it."""


def read_status(run_dir: str | Path) -> Status | None:
    """The state of a run; None when it has none.

    Raises:
        ValueError: the file does not say what it should.
    """
    file = Path(run_dir) / STATUS_FILE
    if not file.is_file():
        return None
    try:
        return Status(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not the status of a run: {error}") from error


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a file that is the old one or the new one whenever the machine stops: aside, synced, renamed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(json.dumps(tree, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
