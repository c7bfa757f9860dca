"""The runs of a study: a folder for each point, a run of the trainer for each of its repeats, and how these stand.

OUTPUT/points/POINT/config.yaml     of all its repeats
                   repeat-1/        the run folder of one
                   repeat-1.log     what it printed, where this machine ran it
                   repeat-1.json    and what else the machine did meanwhile
OUTPUT/texts/                       texts of given lengths
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from study_spec import LENGTHS, Point, Study, StudyError

from nvembed_mcore.cli.run_config import read_run_config
from nvembed_mcore.config import ConfigError, RunConfig
from nvembed_mcore.log import METRICS_FILE, read_metrics
from nvembed_mcore.status import FIRST_FAILURE, read_status

_LINES_SHOWN = 12
MEASURED = {
    "stop_at": None,
    "max_minutes": None,
    "checkpoint.every_steps": 0,
    "eval.path": None,
    "log.every_steps": 1,
    "log.tensorboard": False,
    "log.progress": False,
    "log.straggler_window": 0,
}
"""Nothing but steps, each with its line."""


@dataclass(frozen=True)
class Run:
    """One repeat of a point. `steps`: of a complete one."""

    point: Point
    repeat: int
    folder: Path
    steps: int

    @property
    def config(self) -> Path:
        return self.folder.parent / "config.yaml"

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def load(self) -> Path:
        return self.folder.with_suffix(".json")

    @property
    def arguments(self) -> list[str]:
        """Behind `nvembed train`."""
        return [str(self.config), "--run_dir", str(self.folder)]

    def lines(self) -> list[dict[str, float]]:
        """Those of its steps; none where it has not come so far."""
        file = self.folder / METRICS_FILE
        return [line for line in read_metrics(file) if "loss" in line] if file.exists() else []

    def is_complete(self) -> bool:
        """It ended well, and every step has its line."""
        status = read_status(self.folder)
        return status is not None and status.state == "done" and len(self.lines()) == self.steps

    def was_tried(self) -> bool:
        return self.folder.exists() or self.log.exists()


def runs_of(study: Study) -> list[Run]:
    """All runs, in turns: every point once, then every point again."""
    points = study.points()
    return [
        Run(point, repeat, study.output / "points" / point.name / f"repeat-{repeat}", study.all_steps)
        for repeat in range(1, study.repeats + 1)
        for point in points
    ]


def prepare(study: Study) -> dict[str, RunConfig]:
    """Write the configuration of every point, and the texts that some need; returns them by the points' names.

    Raises:
        StudyError: a point's configuration cannot work; names the file, the point and the field.
    """
    configs = {}
    for run in runs_of(study)[: len(study.points())]:
        run.config.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(_tree(study, run.point), sort_keys=False)
        if not run.config.exists() or run.config.read_text(encoding="utf-8") != text:
            run.config.write_text(text, encoding="utf-8")
        try:
            configs[run.point.name] = read_run_config(run.arguments)
        except ConfigError as error:
            raise StudyError(f"{study.file}: series {run.point.series!r}, {run.point.name}: {error}") from error
    _write_texts(study)
    return configs


def check_inputs(study: Study, configs: dict[str, RunConfig]) -> None:
    """Refuse to start what fails at every point; where only some points lack it, the others are worth their time.

    Raises:
        StudyError: no point's tokenizer is here.
    """
    tokenizers = {config.data.tokenizer for config in configs.values()}
    if not any(Path(one).is_dir() for one in tokenizers):
        one = min(tokenizers)
        raise StudyError(
            f"{study.file}: data.tokenizer: no tokenizer folder at {one} (`nvembed data tokenizer {one}` writes one)"
        )


def _tree(study: Study, point: Point) -> dict[str, Any]:
    """The base with everything that the study and the point change."""
    tree = copy.deepcopy(study.base)
    fixed = {
        "steps": study.all_steps,
        "batch_size": point.queries,
        "log.time_communication_every": study.communication_every,
    }
    for dotted, value in (MEASURED | point.fields | fixed).items():
        _put(tree, dotted, value, study.file)
    if point.synthetic:
        datasets = tree.get("data", {}).get("datasets") or [{}]
        one = {"path": str(_texts_of(study, point)), "instruction": "", "num_negatives": _negatives(datasets[0])}
        _put(tree, "data.datasets", [one], study.file)
    return tree


def _put(tree: dict[str, Any], dotted: str, value: Any, file: Path) -> None:
    *folders, name = dotted.split(".")
    for folder in folders:
        tree = tree.setdefault(folder, {})
        if not isinstance(tree, dict):
            raise StudyError(f"{file}: {dotted}: {folder} of the base configuration holds no fields, but {tree!r}")
    tree[name] = value


def _negatives(dataset: dict[str, Any]) -> int:
    return dataset.get("num_negatives", 7)


# --- Texts of given lengths ---


def _texts_of(study: Study, point: Point) -> Path:
    limits = "-".join(str(point.fields[dotted]) for dotted in LENGTHS.values())
    return study.output / "texts" / f"{limits}.jsonl"


def _write_texts(study: Study) -> None:
    """For each pair of limits, as many records as the largest batch has queries. A text is letters with spaces
    between, a token or more each, so that every text is cut to its limit, whatever the tokenizer."""
    largest: dict[Path, Point] = {}
    for point in study.points():
        if point.synthetic:
            file = _texts_of(study, point)
            largest[file] = max(point, largest.get(file, point), key=lambda one: one.queries)
    datasets = study.base.get("data", {}).get("datasets") or [{}]
    for file, point in largest.items():
        lengths = [point.fields[dotted] for dotted in LENGTHS.values()]
        records = "".join(
            json.dumps(one) + "\n" for one in _records(point.queries, *lengths, negatives=_negatives(datasets[0]))
        )
        # The same bytes again: a store of their tokens stays good.
        if not file.exists() or file.read_text(encoding="utf-8") != records:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(records, encoding="utf-8")


def _records(number: int, queries: int, documents: int, negatives: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(0)

    def text(length: int) -> str:
        return " ".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=length))

    for _ in range(number):
        yield {"query": text(queries), "pos": [text(documents)], "neg": [text(documents) for _ in range(negatives)]}


# --- What went wrong ---


def end_of_log(run: Run) -> str:
    """Why a run that was tried is not complete, from the files that it left: the error of the rank that failed first,
    and the end of what it printed."""
    parts = []
    failures = sorted(run.folder.glob(f"logs/*/{FIRST_FAILURE}"))
    if failures:
        first = json.loads(failures[-1].read_text(encoding="utf-8"))
        parts.append("rank {rank} on {host}, {operation}: {error}".format(**first))
    printed = [*run.folder.glob("logs/slurm-*/*.out"), *([run.log] if run.log.exists() else [])]
    printed = [file for file in printed if file.stat().st_size]
    if printed:
        file = max(printed, key=lambda one: one.stat().st_mtime)
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        parts += [f"{file} ends with", *lines[-_LINES_SHOWN:]]
    return "\n".join(parts) or "it left no word"


def environment() -> dict[str, str]:
    """For a run on this machine: no thread but its own, unless somebody says otherwise."""
    return {"OMP_NUM_THREADS": "1", **os.environ}
