"""What a dry run says of ranks is what real processes have."""

from __future__ import annotations

import dataclasses

import pytest

from tests.helpers import dry
from tests.helpers.cases import Case
from tests.helpers.grid import ALL_TARGETS
from tests.helpers.reshard import Model

FULL = Model(name="full", loss={"learn_temperature": True}, changes={"vocab_size": 17})
AVERAGED = dataclasses.replace(FULL, name="averaged", ema=0.9)
ADAPTERS = Model(name="adapters", kind="multi_layer", targets=ALL_TARGETS)
RUNS = {
    "many buckets, averaged": (AVERAGED, Case(world=2, overlap=True)),
    "bfloat16": (FULL, Case(world=2, dtype="bfloat16")),
    "whole optimizer": (
        dataclasses.replace(ADAPTERS, name="averaged adapters", ema=0.9),
        Case(world=2, distributed=False),
    ),
    "tensor ranks": (ADAPTERS, Case(world=2, tp=2, sp=True)),
    "context ranks": (FULL, Case(world=2, cp=2, overlap=True)),
    "context ranks, whole optimizer": (ADAPTERS, Case(world=2, cp=2, distributed=False)),
    "uneven stages": (FULL, Case(world=2, pp=2, first=1)),
}


@pytest.fixture(scope="module")
def both(world, tmp_path_factory):
    """By run and rank: what real processes have, and what the dry run says."""
    models, cases = zip(*RUNS.values(), strict=True)
    real = world(2).run(dry.real, models, cases, tmp_path_factory.mktemp("dry"))
    (said,) = world(1).run(dry.said, models, cases)
    return {
        name: list(zip([ranks[number] for ranks in real], said[number], strict=True))
        for number, name in enumerate(RUNS)
    }


@pytest.mark.parametrize("name", RUNS)
def test_ranks_are_as_real_ones(both, name):
    for real, said in both[name]:
        assert {key: said[key] for key in real} == real
        assert said["largest_checkpoint"] == max(
            one["checkpoint"] for one, _ in both[name] if one["rank"] in real["groups"]["dp_cp"]
        )


def test_the_runs_have_what_they_promise(both):
    """Copies in float32, padding in buffers, and ranks that write different parts."""
    (first, _), (second, _) = both["bfloat16"]
    # The temperature is float32 as it is, and needs no copy.
    assert first["optimizer"] + second["optimizer"] == 12 * first["trained"] - 4
    assert first["gradients"] > 4 * first["trained"]
    (first, _), (second, _) = both["whole optimizer"]
    assert first["checkpoint"] > second["checkpoint"] > 0 and first["frozen"] > 0
    assert [real["layers"] for real, _ in both["uneven stages"]] == [[[0]], [[1, 2, 3]]]
