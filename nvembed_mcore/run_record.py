"""`RUN/run.json`: the attempts of a run, where its time went, and what it ran with; rank 0 writes it."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from nvembed_mcore import __version__, goodput
from nvembed_mcore.log import METRICS_FILE, read_metrics
from nvembed_mcore.status import write_json

log = logging.getLogger(__name__)

RUN_FILE = "run.json"
_VERSIONS = ("torch", "megatron-core", "transformers")


class RunRecord:
    """The file and what it holds; written whole each time, so that a kill leaves the old one or the new one."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._attempts: list[goodput.Attempt] = _read_attempts(run_dir / RUN_FILE)
        self._facts: dict[str, Any] = {}

    def begin(self, number: int, elapsed: float, state_before: str, facts: Mapping[str, Any]) -> None:
        """Begin an attempt.

        Args:
            elapsed: seconds since the start of its process.
            state_before: what an attempt came to that left no end here; its end is estimated from its files.
            facts: of this attempt: layout and hardware.
        """
        before = self._attempts[-1] if self._attempts else None
        if before is not None and before["end"] is None:
            goodput.close_killed(before, self._last_sign(), self._lines(), state_before)
        attempt = goodput.opened(before, number, datetime.now(timezone.utc), elapsed)
        self._attempts.append(attempt | {"host": socket.gethostname()} | dict(facts))
        self._facts = _versions()
        self._write()

    def go_on_after(self, ledger: goodput.Ledger, step: int) -> None:
        """The attempt begins after `step`; before `metrics.jsonl` drops what lies beyond."""
        goodput.go_on_after(self._attempts, step, self._lines())
        self.update(ledger, step, saves=0)

    def update(self, ledger: goodput.Ledger, step: int, saves: int) -> None:
        """What the attempt has done so far."""
        goodput.update(self._attempts[-1], ledger, step, saves)
        self._write()

    def add_facts(self, facts: Mapping[str, Any]) -> None:
        """More of what is known of the attempt."""
        self._attempts[-1] |= dict(facts)
        self._write()

    def close(self, ledger: goodput.Ledger, step: int, saves: int, state: str, exit_status: int) -> None:
        """The attempt's end."""
        goodput.update(self._attempts[-1], ledger, step, saves)
        goodput.close(self._attempts[-1], state, exit_status)
        self._write()
        log.info("%s", goodput.describe(self._attempts))

    def _lines(self) -> list[dict[str, float]]:
        file = self._run_dir / METRICS_FILE
        try:
            return read_metrics(file) if file.exists() else []
        except ValueError as error:
            log.warning("the time of lost steps is not known: %s", error)
            return []

    def _last_sign(self) -> datetime:
        """When the attempt before wrote anything last, as far as the files tell."""
        files = [self._run_dir / RUN_FILE, self._run_dir / METRICS_FILE]
        newest = max(file.stat().st_mtime for file in files if file.exists())
        return datetime.fromtimestamp(newest, timezone.utc)

    def _write(self) -> None:
        seconds = goodput.totals(self._attempts)
        tree = self._facts | {
            "goodput": round(goodput.share(self._attempts), 4),
            "seconds": _rounded(seconds | {"wall": sum(seconds.values())}),
            "attempts": [one | {"seconds": _rounded(one["seconds"])} for one in self._attempts],
        }
        write_json(self._run_dir / RUN_FILE, tree)


def _read_attempts(file: Path) -> list[goodput.Attempt]:
    """Those written before. A file that cannot be read costs the accounting and not the run."""
    if not file.exists():
        return []
    try:
        attempts = list(json.loads(file.read_text(encoding="utf-8"))["attempts"])
        for one in attempts:
            goodput.check(one)
        return attempts
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%r): the account of the run's time begins anew", file, error)
        return []


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}


def _versions() -> dict[str, Any]:
    versions = {"nvembed-mcore": __version__} | {name: metadata.version(name) for name in _VERSIONS}
    return {"versions": versions, "commit": _commit()}


def _commit() -> str | None:
    """Of the checkout that this package lies in, `-dirty` behind it where files differ; None without one."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
