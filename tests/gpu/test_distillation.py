"""Distillation on a GPU: in float32 against the CPU's reference, in bfloat16 as the weights are."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import cases
from tests.helpers.cases import Case
from tests.helpers.grid import DISTILLED, OPTIONS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("exchange", ["reduce_scatter", "recompute"])
@pytest.mark.parametrize("name", ["distillation", "distillation with others"])
def test_a_step_equals_one_process(name, exchange):
    """The proof grid's case, in float32 against float64 on the CPU."""
    from nvembed_mcore.parallel.groups import shutdown

    found = cases.training_steps(Case(loss=OPTIONS[name], exchange=exchange, distributed=False))
    shutdown()
    assert max(found[name] for name in ("loss", "norm", "gradient", "parameters")) <= 1e-4, found


def test_a_step_in_bfloat16_is_near_the_one_in_float32():
    """The divergence is computed in float32 whatever the products of InfoNCE run in."""
    from nvembed_mcore.parallel.groups import shutdown

    losses = [cases.dropout_step(Case(loss=DISTILLED, dtype=dtype))[0] for dtype in ("float32", "bfloat16")]
    shutdown()
    assert losses[1] == pytest.approx(losses[0], rel=5e-2)
