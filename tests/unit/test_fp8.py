"""The scaling rules against a table of all numbers of a format and a loop over blocks."""

from __future__ import annotations

import math

import pytest
import torch

from nvembed_mcore.model import fp8
from tests.helpers import fp8 as plainly

KINDS = {"e4m3": fp8.E4M3, "e5m2": fp8.E5M2}


@pytest.mark.parametrize("kind", KINDS)
def test_rounds_to_the_nearest_number_and_ties_to_even(kind):
    numbers = torch.from_numpy(plainly.numbers_of(kind)).float()
    halves = (numbers[1:] + numbers[:-1]) / 2
    around = torch.cat([halves * (1 - 2**-20), halves, halves * (1 + 2**-20)])
    values = torch.cat([numbers, around, torch.randn(500, generator=torch.Generator().manual_seed(0)) * 20])
    for one in (values, -values):
        assert torch.equal(fp8.rounded(one, KINDS[kind]), plainly.nearest(one, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_beyond_the_range_becomes_the_largest_and_nan_stays(kind):
    largest = plainly.LARGEST[kind]
    found = fp8.rounded(torch.tensor([largest * 1.5, -math.inf, math.nan, 1e-30]), KINDS[kind])
    assert found[:2].tolist() == [largest, -largest] and math.isnan(found[2]) and found[3] == 0


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize("role", ["input", "weight", "gradient"])
def test_recipes_block_by_block(recipe, role):
    """Also blocks cut at the ends, blocks of zeros, and magnitudes far apart."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(150, 140, generator=generator) * torch.randn(150, 1, generator=generator).exp() * 1e-3
    values[:, 128:], values[128:] = 0, values[128:] * 1e4
    for over_rows in (False, True):
        found = fp8.quantized(values, recipe, role, over_rows=over_rows)
        assert torch.equal(found, plainly.plain(values, recipe, role, over_rows))


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_zeros_stay_and_what_is_no_number_shows(recipe):
    assert torch.equal(fp8.quantized(torch.zeros(3, 40), recipe, "input"), torch.zeros(3, 40))
    assert fp8.quantized(torch.empty(0, 40), recipe, "input").shape == (0, 40)
    values = torch.ones(3, 40)
    values[1, 2] = math.nan
    found = fp8.quantized(values, recipe, "input")
    assert math.isnan(found[1, 2]) and found[0, 0] == 1


def test_scales_at_the_ends():
    tiny, huge = 1e-45, torch.finfo(torch.float32).max
    amax = torch.tensor([0.0, math.inf, math.nan, tiny, 448.0, 449.0, huge])
    assert fp8.scale_for(amax, fp8.E4M3).tolist()[:5] == [1, 1, 1, huge, 1]
    powers = fp8.scale_for(amax, fp8.E4M3, power_of_two=True)
    assert powers.tolist()[:6] == [1, 1, 1, 2.0**127, 1, 0.5]
    assert all(math.frexp(scale)[0] == 0.5 for scale in powers.tolist())
    # E8M0 has no zero and, of the finite ones, nothing beyond 2^127.
    assert fp8.scale_e8m0(amax, fp8.E4M3).tolist()[:6] == [1, 2.0**-127, 2.0**-127, 1, 1, 0.5]


def test_the_history_has_the_largest_of_its_steps():
    """A spike decides the scale for as many steps as the history is long, and then no more."""
    steps, largest = 4, torch.tensor([448.0, 57344.0])
    history, scale = torch.zeros(steps, 2), torch.ones(2)
    seen, scales = [], []
    for amax in (2.0, 8.0, 1.0, 1.0, 1.0, 1.0, 0.5):
        history[0] = torch.tensor([amax, 0.0])
        history, scale = fp8.roll(history, scale, largest)
        seen.append(amax)
        scales.append(scale.tolist())
        assert history[0].tolist() == [0, 0]
    assert scales == [[448 / max(seen[max(0, i - steps + 1) : i + 1]), 1.0] for i in range(len(seen))]
    history[0] = math.inf
    assert fp8.roll(history, scale, largest)[1].tolist() == scale.tolist(), "an overflow leaves the scale"


def test_bfloat16_is_rounded_in_float32():
    values = torch.randn(20, 30, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = fp8.quantized(values, "tensorwise", "input")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, plainly.plain(values.float(), "tensorwise", "input").bfloat16())
