"""What the cost model says of the points that were measured, for the batches that they had."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from study_spec import Point, Study
from study_table import Row

from nvembed_mcore.config import RunConfig
from nvembed_mcore.data.tokenizer import load_tokenizer
from nvembed_mcore.scaling import hardware
from nvembed_mcore.scaling.architecture import Architecture
from nvembed_mcore.scaling.hardware import Cluster
from nvembed_mcore.scaling.layout import Layout
from nvembed_mcore.scaling.lengths import of_batches
from nvembed_mcore.scaling.predict import Prediction, predict
from nvembed_mcore.scaling.workload import Lengths, Workload
from nvembed_mcore.train import batch_source, build_stores


def add_predictions(study: Study, rows: Sequence[Row], configs: Mapping[str, RunConfig]) -> None:
    """Add `predicted_...` to the rows of points, for the cluster that the study names.

    Args:
        configs: by the name of a point.
    """
    cluster = hardware.cluster(study.cluster)
    points = {point.name: point for point in study.points()}
    for row in rows:
        if row["row"] == "point":
            config = configs[row["point"]]
            row |= figures(prediction(config, points[row["point"]], row["way"], study, cluster))


def prediction(config: RunConfig, point: Point, way: str, study: Study, cluster: Cluster) -> Prediction:
    """Of the steps that a point's runs measure, in the way that they took."""
    layout = dataclasses.replace(Layout.of(config, point.gpus), way=way)
    return predict(workload(config, point, study), layout, cluster)


def workload(config: RunConfig, point: Point, study: Study) -> Workload:
    """A point's work, with the texts of the steps that its runs measure."""
    architecture = Architecture.read(config.model.config or config.model.init_from)
    numbers = range(study.warmup_steps + 1, study.all_steps + 1)
    steps = [step for step in numbers if not study.times_communication(step)]
    lengths = made_lengths(config) if point.synthetic else lengths_of(config, steps)
    return Workload.of(config, architecture, lengths, "cpu" if study.cluster == "cpu" else "cuda")


def made_lengths(config: RunConfig) -> Lengths:
    """The texts of every step where they are made: each is as long as its limit."""
    queries, (dataset,) = config.batch_size, config.data.datasets
    passages = 1 + dataset.num_negatives
    tokens = [config.data.max_query_tokens] * queries + [config.data.max_document_tokens] * (queries * passages)
    query = np.concatenate([np.arange(queries), np.repeat(np.arange(queries), passages)])
    is_positive = np.concatenate([np.zeros(queries, bool), np.tile(np.arange(passages) == 0, queries)])
    return Lengths(np.array([tokens]), query[None], is_positive[None], "texts that are made")


def lengths_of(config: RunConfig, steps: Sequence[int]) -> Lengths:
    """The texts of a run's steps, counted from 1, from the stores of their tokens that its run made."""
    stores = build_stores(config.data, load_tokenizer(config.data.tokenizer), config.loss.distillation.is_on)
    source = batch_source(config, stores)
    batches = [source.batch(step - 1) for step in steps]
    return of_batches(batches, "the measured batches")


def figures(found: Prediction) -> Row:
    """Columns of the table."""
    return {
        "predicted_seconds": found.total,
        "predicted_seconds_low": found.low,
        "predicted_seconds_high": found.high,
        "predicted_memory_bytes": round(sum(found.memory.values())),
    }
