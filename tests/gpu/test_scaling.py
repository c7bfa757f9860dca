"""Memory that the cost model says a GPU holds, against the peak of torch's allocator in steps of the trainer."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformer_engine.pytorch")

from tests.helpers import scaling  # noqa: E402, F401 - it lets the next lines find the programs

import real_cases  # noqa: E402 # isort: skip
import real_steps  # noqa: E402 # isort: skip
import validate_memory  # noqa: E402 # isort: skip

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_what_a_layout_is_said_to_need_is_what_a_step_allocates():
    rows = validate_memory.memory_rows(real_cases.GPU, real_steps.run(tuple(real_cases.GPU)))
    assert len(rows) == len(real_cases.GPU)
    for row in rows:
        assert row["error"] < 0.1, row
