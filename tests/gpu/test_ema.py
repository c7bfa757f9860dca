"""Averaged weights beside the fused Adam of TransformerEngine or Apex, and beside FP8 forms of the weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.helpers import averages
from tests.helpers.cases import Case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        (dict(), 2e-6),
        (dict(overlap=True, gather=True), 2e-6),
        (dict(dtype="bfloat16", backend="transformer_engine"), 0.02),
    ],
    ids=str,
)
def test_averages_are_those_of_a_loop_and_leave_no_trace(changes, bound):
    from nvembed_mcore.parallel.groups import shutdown

    if changes.get("backend") == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
    case = Case(ema=0.9, queries=5, **changes)
    found = averages.averaged(case)
    losses, kept = averages.without(dataclasses.replace(case, ema=None))
    shutdown()
    assert found["off"] <= bound and found["moved"] and found["is_back"] == [True, True]
    assert found["losses"] == pytest.approx(losses, rel=1e-5)
    assert "average" not in kept
