"""The figures of `tools/fp8_evidence.py`."""

from __future__ import annotations

import pytest

from tools.fp8_evidence import summary


def pair(score: float, loss: float) -> dict:
    stage = {"ndcg_at_10": score, "loss": [9.0] * 18 + [loss, loss + 0.2]}
    return {"stage1": stage, "stage2": stage, "cpu_seconds": 7}


def test_differences_are_those_of_the_same_seed():
    """Also where a recipe has fewer seeds yet than `off` has."""
    off = {1: pair(0.30, 1.0), 2: pair(0.20, 2.0), 3: pair(0.10, 3.0)}
    found = summary({"off": off, "tensorwise": {1: pair(0.31, 1.5), 3: pair(0.07, 3.1)}, "delayed": {}})
    assert found["off_ndcg_at_10_stage1"] == pytest.approx(0.2)
    assert found["off_ndcg_at_10_stage1_spread"] == pytest.approx(0.1)
    assert found["tensorwise_minus_off_stage2"] == pytest.approx(-0.01)
    assert found["tensorwise_minus_off_stage2_largest"] == pytest.approx(-0.03)
    assert found["tensorwise_loss_stage1"] == pytest.approx(2.4)
    assert found["tensorwise_loss_minus_off_stage1"] == pytest.approx(0.3)
    assert not [name for name in found if name.startswith(("delayed", "off_minus"))]
