"""One step in every layout against one process holding the batch: loss, gradients, clip norm, parameters."""

import pytest

from tests.helpers import cases

SMALL = 90
"""A token budget that makes several packs a rank, and not the same number on each."""

CASES = [
    # world, tp, pp, sp, way, budget
    (1, 1, 1, False, "single", 100_000),
    (1, 1, 1, False, "cached", SMALL),
    (2, 1, 1, False, "single", 100_000),
    (2, 1, 1, False, "cached", SMALL),
    (2, 2, 1, False, "single", 100_000),
    (2, 2, 1, True, "single", 100_000),
    (2, 2, 1, True, "cached", SMALL),
    (2, 1, 2, False, "cached", SMALL),
    (4, 1, 1, False, "single", 100_000),
    (4, 1, 1, False, "cached", SMALL),
    (4, 2, 2, True, "cached", SMALL),
    (4, 2, 1, True, "cached", SMALL),
    (4, 1, 2, False, "cached", SMALL),
]


def check(results):
    for result in results:
        assert result["loss"] <= 1e-5
        assert result["norm"] <= 1e-5
        assert result.get("gradient", 0.0) <= 1e-5
        assert result["parameters"] <= 1e-5


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize(("size", "tp", "pp", "sp", "way", "budget"), CASES)
def test_equals_one_process(world, size, tp, pp, sp, way, budget, distributed):
    results = world(size).run(cases.contrastive_step, tp, pp, sp, way, budget=budget, distributed=distributed)
    check(results)
    assert (results[0]["microbatches"] > 1) == (budget == SMALL)


@pytest.mark.parametrize("kind", ["mean", "last", "self_attention"])
@pytest.mark.parametrize(("size", "tp", "sp"), [(1, 1, False), (2, 2, True), (2, 1, False)])
def test_every_pooling(world, size, tp, sp, kind):
    check(world(size).run(cases.contrastive_step, tp, 1, sp, "cached", kind=kind, budget=SMALL, distributed=False))


def test_a_rank_without_texts(world):
    """One query with its positive and one negative: three texts on four ranks."""
    check(world(4).run(cases.contrastive_step, 1, 1, False, "cached", num_queries=1, distributed=False))
    check(world(4).run(cases.contrastive_step, 1, 1, False, "single", num_queries=1, distributed=True))


def test_clipping_off(world):
    check(world(2).run(cases.contrastive_step, 1, 1, False, "single", clip=0.0, distributed=True))


@pytest.mark.parametrize("rows", [[3, 1, 0, 2], [1, 1, 1, 1]])
def test_gather_keeps_global_order_and_sums_gradients(world, rows):
    for is_equal, difference in world(4).run(cases.gathered_rows, rows):
        assert is_equal
        assert difference <= 1e-6


@pytest.mark.parametrize(("size", "tp", "sp"), [(1, 1, False), (2, 1, False), (2, 2, True)])
def test_cached_replays_dropout(world, size, tp, sp):
    """Both ways drop the same attention weights, so they give the same loss and gradient."""
    ((loss, norm), *_) = world(size).run(cases.dropout_step, "single", tp, sp)
    ((again, norm_again), *_) = world(size).run(cases.dropout_step, "cached", tp, sp)
    assert again == pytest.approx(loss, rel=1e-6)
    assert norm_again == pytest.approx(norm, rel=1e-5)
