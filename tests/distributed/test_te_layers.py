"""Megatron's layers with TransformerEngine's modules, on a CPU: a stand-in that computes the same in its place."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from nvembed_mcore.model.backend import Backend
from nvembed_mcore.schedule import pack_multiple
from tests.helpers import stand_in_te
from tests.helpers.cases import Case as AnyCase
from tests.helpers.grid import ALL_TARGETS, BOUND, budget_for
from tests.helpers.world import World

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the real ones are tested in tests/gpu")
Case = partial(AnyCase, backend="transformer_engine")
THREE_PACKS = budget_for(3, 1, 7)
LINEARS = 16
"""Of the model of the step's cases."""


@pytest.fixture(scope="module")
def run():
    """Calls a function of `te_cases`, by name, on processes where TransformerEngine is the stand-in."""
    worlds = [World(2, first=stand_in_te.install)]

    def call(name: str, *args, ranks: int = 1):
        if not worlds[-1].is_alive:
            worlds.append(World(2, first=stand_in_te.install))
        results = worlds[-1].run(called, name, args, ranks=ranks)
        return results if ranks > 1 else results[0]

    yield call
    worlds[-1].stop()


def called(name: str, args: tuple):
    from tests.helpers import te_cases  # imports what only these processes have

    return getattr(te_cases, name)(*args)


def test_parameters_and_checkpoints_are_those_of_local_layers(run):
    whole, in_te, adapted, adapted_in_te = run("names_and_marks")
    assert in_te == whole and adapted_in_te == adapted
    assert len(adapted[0]) > len(whole[0]) and not any("_extra_state" in name for name in whole[1])


def test_checkpoints_of_either_load_in_the_other(run, tmp_path):
    assert max(run("exchanged_weights", tmp_path)) < 1e-6


def test_steps_equal_those_of_one_plain_process(run):
    """Loss, gradients, norm and parameters, through all that stands around the layers."""
    many = [
        Case(way="retain", budget=THREE_PACKS, distributed=False),
        Case(way="cached", budget=THREE_PACKS),
        Case(way="retain", budget=THREE_PACKS, targets=ALL_TARGETS, distributed=False),
    ]
    for case, found in zip(many, run("many_training_steps", many), strict=True):
        assert found["microbatches"] == 3
        for what in ("loss", "norm", "gradient", "parameters"):
            assert found[what] < BOUND, (str(case), what, found)


def test_regions_are_given_the_recipe_of_the_run(run):
    found = run("recipes")
    assert found["off"] == []
    history = {"amax_history_len": 1024, "amax_compute_algo": "max", "margin": 0, "fp8_dpa": False, "fp8_mha": False}
    assert found["delayed"] == [("TEDelayedScaling", {"fp8_format": "hybrid", **history})]
    assert found["tensorwise"] == [("Float8CurrentScaling", {"fp8_format": "hybrid", "fp8_dpa": False})] * 2
    assert found["blockwise"] == [("Float8BlockScaling", {"fp8_format": "e4m3"})] * 2


def test_what_cannot_be_computed_is_refused(run):
    of_device, of_sizes = run("refusals")
    assert of_device.startswith(
        "precision.fp8 is 'mxfp8', which TransformerEngine cannot compute on cpu: Device compute capability 10.0"
    )
    assert "needs multiples of 16, but the model's intermediate_size on a tensor rank is 72" in of_sizes


@pytest.mark.parametrize(
    ("case", "counts"),
    [
        (Case(way="retain", budget=THREE_PACKS, fp8="tensorwise"), [LINEARS] * 3),
        # Once without what backward needs, in the first phase.
        (Case(way="cached", budget=THREE_PACKS, fp8="tensorwise"), [2 * LINEARS] * 3),
        (Case(way="retain", budget=THREE_PACKS, fp8="tensorwise", targets=ALL_TARGETS), [LINEARS, 0, 0]),
        # The first linear's input has no gradient.
        (Case(way="cached", budget=THREE_PACKS, fp8="tensorwise", targets=ALL_TARGETS), [2 * LINEARS - 1, 0, 0]),
        # Once more, by the scale that the first step gave.
        (Case(way="retain", budget=THREE_PACKS, fp8="delayed", targets=ALL_TARGETS), [LINEARS, LINEARS, 0]),
    ],
    ids=["retain", "cached", "adapters", "adapters-cached", "adapters-delayed"],
)
def test_weights_are_rounded_once_a_step_and_frozen_ones_once(run, case, counts):
    assert run("quantized_weights", case) == counts


@pytest.mark.parametrize("targets", [(), ALL_TARGETS], ids=["full", "adapters"])
@pytest.mark.parametrize("fp8", ["tensorwise", "delayed"])
def test_kept_weights_are_never_stale(run, fp8, targets):
    found = run("stale_weights", Case(way="retain", budget=THREE_PACKS, fp8=fp8, targets=targets))
    assert found["step"] == found["load"] == 0 and found["moved"] > 1e-3


@pytest.mark.parametrize("way", ["retain", "cached"])
def test_gradients_are_those_without_kept_weights(run, way):
    without, as_megatron = run("gradients", Case(way=way, budget=THREE_PACKS, fp8="tensorwise"), [None, True])
    assert without == 0
    if way == "retain":  # the forward that was the first has the last backward, which would start the sums anew
        assert as_megatron > 0.1


@pytest.mark.parametrize("way", ["retain", "cached"])
def test_histories_move_once_a_step(run, way):
    found = run("histories", Case(way=way, budget=THREE_PACKS, fp8="delayed"))
    # One row a step, with the largest of its packs, however often each was embedded, and none of an evaluation.
    assert [len(rows) for rows in found["forward"]] == [1, 2] == [len(rows) for rows in found["backward"]]
    assert found["forward"][1] == pytest.approx([*found["seen"]]) and min(found["evaluation"]) > 0


def test_a_checkpoint_brings_the_histories_before_the_first_forward(run):
    is_same, number, (resumed, fresh) = run("histories_in_checkpoints", Case(fp8="delayed"))
    assert is_same and number == LINEARS * 4 and resumed == 0 < fresh


def test_ranks_with_different_numbers_of_packs_do_not_wait_and_scale_alike(run):
    uneven = Case(world=2, way="retain", budget=budget_for(3, 2, 7, uneven=True), fp8="delayed")
    one, other = run("histories", uneven, ranks=2)
    assert one["scales"] == other["scales"] and one["seen"] != other["seen"]


@pytest.mark.parametrize(
    ("fp8", "tp", "sequence_parallel", "multiple"),
    [
        ("off", 2, False, 1),
        ("off", 2, True, 2),
        ("delayed", 1, False, 16),
        ("blockwise", 2, True, 32),
        ("mxfp8", 4, True, 128),
    ],
)
def test_packs_are_filled_to_what_products_take(fp8, tp, sequence_parallel, multiple):
    config = SimpleNamespace(tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel)
    encoder = SimpleNamespace(backend=Backend(layers="local", dtype=torch.float32, fp8=fp8))
    assert pack_multiple([SimpleNamespace(config=config, module=encoder)]) == multiple
