"""Whose own work is slow: on simulated seconds."""

from __future__ import annotations

import numpy as np
import pytest

from nvembed_mcore.stragglers import FACTOR, WINDOWS, Findings


def windows(seed: int, replicas: int, count: int = 40) -> np.ndarray:
    """Sums of 50 steps, [windows, replicas]: noise of 15 % a step, and every hundredth step five times as long."""
    draw = np.random.default_rng(seed)
    steps = draw.lognormal(0.0, 0.15, (count, 50, replicas)) * np.where(
        draw.random((count, 50, replicas)) < 0.01, 5, 1
    )
    return steps.sum(1)


def told(seconds: np.ndarray) -> list[tuple[int, int]]:
    """(window, replica) of what is logged."""
    findings = Findings(seconds.shape[1])
    return [(window, replica) for window, row in enumerate(seconds) for replica, _ in findings.add(row.tolist())]


@pytest.mark.parametrize("replicas", [2, 3, 16])
def test_noise_names_nobody(replicas):
    assert [told(windows(seed, replicas)) for seed in range(200)] == [[]] * 200


@pytest.mark.parametrize("replicas", [2, 3, 16])
def test_a_slow_replica_is_named_once_after_three_windows(replicas):
    for seed in range(200):
        seconds = windows(seed, replicas)
        seconds[10:, 1] *= 3
        assert told(seconds) == [(10 + WINDOWS - 1, 1)]


def test_it_is_named_again_if_it_was_well_for_three_windows():
    seconds = np.ones((16, 4))
    seconds[[0, 1, 2, 3, 6, 7, 11, 12, 13], 2] = 1.1 * FACTOR
    assert told(seconds) == [(2, 2), (13, 2)]


def test_two_slow_windows_are_not_enough():
    seconds = np.ones((12, 4))
    seconds[[0, 1, 3, 4, 6, 7], 2] = 3.0
    assert told(seconds) == []


def test_the_slower_of_two_is_measured_against_the_faster():
    findings = Findings(2)
    assert [findings.add([1.0, 1.8]) for _ in range(3)][-1] == [(1, 1.8)]
