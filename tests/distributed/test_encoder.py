"""The encoder against Hugging Face's Mistral, states and gradients, in every layout."""

import pytest

from tests.helpers import cases, states
from tests.helpers.cases import Case

LAYOUTS = {
    1: [(1, 1, False, 1)],
    2: [(2, 1, False, 1), (2, 1, True, 1), (1, 2, False, 1), (1, 2, False, 2)],
    4: [(2, 2, False, 1), (2, 2, True, 1), (2, 2, True, 2)],
}
STATES, GRADIENT = 2e-6, 1e-5
"""Relative to the largest state, and to the largest gradient of the parameter."""


@pytest.mark.parametrize(("size", "layout"), [(size, one) for size, many in LAYOUTS.items() for one in many])
def test_states_and_gradients_equal_hugging_face(world, size, layout):
    tp, pp, sp, chunks = layout
    for result in world(size).run(states.encoder_states, tp, pp, sp, chunks_per_stage=chunks):
        assert result.get("states", 0.0) <= STATES
        assert result["gradient"] <= GRADIENT


def test_causal_mask_equals_hugging_face(world):
    (result,) = world(1).run(states.encoder_states, 1, 1, False, mask="causal")
    assert result["states"] <= STATES
    assert result["gradient"] <= GRADIENT


@pytest.mark.parametrize("num_texts", [1, 9])
@pytest.mark.parametrize(
    "layout", [dict(world=2), dict(world=4, tp=2, sp=True, pp=2, chunks=2), dict(world=4, pp=2)], ids=str
)
def test_multi_layer_embeds_as_the_reference(world, layout, num_texts):
    """Without graphs, as evaluation does; with one text, all other packs are dummies."""
    found = world(layout["world"]).run(
        cases.embeddings_of_texts, Case(**layout, kind="multi_layer", budget=40), num_texts
    )
    assert {number for _, number in found} <= {0, num_texts} and any(number for _, number in found)
    assert max(difference for difference, _ in found) <= 5e-6
