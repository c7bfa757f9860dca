"""Steps in every layout against one process holding the batch: loss, gradients, clip norm, parameters."""

import pytest

from nvembed_mcore.config import ConfigError
from tests.helpers import cases
from tests.helpers.cases import Case
from tests.helpers.grid import ALL_TARGETS, BOUND, GRID, LONG_GRID, OPTIONS, budget_for, run_grid
from tests.helpers.plain import TEMPERATURE, run_plainly

CASES = [case for many in GRID.values() for case in many]


def worst(results: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(result[name] for result in results) for name in ("loss", "norm", "gradient", "parameters")}


@pytest.fixture(scope="module")
def grid(world):
    return run_grid(world, GRID)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_one_process(grid, case):
    found = worst(grid[case])
    assert max(found.values()) <= BOUND, found


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG_GRID)
def test_equals_one_process_in_more_layouts(world, name):
    for case, results in run_grid(world, {name: LONG_GRID[name]}).items():
        assert max(worst(results).values()) <= BOUND, (str(case), worst(results))


def test_the_grid_has_what_it_promises():
    """One and several packs, ranks with different numbers of them, a rank without texts."""
    from nvembed_mcore.data.packing import make_plan
    from tests.helpers.plain import training_batch

    counts, empty = set(), False
    for case in CASES:
        lengths, multiple = training_batch(case.queries, 1).lengths, case.pp if case.chunks > 1 else 1
        plan = make_plan(lengths, case.ranks, case.budget, multiple=multiple, cp=case.cp)
        counts.add(tuple(sorted({len(packs) for packs in plan.packs})))
        empty |= any(len(numbers) == 0 for numbers in plan.owned())
    assert {(1,), (3,), (2, 3), (1, 2)} <= counts and empty


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("learned temperature",)])
def test_each_option_changes_the_loss(name):
    """So that a step which ignored it could not agree with the reference."""
    plain, changed = (run_plainly(7, "latent", 0.5, **option)[0].loss for option in ({}, OPTIONS[name]))
    assert abs(plain - changed) > 10 * BOUND * plain


@pytest.mark.parametrize(
    "layout",
    [dict(world=2, way="retain", overlap=True), dict(world=4, tp=2, sp=True, pp=2, chunks=2, way="cached")],
    ids=str,
)
def test_multi_layer_pools_a_few_texts_at_a_time(world, layout):
    """Two and four parts of a pack in the two steps: a weight's gradient must come once all the same."""
    case = Case(**layout, kind="multi_layer", budget=140, distributed=False)
    found = worst(world(case.world).run(cases.few_texts_at_once, case))
    assert max(found.values()) <= BOUND, found


@pytest.mark.parametrize("sabotage", ["factor", "detached"])
def test_a_wrong_gradient_does_not_pass(world, sabotage):
    """Tests of the test: without the factor W (which clipping would hide), and without what other ranks say."""
    case = Case(world=2, way="single", distributed=False, exchange="reduce_scatter", clip=0.0)
    found = worst(world(2).run(cases.training_steps, case, sabotage=sabotage))
    assert found["loss"] > BOUND or found["norm"] > BOUND
    assert found["gradient"] > 100 * BOUND and found["parameters"] > 100 * BOUND


def test_a_learned_temperature_is_one_number_for_all_ranks(world):
    case = Case(world=4, tp=2, sp=True, way="cached", budget=200, loss={"learn_temperature": True})
    temperatures = {result["temperature"] for result in world(4).run(cases.training_steps, case)}
    assert len(temperatures) == 1 and temperatures != {TEMPERATURE}


@pytest.mark.parametrize("bounds", [(0.3, 0.3), (0.2997, 0.3003)])
def test_a_learned_temperature_stays_in_its_range(world, bounds):
    (result,) = world(1).run(cases.clamped_temperature, bounds)
    assert all(bounds[0] <= temperature <= bounds[1] for temperature in result["temperatures"])
    # Once outside, nothing pushes it further.
    assert result["pulls"][-1] == 0.0 and any(pull != 0.0 for pull in result["pulls"]) == (bounds[0] < bounds[1])


