"""The two forms of core attention against each other: states and gradients, over many packs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nvembed_mcore.model import attention
from nvembed_mcore.model.attention import attend_packed, attend_padded, packed_attention, packing_of

CPU = torch.device("cpu")
EDGES = {
    "one token": [1],
    "one sequence": [19],
    "only single tokens": [1] * 7,
    "no pads": [16, 16, 32, 16],
    "pads in every bucket": [3, 9, 30, 17, 5, 31],
    "a dummy at the end": [40, 12, 33, 7, 4],
    "one long": [1, 200, 2, 1],
}
HEADS = {"grouped": (8, 2), "one group": (6, 1), "as many groups": (4, 4)}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}
"""Largest difference, relative to the largest value."""


def states_and_gradients(attend, lengths, heads, dtype, causal):
    generator = torch.Generator().manual_seed(len(lengths))
    packing, (query_heads, groups) = packing_of(np.array(lengths), CPU), heads
    shapes = [(sum(lengths), count, 8) for count in (query_heads, groups, groups, query_heads)]
    *states, upstream = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    states = [one.requires_grad_() for one in states]
    out = attend(*states, packing, causal=causal)
    return [out.detach(), *torch.autograd.grad(out, states, upstream)]


def compare(lengths, heads, dtype, causal):
    packed, padded = (
        states_and_gradients(form, lengths, heads, dtype, causal) for form in (attend_packed, attend_padded)
    )
    for one, other in zip(packed, padded, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype == dtype
        assert (one - other).abs().max() <= TOLERANCE[dtype] * max(1.0, one.abs().max().item())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("lengths", EDGES.values(), ids=EDGES)
def test_packed_and_padded_are_the_same(lengths, heads, causal, dtype):
    compare(lengths, heads, dtype, causal)


@pytest.mark.parametrize("causal", [False, True])
def test_they_are_the_same_for_random_packs(causal):
    generator = np.random.default_rng(int(causal))
    for _ in range(40):
        lengths = generator.integers(1, generator.integers(2, 90), generator.integers(1, 24))
        compare(lengths.tolist(), list(HEADS.values())[generator.integers(3)], torch.float64, causal)


def test_a_token_sees_only_its_own_sequence():
    """Neither form shares this: with one key the state is its value, whatever the others hold."""
    for form in (attend_packed, attend_padded):
        value = torch.randn(3, 1, 8)
        out = form(torch.randn(3, 2, 8), torch.randn(3, 1, 8), value, packing_of(np.array([1, 1, 1]), CPU))
        torch.testing.assert_close(out, value.expand(3, 2, 8))


@pytest.mark.parametrize("few_shapes", [False, True])
@pytest.mark.parametrize("granularity", [16, 128])
def test_no_row_is_empty_and_every_token_has_its_place(granularity, few_shapes):
    generator = np.random.default_rng(0)
    packs = [np.array(lengths) for lengths in EDGES.values()]
    packs += [generator.integers(1, 300, generator.integers(1, 60)) for _ in range(20)]
    for lengths in packs:
        padding = packing_of(lengths, CPU).padding(granularity, few_shapes=few_shapes)
        assert torch.equal(padding.rows[padding.places], torch.arange(lengths.sum()))
        places = torch.cat([padding.places, padding.pads])
        assert torch.equal(places.sort().values, torch.arange(len(padding.rows)))
        assert sum(bucket.num_sequences * bucket.length for bucket in padding.buckets) == len(padding.rows)
        for bucket in padding.buckets:
            tokens = bucket.bounds.diff()
            assert tokens.min() >= 1 and tokens.max() <= bucket.length and bucket.bounds.dtype == torch.int32
            whole = torch.ones(bucket.num_sequences, bucket.length, dtype=torch.bool)
            mask = whole if bucket.is_token is None else bucket.is_token
            assert torch.equal(mask.sum(1), tokens), "mask and bounds say the same"
            assert torch.equal(mask, torch.arange(bucket.length)[None] < tokens[:, None]), "pads stand behind"


def test_few_shapes_are_few():
    """A kernel is compiled for each: of 1 to 500 texts of up to 512 tokens there are some dozens."""
    shapes, generator = set(), np.random.default_rng(0)
    for _ in range(300):
        lengths = generator.integers(1, 513, generator.integers(1, 501))
        buckets = packing_of(lengths, CPU).padding(128, few_shapes=True).buckets
        shapes |= {(bucket.num_sequences, bucket.length) for bucket in buckets}
        assert sum(bucket.num_sequences for bucket in buckets) <= 1.25 * len(lengths)
    assert {length for _, length in shapes} == {128, 256, 384, 512}
    assert len(shapes) <= 4 * 27


def test_an_empty_sequence_is_refused():
    with pytest.raises(AssertionError, match="empty sequence"):
        packing_of(np.array([3, 0, 2]), CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a host without a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_takes_the_padded_form(dtype, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("one call a sequence")

    monkeypatch.setattr(attention, "attend_packed", refused)
    states = [torch.randn(5, heads, 8).to(dtype) for heads in (4, 2, 2)]
    assert packed_attention(*states, packing_of(np.array([2, 3]), CPU)).dtype == dtype
