"""Thirty steps against their stored numbers, so that a change of the arithmetic cannot pass unseen."""

import numpy as np
import pytest

from tests.helpers.golden import STEPS, read_golden, run_golden

RTOL = 2e-4
"""Above what another processor or number of threads changes over thirty steps, far below what a wrong factor does."""


def test_losses_and_gradient_norms_are_the_golden_ones(world, tmp_path):
    """Where a change means to move them: tools/golden.py, and the reason in CHANGELOG.md."""
    (found,) = world(1).run(run_golden, tmp_path)
    for name, values in read_golden().items():
        assert len(values) == STEPS
        np.testing.assert_allclose(found[name], values, rtol=RTOL, err_msg=name)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_the_golden_numbers_are_those_of_a_run_that_learns(name):
    values = read_golden()[name]
    assert np.isfinite(values).all() and len(set(values)) == STEPS
    assert name != "loss" or np.mean(values[-5:]) < 0.8 * np.mean(values[:5])
