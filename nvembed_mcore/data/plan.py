"""What the stages of a run draw from each data set, before anything is tokenised or even there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvembed_mcore.config import ConfigError, RunConfig
from nvembed_mcore.data.beir import beir_files
from nvembed_mcore.data.faults import DataError
from nvembed_mcore.data.files import blocks, line_blocks, numbered_lines, rows
from nvembed_mcore.data.records import read_records
from nvembed_mcore.data.source import make_blend, used_records
from nvembed_mcore.data.sources import data_files, is_loaded

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class DatasetPlan:
    """What a stage draws from one data set.

    Attributes:
        path: the data set.
        task: its kind.
        records: what its file holds, or what is expected of it.
        is_counted: whether `records` was counted.
        used: records that the stage uses, at most `max_records`.
        share: of the blend, 0 to 1.
        draws: samples drawn in all steps, exactly; each is a query with its passages.
        in_batch_negatives: whether passages of other queries are its negatives.
        num_negatives: hard negatives of a query at most.
    """

    path: str
    task: str
    records: int
    is_counted: bool
    used: int
    share: float
    draws: int
    in_batch_negatives: bool
    num_negatives: int

    @property
    def epochs(self) -> float:
        """Passes over its records."""
        return self.draws / self.used

    @property
    def queries(self) -> int:
        """Different records among the draws."""
        return min(self.draws, self.used)


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one stage draws.

    Attributes:
        name: how messages and tables call its configuration.
        stage, steps, batch_size: those of the run.
        datasets: in the order of the configuration.
    """

    name: str
    stage: int
    steps: int
    batch_size: int
    datasets: list[DatasetPlan]


def plan_stage(config: RunConfig, name: str) -> StagePlan:
    """Count what a stage draws from each data set in all its steps.

    Args:
        config: the stage.
        name: how messages call it.

    Raises:
        ConfigError: a data set has neither a file nor `max_records`, or a batch is too large for the data.
        DataError: a file is there and cannot be counted.
    """
    counts = [count_records(dataset.path) for dataset in config.data.datasets]
    records = []
    for number, (dataset, count) in enumerate(zip(config.data.datasets, counts, strict=True)):
        if count is None and dataset.max_records is None:
            raise ConfigError(
                f"{name}: data.datasets.{number}: nothing to count at {dataset.path}, and max_records is null; make "
                f"the file, or give the number to expect"
            )
        records.append(dataset.max_records if count is None else count)
    sizes = used_records(config.data, records)
    try:
        # The order of samples depends on the data; how many of each there are does not.
        blend = make_blend(config.data, sizes, config.batch_size, config.seed, config.stage, fingerprint="")
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    datasets = [
        DatasetPlan(
            path=dataset.path,
            task=dataset.task,
            records=records[number],
            is_counted=counts[number] is not None,
            used=sizes[number],
            share=float(blend.shares[number]),
            draws=draws,
            in_batch_negatives=dataset.uses_in_batch_negatives,
            num_negatives=dataset.num_negatives,
        )
        for number, (dataset, draws) in enumerate(zip(config.data.datasets, blend.drawn(config.steps), strict=True))
    ]
    return StagePlan(
        name=name, stage=config.stage, steps=config.steps, batch_size=config.batch_size, datasets=datasets
    )


def count_records(path: str) -> int | None:
    """Records of a data set, as cheaply as its form allows; None where there is none, or where it must be loaded.

    Lines of JSON and TSV are counted, not parsed; a Parquet file says its number of rows; of a BEIR folder the queries
    with a positive judgement are counted. So bad rows, and judged documents that are missing, are not seen. A folder
    that `datasets` wrote is read.

    Raises:
        DataError: what is there cannot be read, or is of an unknown kind.
    """
    place = Path(path)
    if path.startswith("hf:") or not place.exists():
        return None
    if is_loaded(place):
        return sum(1 for _ in read_records(path))
    corpus, queries, qrels = beir_files(place, "train")
    if corpus.is_file() and queries.is_file():
        return _count_judged(qrels)
    return sum(_count_rows(file) for file in data_files(place))


