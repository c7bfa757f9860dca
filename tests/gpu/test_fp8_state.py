"""Histories of TransformerEngine's delayed scaling in checkpoints."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from nvembed_mcore.checkpoint import fp8_state
from nvembed_mcore.metrics import PhaseTimer
from tests.helpers import cases
from tests.helpers.cases import Case as AnyCase
from tests.helpers.plain import training_batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
pytest.importorskip("transformer_engine.pytorch")

Case = partial(AnyCase, backend="transformer_engine", fp8="delayed", kind="mean")
SIZES = dict(hidden_size=256, intermediate_size=512, head_dim=64, num_attention_heads=4, num_key_value_heads=2)


def test_a_run_goes_on_with_the_histories_that_it_had():
    """They are there before the first forward, and the next step's loss is the same by bits."""
    from nvembed_mcore.parallel.groups import shutdown

    first, again = (cases.build_step(Case(way="retain", budget=140), **SIZES)[0] for _ in range(2))
    for number in (1, 2):
        first(training_batch(7, number), number, PhaseTimer())
    saved = {name: one.data.clone() for name, one in fp8_state.sharded_state(first.chunks[0]).items()}
    assert len(saved) == 4 * 4 * 4 and all(torch.isfinite(one).all() for one in saved.values())
    assert any((one != 1).any() for name, one in saved.items() if name.endswith("scale"))
    fp8_state.load(again.chunks[0], saved)
    found = fp8_state.histories_of(again.chunks[0].module)
    assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)
    with torch.no_grad():
        for mine, theirs in zip(again.chunks[0].parameters(), first.chunks[0].parameters(), strict=True):
            mine.copy_(theirs)
    losses = [step(training_batch(7, 1), 3, PhaseTimer()).loss for step in (first, again)]
    assert losses[0] == losses[1]
    shutdown()
