"""Emulated linears against plain formulas in one process and several, and what they remember over a step."""

from __future__ import annotations

import dataclasses

import pytest

from tests.helpers import fp8
from tests.helpers.cases import Case
from tests.helpers.grid import ALL_TARGETS

RECIPES = ["tensorwise", "delayed", "blockwise", "mxfp8"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["column", "row"])
def test_products_are_those_of_the_formulas(world, recipe, kind):
    """Output and both gradients, of two microbatches in two steps; sizes that no block divides."""
    assert world(1).run(fp8.products, recipe, kind, (150, 136))[0] <= 1e-6


@pytest.mark.parametrize(
    ("recipe", "is_sequence_parallel"),
    [
        ("tensorwise", False),
        ("tensorwise", True),
        pytest.param("delayed", False, marks=pytest.mark.slow),
        ("delayed", True),
        pytest.param("blockwise", False, marks=pytest.mark.slow),
        ("blockwise", True),
        pytest.param("mxfp8", False, marks=pytest.mark.slow),
        ("mxfp8", True),
    ],
)
@pytest.mark.parametrize("kind", ["column", "row"])
def test_tensor_parallel_scales(world, recipe, kind, is_sequence_parallel):
    """Blocks know of no rank, `delayed` has one scale for all, and `tensorwise` one for each part of a tensor; but
    under sequence parallelism one for what is gathered."""
    size = (256, 256) if recipe == "blockwise" else (64, 64)
    assert max(world(2).run(fp8.products, recipe, kind, size, (2, is_sequence_parallel))) <= 1e-6


def test_delayed_scales_are_those_of_all_microbatches_of_all_ranks(world):
    """And ranks with different numbers of them do not wait for one another."""
    for difference, scales in world(2).run(fp8.unequal_ranks):
        assert difference <= 1e-6 and scales == [1.0] * 3


@pytest.mark.parametrize(
    "case",
    [
        dict(world=1, fp8="tensorwise"),
        dict(world=2, fp8="delayed"),
        pytest.param(
            dict(world=2, tp=2, sp=True, fp8="blockwise", targets=ALL_TARGETS, lora_dropout=0.2),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_cached_is_retain_by_bits(world, case):
    """The second forward rounds as the first, and counts once."""
    ways = [world(case["world"]).run(fp8.two_steps, Case(**case, way=way, budget=60)) for way in ("retain", "cached")]
    assert ways[0] == ways[1]
    if case["world"] == 1:
        (off,) = world(1).run(fp8.two_steps, Case(way="retain", budget=60))
        assert ways[0][0]["losses"][0] != off["losses"][0]
        assert ways[0][0]["losses"][0] == pytest.approx(off["losses"][0], rel=0.1)


def test_delayed_scales_are_those_of_all_ranks_in_a_run(world):
    """Embedding texts between the steps moves nothing, and the pipeline counts each pack once."""
    case = Case(world=2, fp8="delayed", way="cached", budget=60)
    first, second = world(2).run(fp8.two_steps, case, evaluates=True)
    assert first == second == world(2).run(fp8.two_steps, case)[0]
    assert all(scale != 1.0 for scales in first["scales"] for scale in scales)
    shared = world(2).run(fp8.two_steps, dataclasses.replace(case, cp=2))
    assert shared[0] == shared[1] and shared[0]["scales"] != first["scales"], "the packs are others"
    stages = world(2).run(fp8.two_steps, Case(world=2, pp=2, fp8="delayed", budget=60))
    assert stages[0]["scales"] != stages[1]["scales"] and len(stages[0]["scales"]) == len(first["scales"]) / 2


@pytest.mark.parametrize(("targets", "recipe", "second"), [((), "tensorwise", 1), (("q",), "tensorwise", 0),
                                                            (("q",), "delayed", 1)])  # fmt: skip
def test_a_weight_is_rounded_once_a_step_and_a_frozen_one_once(world, targets, recipe, second):
    """With `delayed`, a frozen one again when it has its scale."""
    case = Case(fp8=recipe, targets=targets, way="cached", budget=60)
    ((linears, *counts),) = world(1).run(fp8.roundings_of_weights, case)
    assert linears == 16 and counts == [linears, second * linears]


def test_adapters_head_and_embedding_are_not_rounded(world):
    ((names, difference),) = world(1).run(fp8.adapted_linear)
    inside = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
    assert {*names} == {f"decoder.layers.{layer}.{one}" for layer in range(4) for one in inside}
    assert difference <= 1e-6