def _count_judged(qrels: Path) -> int:
    """Queries with a document of a score above 0; lines are query, document and score with tabs between."""
    queries = set()
    for block in line_blocks(qrels):
        for _, _, line in numbered_lines(block):
            query, _, score = line.rpartition(b"\t")
            if score.strip().isdigit() and int(score) > 0:
                queries.add(query.partition(b"\t")[0])
    return len(queries)


def _count_rows(file: Path) -> int:
    import pyarrow
    import pyarrow.parquet

    if file.suffix == ".parquet":
        try:
            return pyarrow.parquet.read_metadata(file).num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"cannot read {file} as Parquet: {error}") from error
    count = 0
    for block in blocks(file):
        if block.kind == "csv":  # a row may have several lines
            count += sum(1 for _ in rows(block, lambda line, column, reason: None))
        else:
            count += sum(1 for line in block.content.split(b"\n") if line.strip())
    return count


def as_json(stages: Sequence[StagePlan]) -> dict[str, Any]:
    """All of it as JSON values: `stages` with their `datasets`, and `sets` with their sums over the stages."""
    return {
        "stages": [
            asdict(stage)
            | {"draws": stage.steps * stage.batch_size}
            | {"datasets": [asdict(one) | {"epochs": one.epochs, "queries": one.queries} for one in stage.datasets]}
            for stage in stages
        ],
        "sets": [
            {"path": path, "draws": sum(draws), "epochs": epochs} for path, (draws, epochs) in _sums(stages).items()
        ],
    }


def tables(stages: Sequence[StagePlan]) -> list[Table]:
    """One table a stage and, of several stages, one of their sums."""
    return [_stage_table(stage) for stage in stages] + ([_sum_table(stages)] if len(stages) > 1 else [])


def _sums(stages: Sequence[StagePlan]) -> dict[str, tuple[list[int], float]]:
    """For each path its draws in each stage, and its epochs in all of them."""
    sums: dict[str, tuple[list[int], float]] = {}
    for number, stage in enumerate(stages):
        for one in stage.datasets:
            draws, epochs = sums.get(one.path, ([0] * len(stages), 0.0))
            draws[number] += one.draws
            sums[one.path] = draws, epochs + one.epochs
    return sums


def _stage_table(stage: StagePlan) -> Table:
    table = _table(
        f"{stage.name}: stage {stage.stage}, {stage.steps:,} steps of {stage.batch_size:,} queries",
        caption="* expected, there is no file yet. A draw is a query with its passages; queries: different ones among "
        "the draws; negatives: hard ones of a query at most.",
    )
    table.add_column("task")
    for name in ("records", "share", "draws", "epochs", "queries", "in-batch", "negatives"):
        table.add_column(name, justify="right")
    for one in stage.datasets:
        table.add_row(
            one.path,
            one.task,
            f"{one.used:,}" + (f" of {one.records:,}" if one.used < one.records else "") + "*" * (not one.is_counted),
            f"{one.share:.2%}",
            f"{one.draws:,}",
            f"{one.epochs:.2f}",
            f"{one.queries:,}",
            "yes" if one.in_batch_negatives else "no",
            f"{one.num_negatives}",
        )
    used, draws, queries = (sum(getattr(one, name) for one in stage.datasets) for name in ("used", "draws", "queries"))
    table.add_section()
    table.add_row("all", "", f"{used:,}", "", f"{draws:,}", f"{draws / used:.2f}", f"{queries:,}")
    return table


def _sum_table(stages: Sequence[StagePlan]) -> Table:
    table = _table(f"{len(stages)} stages together")
    for name in (*(f"draws in stage {stage.stage}" for stage in stages), "draws", "epochs"):
        table.add_column(name, justify="right")
    for path, (draws, epochs) in _sums(stages).items():
        table.add_row(path, *(f"{number:,}" for number in draws), f"{sum(draws):,}", f"{epochs:.2f}")
    by_stage = [stage.steps * stage.batch_size for stage in stages]
    table.add_section()
    table.add_row("all", *(f"{number:,}" for number in by_stage), f"{sum(by_stage):,}", "")
    return table


def _table(title: str, caption: str | None = None) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    table.add_column("data set", no_wrap=True)
    return table
