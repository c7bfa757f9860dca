"""FGM and R-Drop on a GPU: in float32 against the CPU's reference, in bfloat16 one way of stepping against another."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import cases
from tests.helpers.cases import Case
from tests.helpers.grid import ALL_TARGETS, EPSILON, OPTIONS_UNDER_R_DROP, R_DROP

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("options", OPTIONS_UNDER_R_DROP.values(), ids=OPTIONS_UNDER_R_DROP)
def test_a_step_equals_one_process(options):
    """The proof grid's case, in float32 against float64 on the CPU."""
    from nvembed_mcore.parallel.groups import shutdown

    found = cases.training_steps(Case(fgm=EPSILON, loss=options, distributed=False))
    shutdown()
    assert max(found[name] for name in ("loss", "norm", "gradient", "parameters")) < 1e-4


def test_cached_replays_the_dropout_of_each_pass():
    """In bfloat16, where the products of the scores run on tensor cores."""
    from nvembed_mcore.parallel.groups import shutdown

    how = dict(fgm=EPSILON, loss=R_DROP, targets=ALL_TARGETS, lora_dropout=0.2, dtype="bfloat16", budget=100)
    retain, cached = (cases.dropout_step(Case(**how, way=way)) for way in ("retain", "cached"))
    shutdown()
    assert cached == pytest.approx(retain, rel=1e-2)
