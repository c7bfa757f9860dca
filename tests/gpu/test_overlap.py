"""Gradients and weights that travel beside the computation, over NCCL; with one process there is nobody to send to."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.cases import Case, training_steps

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(("way", "budget"), [("single", 100_000), ("retain", 200), ("cached", 200)])
def test_steps_equal_one_process_on_the_cpu(way, budget):
    from nvembed_mcore.parallel.groups import shutdown

    found = training_steps(Case(way=way, budget=budget, overlap=True, gather=True))
    shutdown()
    assert max(found[name] for name in ("loss", "norm", "parameters")) <= 1e-4, found
