"""The encoder against Hugging Face's Mistral, states and gradients, in every layout."""

import pytest

from tests.helpers import cases

LAYOUTS = {
    1: [(1, 1, False)],
    2: [(2, 1, False), (2, 1, True), (1, 2, False)],
    4: [(2, 2, False), (2, 2, True)],
}


@pytest.mark.parametrize(("size", "layout"), [(size, one) for size, many in LAYOUTS.items() for one in many])
def test_states_and_gradients_equal_hugging_face(world, size, layout):
    for result in world(size).run(cases.encoder_states, *layout):
        assert result.get("states", 0.0) <= 5e-6
        assert result["gradient"] <= 1e-5


def test_causal_mask_equals_hugging_face(world):
    (result,) = world(1).run(cases.encoder_states, 1, 1, False, mask="causal")
    assert result["states"] <= 5e-6
    assert result["gradient"] <= 1e-5
