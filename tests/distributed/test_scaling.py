"""The cost model against steps of the trainer: parameters and bytes to the digit, memory within a twentieth."""

from __future__ import annotations

import pytest

from nvembed_mcore.scaling.parameters import buffers_of, chunk_parameters
from tests.helpers import scaling
from tests.helpers.scaling import NAMED

# Imported by the helper.
import validate_bytes  # isort: skip
import validate_memory  # isort: skip

ON_ONE = ["cached, latent"]
ON_TWO = ["DP 2, symmetric", "TP 2, SP, adapters", "PP 2, interleaved", "CP 2"]


TWO_PASSES_ON_ONE = ["cached, FGM", "retain, adapters, R-Drop"]
TWO_PASSES_ON_TWO = [
    "TP 2, SP, adapters, FGM",
    "DP 2, adapters, R-Drop",
    "PP 2, adapters, FGM, R-Drop",
    "CP 2, FGM",
]


@pytest.mark.parametrize(
    ("world_size", "names"),
    [
        (1, ON_ONE),
        (2, ON_TWO[:2]),
        pytest.param(2, ON_TWO[2:], marks=pytest.mark.slow),
        pytest.param(1, TWO_PASSES_ON_ONE, marks=pytest.mark.slow),
        pytest.param(2, TWO_PASSES_ON_TWO, marks=pytest.mark.slow),
    ],
)
def test_memory_and_bytes_are_those_of_a_step(world, world_size, names):
    by_rank = world(world_size).run(scaling.measured, names)
    measured = dict(zip(names, zip(*by_rank, strict=True), strict=True))
    cases = [NAMED[name] for name in names]
    for row in validate_memory.memory_rows(cases, measured):
        assert row["error"] < 0.05, row
    for row in validate_bytes.bytes_rows(cases, measured):
        assert row["error"] == 0, row


@pytest.mark.parametrize("name", ["TP 2, SP, adapters", "PP 2, learned temperature"])
def test_parameters_and_buckets_are_those_that_are_built(world, name):
    case = NAMED[name]
    for stage, named, buckets in world(case.world).run(scaling.parameters_by_part, name):
        for chunk, expected in enumerate(named):
            parameters = chunk_parameters(case.workload, case.layout, stage, chunk)
            assert [one.name for one in parameters] == list(expected)
            assert {one.name: one.numel for one in parameters} == expected
            found = buffers_of(case.workload, case.layout, stage, chunk)
            assert [size for buffer in found for size in buffer.buckets] == buckets[chunk]
