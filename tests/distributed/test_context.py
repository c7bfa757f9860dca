"""Context parallelism besides the grid of steps (`tests/helpers/grid.py`): attention, states, groups, what is kept."""

from __future__ import annotations

import pytest

from tests.helpers import cases, context, states
from tests.helpers.cases import Case
from tests.helpers.grid import BOUND, LEARNED, budget_for

FOUR = pytest.param(4, marks=pytest.mark.slow)


@pytest.mark.parametrize("size", [2, FOUR])
def test_attention_over_shared_texts_is_that_over_whole_ones(world, size):
    """Both forms, with and without a causal mask; among the texts are some that leave a rank without a token."""
    for found in world(size).run(context.attention_differences, size):
        assert len(found) == 4 and max(found.values()) <= 1e-12, found


@pytest.mark.parametrize("mask", ["bidirectional", "causal"])
@pytest.mark.parametrize("size", [2, FOUR])
def test_states_and_gradients_equal_hugging_face(world, size, mask):
    for result in world(size).run(states.encoder_states, 1, 1, False, mask=mask, cp=size):
        assert result["states"] <= 2e-6 and result["gradient"] <= BOUND


@pytest.mark.parametrize("mask", ["bidirectional", "causal"])
@pytest.mark.parametrize("size", [2, FOUR])
def test_transformer_engine_is_told_what_it_needs(world, size, mask):
    """With a stand-in that reads its arguments as the real one does, and leaves NaN where that leaves anything."""
    for result, calls in world(size).run(context.encoder_states_by_transformer_engine, mask, size):
        assert result["states"] <= 2e-6 and result["gradient"] <= BOUND
        assert calls == 2 * 4, "packs and layers"


def test_who_is_in_which_group(world):
    """Neighbours share texts; the data-parallel group has those with different ones."""
    found = world(4).run(context.groups_of_ranks, 1, 2)
    assert [one["cp"] for one in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [one["dp"] for one in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(one["dp_cp"] == [0, 1, 2, 3] for one in found)
    assert [one["place"] for one in found] == [[0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1]]


@pytest.mark.parametrize("kind", ["latent", "multi_layer"])
def test_without_its_factor_the_gradient_does_not_pass(world, kind):
    """A test of the test."""
    case = Case(world=2, cp=2, kind=kind, distributed=False, clip=0.0, loss=LEARNED)
    for result in world(2).run(context.step_without_the_factor, case):
        assert result["gradient"] > 100 * BOUND and result["norm"] > BOUND


def test_a_rank_keeps_half_of_a_text(world):
    """Activations for the backward pass; keys and values of the whole text are kept besides, here 2 x 16 of the about
    900 numbers that a layer keeps of a token."""
    (whole,) = world(1).run(context.graph_of_a_long_text, Case(kind="mean"), 512)
    for part in world(2).run(context.graph_of_a_long_text, Case(world=2, cp=2, kind="mean"), 512):
        assert part <= 0.55 * whole


def test_ranks_drop_for_their_own_tokens(world):
    first, second = world(2).run(context.dropped_attention, Case(world=2, cp=2))
    (alone,) = world(1).run(context.dropped_attention, Case())
    assert first != second and alone not in (first, second)


@pytest.mark.parametrize("num_texts", [1, 9])
def test_evaluation_embeds_as_the_reference(world, num_texts):
    case = Case(world=2, cp=2, kind="multi_layer", budget=20)
    for difference, number in world(2).run(cases.embeddings_of_texts, case, num_texts):
        assert number == num_texts and difference <= 5e-6


def test_traffic_has_a_name_for_each_group(world):
    """Keys and values go over the ranks that share a text; gradients over all that have the same parameters."""
    case = Case(world=4, cp=2, way="retain", budget=budget_for(3, 2, 7, cp=2), exchange="recompute")
    for calls, sizes, gradients in world(4).run(cases.step_traffic, case):
        packs = calls["all_reduce", "context"]
        # Each of four layers gathers keys and values of a pack, and hands back what was said of them.
        assert packs >= 2 and calls["all_gather", "context"] == calls["reduce_scatter", "context"] == 4 * packs
        assert sizes["reduce_scatter", "context"] == 2 * sizes["all_gather", "context"]
        assert calls["reduce_scatter", "data and context"] == 1
        assert gradients <= sizes["reduce_scatter", "data and context"] <= gradients + 100
        assert calls["all_gather", "data"] == 2