def test_single_is_refused_where_a_batch_needs_more_packs(world):
    with pytest.raises(
        AssertionError, match=f"{ConfigError.__name__}.*needs one pack a rank.*step 1 needs 7 of.*= 90"
    ):
        world(1).run(cases.training_steps, Case(way="single", budget=90))


@pytest.mark.parametrize("rows", [[3, 1, 0, 2], [1, 1, 1, 1]])
def test_gather_keeps_global_order_and_sums(world, rows):
    for is_equal, difference in world(4).run(cases.gathered_rows, rows):
        assert is_equal
        assert difference <= 1e-6


DROPPING_ADAPTERS = dict(targets=ALL_TARGETS, lora_dropout=0.2)


@pytest.mark.parametrize(
    "layout",
    [
        dict(world=1),
        dict(world=2),
        dict(world=2, pp=2, chunks=2),
        dict(world=2, cp=2),
        pytest.param(dict(world=2, tp=2, sp=True), marks=pytest.mark.slow),
        pytest.param(dict(world=1, **DROPPING_ADAPTERS), marks=pytest.mark.slow),
        pytest.param(dict(world=2, tp=2, **DROPPING_ADAPTERS), marks=pytest.mark.slow),
        dict(world=2, tp=2, sp=True, **DROPPING_ADAPTERS),
        dict(world=2, pp=2, **DROPPING_ADAPTERS),
    ],
    ids=str,
)
def test_cached_replays_dropout(world, layout):
    """Every way drops the same attention weights and inputs of adapters, so all give the same loss and gradient."""
    size, many = layout["world"], 60
    found = []
    for way, budget in (("retain", many), ("cached", many)) if "pp" not in layout else (("cached", many),) * 2:
        ((loss, norm), *_) = world(size).run(cases.dropout_step, Case(**layout, way=way, budget=budget))
        found.append((loss, norm))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)


def test_dropout_is_on_and_cached_needs_the_replay(world):
    """Without the reseeding the third phase would drop other weights than the first."""
    right, wrong, none = world(1).run(cases.dropout_without_replay)[0]
    assert abs(wrong - right) > 1e-3 * right and abs(none - right) > 1e-3 * right


def test_data_parallel_ranks_drop_differently(world):
    first, second = world(2).run(cases.dropout_by_rank, Case(world=2))
    assert first != pytest.approx(second, rel=1e-3)
    first, second = world(2).run(cases.dropout_by_rank, Case(world=2, tp=2, sp=True))
    assert first == pytest.approx(second, rel=1e-5), "tensor ranks hold the same text"


@pytest.mark.parametrize("way", ["single", "retain", "cached"])
@pytest.mark.parametrize("distributed", [False, True])
def test_gradients_are_reduced_once_a_step(world, way, distributed):
    budget = 100_000 if way == "single" else budget_for(3, 2, 7)
    case = Case(world=2, way=way, budget=budget, distributed=distributed, exchange="recompute")
    for calls, sizes, gradients in world(2).run(cases.step_traffic, case):
        kind = ("reduce_scatter" if distributed else "all_reduce", "data")
        # All-reduces of a few scalars (totals, clip norm) stand beside that of the gradients.
        assert gradients <= sizes[kind] <= gradients + 100
        assert calls[kind] <= (1 if distributed else 4)
        # Embeddings of 32 dimensions and two numbers a row, each gathered once; parameters once, if they are sharded.
        assert calls["all_gather", "data"] == 2 + distributed


@pytest.mark.parametrize("exchange", ["recompute", "reduce_scatter"])
def test_bytes_of_the_embeddings(world, exchange):
    """What crosses the network for the loss: all embeddings once, then either their gradients or two numbers a row."""
    case = Case(world=2, way="single", distributed=False, exchange=exchange)
    for calls, sizes, _ in world(2).run(cases.step_traffic, case):
        rows, texts = cases.rows_and_texts(case)
        gathered = max(texts) * 32 * 4
        if exchange == "recompute":
            assert sizes["all_gather", "data"] == gathered + max(rows) * 2 * 4
            assert ("reduce_scatter", "data") not in calls
        else:
            assert sizes["all_gather", "data"] == gathered
            assert (calls["reduce_scatter", "data"], sizes["reduce_scatter", "data"]) == (1, 2 * gathered)
