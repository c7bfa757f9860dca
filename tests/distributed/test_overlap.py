"""Communication that runs beside computation: the same bits, and in the order that hides it."""

from __future__ import annotations

import dataclasses

import pytest

from nvembed_mcore.config import ConfigError, OptimConfig, ParallelConfig, RunConfig
from tests.helpers import overlap
from tests.helpers.cases import Case
from tests.helpers.grid import ALL_TARGETS, budget_for
from tests.helpers.runs import run_config

LEARNED = {"learn_temperature": True}
PACKS = budget_for(3, 2, 7)
CASES = {
    "single": Case(world=2, way="single", overlap=True),
    "retain, learned temperature": Case(world=2, way="retain", budget=PACKS, overlap=True, loss=LEARNED),
    "cached, adapters": Case(world=2, way="cached", budget=PACKS, overlap=True, targets=ALL_TARGETS),
    "layers": Case(world=2, way="cached", budget=PACKS, overlap=True, kind="multi_layer"),
    "four ranks, unequal packs": Case(
        world=4, way="retain", budget=budget_for(2, 4, 5, uneven=True), queries=5, overlap=True
    ),
    "tensor and sequence parallel": Case(world=4, tp=2, sp=True, way="cached", budget=PACKS, overlap=True),
    "interleaved stages": Case(world=4, pp=2, chunks=2, way="cached", budget=budget_for(4, 2, 7, 2), overlap=True),
}
SLOW = {"tensor and sequence parallel", "interleaved stages"}


def manifest(folder):
    """Sizes and hashes of all files of the one checkpoint below."""
    (found,) = folder.glob("checkpoints/step-*/manifest.json")
    return found.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in CASES.items()],
)
def test_weights_that_are_gathered_while_the_next_step_runs_are_the_same(world, tmp_path, case):
    """Losses, norms, gradients, an evaluation and the weights after three steps, and all that is saved after two."""
    for found in world(case.world).run(overlap.both_ways, case, tmp_path):
        for name, (plain, overlapped) in found.items():
            assert plain == overlapped, name
    assert manifest(tmp_path / "plain") == manifest(tmp_path / "overlapped")


def test_a_head_that_does_not_wait_for_its_projections_does_not_pass(world, tmp_path):
    """A test of the test: Megatron's own hooks wait for a module's own parameters only."""
    (found, *_) = world(4).run(overlap.both_ways, CASES["four ranks, unequal packs"], tmp_path, deaf=True)
    assert found["losses"][0][0] == found["losses"][1][0], "the first step has the first weights"
    assert found["losses"][0][1:] != found["losses"][1][1:] and found["parameters"][0] != found["parameters"][1]


@pytest.mark.parametrize(("way", "targets"), [("single", ()), ("retain", ()), ("cached", ()), ("cached", ALL_TARGETS)])
def test_the_head_is_reduced_behind_the_backward_pass_of_the_backbone(world, way, targets):
    """Its buckets are sent first, before any layer has its gradients, whatever the way; and all before the end."""
    case = Case(world=2, way=way, budget=100_000 if way == "single" else PACKS, overlap=True, targets=targets)
    for sent in world(2).run(overlap.order_of_reduction, case):
        of_head = [any(name.startswith("pooling.") for name in names) for names, _ in sent]
        assert sum(of_head) >= 3 and of_head == sorted(of_head, reverse=True)
        whole = [ready for names, ready in sent if all(name.startswith("pooling.") for name in names)]
        assert len(whole) >= sum(of_head) - 1 and set(whole) == {0}
        assert len({name for names, _ in sent for name in names}) == sum(len(names) for names, _ in sent)


def test_what_it_needs(tmp_path):
    with pytest.raises(ConfigError, match=r"parallel.overlap_param_gather is true, which needs .*overlap_grad_reduce"):
        ParallelConfig(overlap_param_gather=True)
    config = run_config(tmp_path, tmp_path / "run")
    parallel = ParallelConfig(overlap_param_gather=True, overlap_grad_reduce=True)
    with pytest.raises(ConfigError, match=r"parallel.overlap_param_gather is true, which needs optim.distributed"):
        dataclasses.replace(config, parallel=parallel, optim=OptimConfig(distributed=False))
    assert isinstance(dataclasses.replace(config, parallel=parallel), RunConfig)
