"""Seconds of communication: measured in the steps that ask for it, by group, and nothing else changes."""

from __future__ import annotations

import pytest

from tests.helpers import communication
from tests.helpers.cases import Case


@pytest.mark.parametrize(
    ("case", "groups"),
    [
        (Case(world=2), {"data"}),
        (Case(world=2, overlap=True, gather=True), {"data"}),
        (Case(world=2, tp=2, sp=True), {"tensor"}),
        (Case(world=2, pp=2, budget=60), {"pipeline"}),
        (Case(world=2, pp=2, chunks=2, budget=60), {"pipeline"}),
    ],
    ids=["data", "overlapped", "tensor", "pipeline", "interleaved"],
)
def test_communication_is_timed_by_group(world, case, groups):
    plain = world(2).run(communication.two_steps, case, 0)
    timed = world(2).run(communication.two_steps, case, 2)
    for before, after in zip(plain, timed, strict=True):
        assert before.numbers == after.numbers and before.communication == {}
        assert groups <= set(after.communication)
        # What is reduced over all ranks, like the norm, has the name of the group with the same ranks.
        assert sum(after.communication.values()) < after.seconds
    assert timed[0].communication == timed[1].communication, "the mean of all ranks"


def test_one_process_does_not_communicate(world):
    assert world(1).run(communication.two_steps, Case(), 2)[0].communication == {}
