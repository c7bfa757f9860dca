"""Emulated linears against plain formulas in one process and several, and what they remember over a step."""

from __future__ import annotations

import pytest

from tests.helpers import fp8

RECIPES = ["tensorwise", "delayed", "blockwise", "mxfp8"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["column", "row"])
def test_products_are_those_of_the_formulas(world, recipe, kind):
    """Output and both gradients, of two microbatches in two steps; sizes that no block divides."""
    assert world(1).run(fp8.products, recipe, kind, (150, 136))[0] <= 1e-6


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("is_sequence_parallel", [False, True])
def test_tensor_parallel_scales(world, recipe, kind, is_sequence_parallel):
    """Blocks know of no rank, `delayed` has one scale for all, and `tensorwise` one for each part of a tensor; but
    under sequence parallelism one for what is gathered."""
    size = (256, 256) if recipe == "blockwise" else (64, 64)
    assert max(world(2).run(fp8.products, recipe, kind, size, (2, is_sequence_parallel))) <= 1e-6


def test_delayed_scales_are_those_of_all_microbatches_of_all_ranks(world):
    """And ranks with different numbers of them do not wait for one another."""
    for difference, scales in world(2).run(fp8.unequal_ranks):
        assert difference <= 1e-6 and scales == [1.0] * 3
