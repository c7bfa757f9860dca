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
