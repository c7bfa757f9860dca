"""What a scaling study measures, read from one YAML file: its series, and the points that their axes span."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from nvembed_mcore.cli import yaml_loader
from nvembed_mcore.config import ConfigError
from nvembed_mcore.scaling.hardware import device_names

KINDS = {
    "weak": "queries of a GPU: the batch grows with the GPUs",
    "strong": "queries of the batch, for any number of GPUs",
    "batch": "queries of the batch, which is what varies",
}
LAYOUT = {"tp": "parallel.tp", "pp": "parallel.pp", "cp": "parallel.cp", "chunks": "parallel.chunks_per_stage"}
PRECISION = {"dtype": "precision.dtype", "fp8": "precision.fp8", "fp8_attention": "precision.fp8_attention"}
LENGTHS = {"queries": "data.max_query_tokens", "documents": "data.max_document_tokens"}


class StudyError(ConfigError):
    """A study cannot be made as its file says; the message names file and field."""


@dataclass(frozen=True)
class Series:
    """One question: the points that answer it are compared with one another.

    `kind`: a key of KINDS, and `queries` the numbers given under it. `layouts`, `precisions`, `lengths`: fields of the
    run by their dotted names, one mapping for each value of the axis. `synthetic`: for each of `lengths`, whether
    texts are made, each as long as the limit.
    """

    name: str
    kind: str
    queries: tuple[int, ...]
    gpus: tuple[int, ...]
    layouts: tuple[dict[str, Any], ...]
    precisions: tuple[dict[str, Any], ...]
    lengths: tuple[dict[str, Any], ...]
    synthetic: tuple[bool, ...]
    fields: dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One configuration to measure.

    Attributes:
        queries: of the global batch.
        fields: of the run, by dotted names: those of the axes and the study's own.
        synthetic: whether its texts are made.
    """

    series: str
    kind: str
    gpus: int
    queries: int
    fields: dict[str, Any] = field(hash=False)
    synthetic: bool = False

    @property
    def layout(self) -> dict[str, int]:
        """`tp`, `pp`, `cp` and `chunks`."""
        return {name: self.fields.get(dotted, 1) for name, dotted in LAYOUT.items()}

    @property
    def name(self) -> str:
        """For people, and one for each configuration: its last part follows from all fields."""
        layout = "".join(f"{name}{size}" for name, size in self.layout.items() if name in ("tp", "pp") or size > 1)
        series = re.sub("[^a-z0-9]+", "-", self.series.lower()).strip("-")[:40]
        tree = json.dumps([self.series, self.gpus, self.queries, self.synthetic, self.fields], sort_keys=True)
        return f"{series}-gpus{self.gpus}-{layout}-q{self.queries}-{hashlib.sha256(tree.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Study:
    """What the file says.

    Attributes:
        file: where it stands.
        base: the configuration of a run that all points begin with, as a tree.
        fields: what all points change of it, by dotted names.
        left_out: points whose layout does not divide their GPUs.
    """

    file: Path
    name: str
    output: Path
    base: dict[str, Any]
    fields: dict[str, Any]
    cluster: str | None
    gpus_per_node: int
    warmup_steps: int
    steps: int
    communication_every: int
    repeats: int
    minutes: float
    series: tuple[Series, ...]

    @property
    def all_steps(self) -> int:
        """As few as have, behind the warm-up, `steps` to measure, and one that times communication if any does."""
        number, measured, timed = self.warmup_steps, 0, 0
        while measured < self.steps or (self.communication_every and not timed):
            number += 1
            timed += self.times_communication(number)
            measured += not self.times_communication(number)
        return number

    def times_communication(self, step: int) -> bool:
        return self.communication_every > 0 and step % self.communication_every == 0

    def points(self) -> list[Point]:
        """In the order of the file; of two that are the same, one."""
        found = {point.name: point for series in self.series for point in _points(self, series) if fits(point)}
        return list(found.values())

    @property
    def left_out(self) -> int:
        return sum(not fits(point) for series in self.series for point in _points(self, series))


