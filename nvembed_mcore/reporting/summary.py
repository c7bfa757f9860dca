"""The figures of a run: what it reached, how fast it was, where its time went, and what differs between runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np

from nvembed_mcore import goodput
from nvembed_mcore.reporting.folder import Line, RunFolder

LAST_SHARE = 0.1
"""The end of a run whose losses are averaged: one step's loss says little."""
SILENT_SECONDS = 900.0
"""A run that wrote nothing for longer, and for longer than twenty of its steps take, has probably died."""
_NOT_COMPARED = ("run_dir",)
MISSING = object()
"""A run's value of a field that only others have."""


def results(run: RunFolder) -> dict[str, Any]:
    """What training reached: steps, losses, and each metric of the evaluations at first, best and last."""
    losses = [line["loss"] for line in run.training]
    end = losses[-max(1, round(len(losses) * LAST_SHARE)) :]
    found: dict[str, Any] = {
        "step": run.status.step if run.status else max((line["step"] for line in run.training), default=None),
        "steps": run.status.steps if run.status else run.fields.get("steps"),
        "loss_last": losses[-1] if losses else None,
        "loss_mean_of_end": statistics.fmean(end) if end else None,
        "loss_mean_is_of": len(end),
    }
    return found | {"evaluations": {name: _evaluation(run.evaluations, name) for name in evaluated(run)}}


def evaluated(run: RunFolder) -> list[str]:
    """Names of its metrics, as they first come."""
    return [*dict.fromkeys(name for line in run.evaluations for name in line if name != "step")]


def _evaluation(lines: Sequence[Line], name: str) -> dict[str, float]:
    """First, best and last of a metric (all are better when they are larger), with their steps."""
    some = [line for line in lines if name in line]
    places = {"first": some[0], "best": max(some, key=lambda line: line[name]), "last": some[-1]}
    found = {place: line[name] for place, line in places.items()}
    return found | {f"{place}_step": line["step"] for place, line in places.items()}


def throughput(run: RunFolder) -> dict[str, Any]:
    """Of its steps: medians of a step's figures, fill over all of them, and the shares of a step's phases.

    Empty where no step is known.
    """
    lines = [line for line in run.training if line.get("seconds", 0) > 0 and line.get("padded_tokens", 0) > 0]
    if not lines:
        return {}
    total = {name: sum(line[name] for line in lines) for name in ("seconds", "real_tokens", "padded_tokens")}
    seconds = [line["seconds"] for line in lines]
    speed = statistics.median(line["real_tokens"] / line["seconds"] for line in lines)
    sizes = {one.get("world_size") for one in run.attempts}
    (size,) = sizes if len(sizes) == 1 else (None,)
    mfu = [line["mfu"] for line in lines if "mfu" in line]
    phases = {name.removeprefix("seconds_") for line in lines for name in line if name.startswith("seconds_")}
    spent = {name: sum(line.get(f"seconds_{name}", 0) for line in lines) for name in sorted(phases)}
    training = float(hours(run)[-1])
    spent["rest"] = max(0.0, total["seconds"] - sum(spent.values()))
    return {
        "tokens_per_second": speed,
        "tokens_per_second_per_process": speed / size if isinstance(size, int) and size > 0 else None,
        "seconds_median": statistics.median(seconds),
        "seconds_p95": float(np.percentile(seconds, 95)),
        "pad_fraction": 1 - total["real_tokens"] / total["padded_tokens"],
        "mfu": statistics.median(mfu) if mfu else None,
        "training_hours": training if math.isfinite(training) else None,
        "phases": {name: value / total["seconds"] for name, value in spent.items()},
    }


def hours(run: RunFolder) -> np.ndarray:
    """Hours of training until the end of each line's step, float64 [training lines]; evaluations do not count.

    Where only every n-th step has a line (`log.every_steps`), it stands for all n.
    """
    steps = np.array([0, *(line["step"] for line in run.training)], dtype=np.float64)
    seconds = np.array([line.get("seconds", np.nan) for line in run.training], dtype=np.float64)
    return np.cumsum(seconds * np.diff(steps)) / 3600


def time_spent(run: RunFolder) -> dict[str, Any]:
    """Goodput, wall time and seconds by bucket (goodput.py); empty where it is not known."""
    if not run.attempts:
        return {}
    seconds = goodput.totals(run.attempts)
    return {
        "goodput": goodput.share(run.attempts),
        "wall_seconds": sum(seconds.values()),
        "seconds": seconds,
        "attempts": len(run.attempts),
        "ends": [str(one["state"]) for one in run.attempts],
    }


def warnings(run: RunFolder, now: datetime) -> list[str]:
    """What somebody who compares this run must know: what it came to where it is not done, and what is not known."""
    notes = list(run.notes)
    status = run.status
    if status is not None and status.state == "running":
        silent = max(0.0, now.timestamp() - run.last_sign)
        step = statistics.median([line.get("seconds", 0.0) for line in run.training] or [0.0])
        has_died = silent > max(SILENT_SECONDS, 20 * step)
        what = "it has probably died" if has_died else "it may still go on"
        ago = timedelta(seconds=round(silent))
        where = f"its state is running at step {status.step} of {status.steps}"
        notes.append(f"{where}; its files were last written {ago} ago (h:mm:ss): {what}")
    elif status is not None and status.state != "done":
        why = f" ({status.reason})" if status.reason else ""
        notes.append(f"it ended as {status.state} at step {status.step} of {status.steps}{why}")
    elif status is not None and status.step < status.steps:
        notes.append(f"it stopped as it was told to at step {status.step} of {status.steps} (stop_at)")
    return notes


def differences(runs: Sequence[RunFolder]) -> dict[str, list[Any]]:
    """Fields of the configuration whose values differ between the runs that have one, with the value of each run.

    A run without configuration has `MISSING` everywhere.
    """
    known = [run for run in runs if run.fields]
    names = dict.fromkeys(name for run in known for name in run.fields)
    found = {}
    for name in names:
        values = [run.fields.get(name, MISSING) for run in known]
        if name not in _NOT_COMPARED and any(not _is_same(value, values[0]) for value in values):
            found[name] = [run.fields.get(name, MISSING) for run in runs]
    return found


def _is_same(one: Any, other: Any) -> bool:
    """`1`, `1.0` and `true` are different things in a configuration, and so are `null` and nothing."""
    return type(one) is type(other) and (one == other or (one != one and other != other))


def summary(runs: Sequence[RunFolder], now: datetime | None = None) -> dict[str, Any]:
    """All figures as JSON values."""
    now = now or datetime.now(timezone.utc)
    differing: Mapping[str, list[Any]] = differences(runs)
    return {
        "runs": [
            {
                "name": run.name,
                "folder": str(run.path),
                "state": run.status.state if run.status else None,
                **results(run),
                "throughput": throughput(run),
                "time": time_spent(run),
                "warnings": warnings(run, now),
            }
            for run in runs
        ],
        "differences": {
            name: {run.name: value for run, value in zip(runs, values, strict=True) if value is not MISSING}
            for name, values in differing.items()
        },
    }
