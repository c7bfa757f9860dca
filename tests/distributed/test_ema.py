"""The averaged weights in every layout: those of a loop in float64, and gone without a trace after an evaluation."""

from __future__ import annotations

import dataclasses

import pytest

from tests.helpers import averages
from tests.helpers.cases import Case
from tests.helpers.grid import ALL_TARGETS

CASES = {
    "dp2, weights still travelling": Case(world=2, overlap=True, gather=True),
    "tp2, LoRA": Case(world=2, tp=2, sp=True, targets=ALL_TARGETS, loss={"learn_temperature": True}),
    "pp2 x 2": Case(world=2, pp=2, chunks=2),
    "cp2, delayed FP8": Case(world=2, cp=2, fp8="delayed"),
    "dp2 whole, bfloat16": Case(world=2, distributed=False, dtype="bfloat16"),
}
BOUNDS = {"dp2 whole, bfloat16": 0.02}
"""There the model's weights, which the loop sees, are rounded; the average is of the optimizer's."""


@pytest.mark.parametrize("name", CASES)
def test_averages_are_those_of_a_loop_and_leave_no_trace(world, name):
    case = dataclasses.replace(CASES[name], ema=0.9, queries=5)
    found = world(2).run(averages.averaged, case)
    expected = world(2).run(averages.without, dataclasses.replace(case, ema=None))
    for one, (losses, kept) in zip(found, expected, strict=True):
        assert one["off"] <= BOUNDS.get(name, 2e-6)
        assert one["moved"] and one["is_back"] == [True, True]
        assert one["losses"] == losses
        assert kept <= {"exp_avg", "exp_avg_sq"}  # without a decay there is nothing more