def fits(point: Point) -> bool:
    """Whether the layout divides the GPUs."""
    layout = point.layout
    return point.gpus % (layout["tp"] * layout["pp"] * layout["cp"]) == 0


def _points(study: Study, series: Series) -> Iterator[Point]:
    axes = product(
        series.precisions, zip(series.lengths, series.synthetic, strict=True), series.layouts, series.queries
    )
    for precision, (lengths, synthetic), layout, queries in axes:
        for gpus in series.gpus:
            fields = study.fields | series.fields | precision | lengths | layout
            batch = queries * gpus if series.kind == "weak" else queries
            yield Point(series.name, series.kind, gpus, batch, fields, synthetic)


class _Part:
    """A mapping of the file, read field by field; the errors say where it stands."""

    def __init__(self, file: Path, where: str, tree: Any, fields: str) -> None:
        self.file, self.where = file, where
        if not isinstance(tree, dict):
            raise StudyError(f"{file}: {where or 'the file'} must hold fields with their values, got {tree!r}")
        unknown = [name for name in tree if name not in fields.split()]
        if unknown:
            raise StudyError(f"{file}: {self._name(unknown[0])} is no field of a study; there are {fields}")
        self.tree = tree

    def _name(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else str(name)

    def wrong(self, name: str, what: str) -> StudyError:
        return StudyError(f"{self.file}: {self._name(name)} must be {what}, got {self.tree.get(name)!r}")

    def text(self, name: str, default: str | None = None) -> str:
        value = self.tree.get(name, default)
        if not isinstance(value, str) or not value:
            raise self.wrong(name, "a text")
        return value

    def number(self, name: str, default: int, least: int) -> int:
        value = self.tree.get(name, default)
        if not _is_number(value, least):
            raise self.wrong(name, f"a whole number of at least {least}")
        return value

    def numbers(self, name: str) -> tuple[int, ...]:
        value = self.tree.get(name)
        some = value if isinstance(value, list) else [value]
        if not some or not all(_is_number(one, 1) for one in some):
            raise self.wrong(name, "a whole number of at least 1, or a list of them")
        return tuple(some)

    def fields(self, name: str) -> dict[str, Any]:
        """Fields of the run by dotted names."""
        value = self.tree.get(name, {})
        if not isinstance(value, dict) or not all(isinstance(one, str) for one in value):
            raise self.wrong(name, "fields of the run, as `step.way: retain`")
        return value

    def axis(self, name: str, short: Mapping[str, str], also: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        """Values of an axis, a mapping each, with its short names written out; none: one that changes nothing."""
        values = self.tree.get(name, [{}])
        if not isinstance(values, list) or not values:
            raise self.wrong(name, f"a list of mappings of {', '.join(short)}")
        found = []
        for number, value in enumerate(values):
            if not isinstance(value, dict):
                raise StudyError(
                    f"{self.file}: {self._name(name)}.{number} must be a mapping of {', '.join(short)}, got {value!r}"
                )
            for key in value:
                if key not in short and key not in also and "." not in str(key):
                    raise StudyError(
                        f"{self.file}: {self._name(name)}.{number}.{key} is not known; there are "
                        f"{', '.join([*short, *also])}, and fields of the run with their dots"
                    )
            found.append({short.get(key, key): one for key, one in value.items()})
        return found


def _is_number(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def read_study(file: Path) -> Study:
    """The study that a file describes.

    Raises:
        StudyError: the file or the base configuration is not there or cannot be read, or a field cannot work.
    """
    part = _Part(
        file,
        "",
        _yaml(file, "a study"),
        "name output base set cluster gpus_per_node warmup_steps steps communication_every repeats minutes series",
    )
    series = part.tree.get("series")
    if not isinstance(series, list) or not series:
        raise part.wrong("series", "a list with one series at least")
    minutes = part.tree.get("minutes", 30)
    if not isinstance(minutes, (int, float)) or isinstance(minutes, bool) or not minutes > 0:
        raise part.wrong("minutes", "a number above 0")
    cluster = part.tree.get("cluster")
    if cluster is not None and part.text("cluster").lower() not in device_names():
        raise part.wrong("cluster", f"one of {', '.join(device_names())}, or null")
    study = Study(
        file=file,
        name=part.text("name", file.stem),
        output=Path(part.text("output", f"runs/scaling/{file.stem}")),
        base=_yaml(Path(part.text("base")), f"base of {file}"),
        fields=part.fields("set"),
        cluster=cluster,
        gpus_per_node=part.number("gpus_per_node", 8, 1),
        warmup_steps=part.number("warmup_steps", 2, 0),
        steps=part.number("steps", 8, 1),
        communication_every=part.number("communication_every", 4, 0),
        repeats=part.number("repeats", 3, 1),
        minutes=minutes,
        series=tuple(_series(file, number, one) for number, one in enumerate(series)),
    )
    if study.communication_every == 1:
        raise part.wrong("communication_every", "0, or at least 2: steps between are those whose time counts")
    _check(study)
    return study


def _series(file: Path, number: int, tree: Any) -> Series:
    part = _Part(file, f"series.{number}", tree, "name weak strong batch gpus layouts precisions lengths set")
    kinds = [kind for kind in KINDS if kind in part.tree]
    if len(kinds) != 1:
        raise StudyError(f"{file}: series.{number} must have one of {', '.join(KINDS)}, got {kinds or 'none'}")
    lengths = part.axis("lengths", LENGTHS, also=("synthetic",))
    for place, one in enumerate(lengths):
        if not isinstance(one.setdefault("synthetic", False), bool):
            raise StudyError(
                f"{file}: series.{number}.lengths.{place}.synthetic must be true or false, got {one['synthetic']!r}"
            )
        if one["synthetic"] and not all(limit in one for limit in LENGTHS.values()):
            raise StudyError(
                f"{file}: series.{number}.lengths.{place} is synthetic and must have queries and documents"
            )
    return Series(
        name=part.text("name"),
        kind=kinds[0],
        queries=part.numbers(kinds[0]),
        gpus=part.numbers("gpus"),
        layouts=tuple(part.axis("layouts", LAYOUT)),
        precisions=tuple(part.axis("precisions", PRECISION)),
        synthetic=tuple(one["synthetic"] for one in lengths),
        lengths=tuple({name: value for name, value in one.items() if name != "synthetic"} for one in lengths),
        fields=part.fields("set"),
    )


def _check(study: Study) -> None:
    """What can be said of the points before a run is asked."""
    names = [series.name for series in study.series]
    if len(set(names)) < len(names):
        raise StudyError(f"{study.file}: series must have different names, got {names}")
    for number, series in enumerate(study.series):
        for gpus in series.gpus:
            if gpus > study.gpus_per_node and gpus % study.gpus_per_node:
                raise StudyError(
                    f"{study.file}: series.{number}.gpus: {gpus} are no whole nodes of gpus_per_node = "
                    f"{study.gpus_per_node}"
                )
        for place, layout in enumerate(series.layouts):
            for name, dotted in LAYOUT.items():
                if not _is_number(layout.get(dotted, 1), 1):
                    raise StudyError(
                        f"{study.file}: series.{number}.layouts.{place}.{name} must be a whole number of at least 1, "
                        f"got {layout[dotted]!r}"
                    )
        if not any(fits(point) for point in _points(study, series)):
            raise StudyError(f"{study.file}: series.{number}: no layout divides any of gpus {list(series.gpus)}")


def _yaml(file: Path, what: str) -> dict[str, Any]:
    try:
        tree = yaml_loader.load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StudyError(f"cannot read {file} ({what}): {error}") from error
    if not isinstance(tree, dict):
        raise StudyError(f"{file} ({what}) must hold fields with their values, got {tree!r}")
    return tree
