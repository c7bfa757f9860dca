"""What a blend refuses, by its exact message."""

from __future__ import annotations

import math

import pytest

from nvembed_mcore.config import DataConfig, DatasetConfig
from nvembed_mcore.data.blend import Blend


def data(**fields) -> DataConfig:
    return DataConfig(tokenizer="t", datasets=[DatasetConfig(path="a.jsonl")], **fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: data(blend_temperature=0.0), "data.blend_temperature must be a number from 0.1 up, got 0.0"),
        (lambda: data(blend_temperature=-1.0), "data.blend_temperature must be a number from 0.1 up, got -1.0"),
        (lambda: data(blend_temperature=0.05), "data.blend_temperature must be a number from 0.1 up, got 0.05"),
        (lambda: data(blend_temperature=math.nan), "data.blend_temperature must be a number from 0.1 up, got nan"),
        (lambda: data(blend_temperature=math.inf), "data.blend_temperature must be a number from 0.1 up, got inf"),
        (
            lambda: DatasetConfig(path="a.jsonl", max_records=0),
            "data.datasets.max_records of a.jsonl must be at least 1, got 0",
        ),
        (
            lambda: DatasetConfig(path="a.jsonl", weight=0.0),
            "data.datasets.weight of a.jsonl must be a number above 0, got 0.0",
        ),
        (
            lambda: DatasetConfig(path="a.jsonl", weight=math.inf),
            "data.datasets.weight of a.jsonl must be a number above 0, got inf",
        ),
        (
            lambda: DatasetConfig(path="a.jsonl", num_positives=0),
            "data.datasets.num_positives must be at least 1, got 0",
        ),
        (
            lambda: DatasetConfig(path="a.jsonl", num_negatives=-1),
            "data.datasets.num_negatives must not be negative, got -1",
        ),
        (lambda: data(max_query_tokens=2), "data.max_query_tokens must be at least 3, got 2"),
        (lambda: data(max_bad_records=-1), "data.max_bad_records must be at least 0, got -1"),
        (
            lambda: DataConfig(tokenizer="t", datasets=[]),
            "data.datasets must name at least one data set, got none",
        ),
        (lambda: Blend([], [], 1, 1, 1, "f"), "a blend needs data sets with a weight each, got 0 sizes, 0 weights"),
        (lambda: Blend([0], [None], 1, 1, 1, "f"), "data set 0 must have at least 1 record, got 0"),
        (lambda: Blend([1], [-1.0], 1, 1, 1, "f"), "the weight of data set 0 must be a number above 0, got -1.0"),
        (
            lambda: Blend([1, 2], [None, None], 4, 1, 1, "f"),
            "batch_size must be between 1 and the 3 records of the data, got 4",
        ),
        (lambda: Blend([9], [None], 1, 1, 1, "f").samples(-1), "step must not be negative, got -1"),
        (
            lambda: Blend([500, 7], [None, None], 8, 1, 1, "f", one_dataset_batches=True),
            "a batch of 8 takes up to 8 records of data set 1, which has 7: lower batch_size",
        ),
        (
            lambda: Blend([500, 7], [None, None], 16, 1, 1, "f", temperature=1e9),
            "a batch of 16 takes up to 8 records of data set 1, which has 7: lower batch_size or its weight",
        ),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message
