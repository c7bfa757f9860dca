"""Every small blend, step by step, beside a walk in plain Python that keeps counters and ticks off what it has seen.

Sizes 1 to 64, batch sizes up to the size, 1 to 8 ranks, a resume at every step; the full product is marked `slow`.
"""

from __future__ import annotations

import collections
import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from nvembed_mcore.config import DataConfig, DatasetConfig
from nvembed_mcore.data import blend
from nvembed_mcore.data.blend import Blend, chosen_record, share_of_size
from nvembed_mcore.data.packing import make_plan
from nvembed_mcore.data.source import BatchSource
from tests.helpers.stores import Numbers

TEMPERATURES = (1.0, 2.0, 1e6)
SIZES = range(1, 65)


class Walk:
    """Who is next, by counters: at each node of the tree left is due when it is half a sample or more behind."""

    def __init__(self, shares: list[Fraction]) -> None:
        scale = math.lcm(*(share.denominator for share in shares))
        nodes = [(int(share * scale), number, number) for number, share in enumerate(shares)]
        while len(nodes) > 1:
            nodes.sort(key=lambda node: node[:2])
            right, left = nodes[:2]
            total = left[0] + right[0]
            inner = {"left": left[2], "right": right[2], "share": left[0], "total": total, "behind": 0}
            nodes[:2] = [(total, left[1], inner)]
        self.root = nodes[0][2]

    def next(self) -> int:
        node = self.root
        while isinstance(node, dict):
            node["behind"] += node["share"]
            goes_left = 2 * node["behind"] >= node["total"]
            node["behind"] -= goes_left * node["total"]
            node = node["left" if goes_left else "right"]
        return node


def check(sizes: list[int], batch_size: int, temperature: float = 1.0, one_dataset_batches: bool = False) -> int:
    """Two epochs and a part of the third of every data set, or 300 samples; how many samples were looked at."""
    how = dict(temperature=temperature, one_dataset_batches=one_dataset_batches)
    arguments = (sizes, [None] * len(sizes), batch_size, 7, 1, "data")
    mix = Blend(*arguments, **how)
    walk = Walk([share_of_size(size, temperature) for size in sizes])
    left = [set(range(size)) for size in sizes]  # of the epoch, what was not drawn yet
    epochs, counts = [0] * len(sizes), [0] * len(sizes)
    straight: list[list[blend.Sample]] = []
    while sum(counts) < 300 and min(n / size for n, size in zip(counts, sizes, strict=True)) < 2.3:
        assert mix.drawn(len(straight)) == counts
        batch = mix.samples(len(straight))
        straight.append(batch)
        turns = [walk.next()] * batch_size if one_dataset_batches else [walk.next() for _ in range(batch_size)]
        assert sorted(turns) == sorted(sample.dataset for sample in batch)
        assert len({(sample.dataset, sample.index) for sample in batch}) == batch_size, "twice in one batch"
        # A batch is in no order; of one data set, the samples of the older epoch came first.
        for sample in sorted(batch, key=lambda sample: sample.epoch):
            number = sample.dataset
            assert sample.epoch == epochs[number], "an epoch ends when nothing of it is left"
            left[number].remove(sample.index)  # a KeyError: drawn before in this epoch, or no record
            counts[number] += 1
            if not left[number]:
                epochs[number] += 1
                left[number] = set(range(sizes[number]))
    for step, batch in enumerate(straight):
        assert Blend(*arguments, **how).samples(step) == batch, f"resumed at step {step}"
    return sum(counts)


def batch_sizes(size: int) -> list[int]:
    """The edges, and some between."""
    return sorted({1, 2, 3, size // 2, size - 1, size} & set(range(1, size + 1)))


def test_one_data_set():
    assert sum(check([size], batch_size) for size in SIZES for batch_size in batch_sizes(size)) > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_one_data_set_with_every_batch_size(size):
    for batch_size in range(1, size + 1):
        check([size], batch_size)


def mixes(sizes: list[int], batch_size: int, temperature: float, one_dataset_batches: bool) -> bool:
    """Check a mixture, or that it is refused because a batch could hold a record twice; whether it was taken."""
    try:
        check(sizes, batch_size, temperature, one_dataset_batches)
    except ValueError:
        if one_dataset_batches:
            assert batch_size > min(sizes)
        else:
            # By size a share of a batch is never more than the data set; otherwise it must come near that.
            shares = [share_of_size(size, temperature) for size in sizes]
            excess = max(batch_size * share / sum(shares) - size for share, size in zip(shares, sizes, strict=True))
            assert temperature != 1 and excess > -1
        return False
    assert not one_dataset_batches or batch_size <= min(sizes)
    return True


def test_three_data_sets_by_temperature_and_in_batches_of_one():
    taken = 0
    for size in SIZES:
        sizes = [size, 65 - size, 17]
        for number, batch_size in enumerate((1, 6, 16)):
            temperature = TEMPERATURES[(size + number) % 3]
            taken += mixes(sizes, batch_size, temperature, (size + number) // 3 % 2 == 1)
    assert taken > 110


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_mixtures_in_full(size):
    for batch_size in range(1 + size % 3, 82, 3):
        for temperature in TEMPERATURES:
            mixes([size, 65 - size, 17], batch_size, temperature, False)
            mixes([size, 65 - size, 17], batch_size, temperature, True)


@pytest.mark.parametrize("one_dataset_batches", [False, True])
def test_ranks_together_see_the_batch(one_dataset_batches):
    """For any number of ranks: each text on one rank, none twice, and the samples do not know of the ranks."""
    for size in SIZES:
        datasets = [DatasetConfig(path="a"), DatasetConfig(path="b", max_records=64)]
        data = DataConfig(tokenizer="t", datasets=datasets, one_dataset_batches=one_dataset_batches)
        batch_size = 1 + size // 2
        source = BatchSource(data, [Numbers(size), Numbers(100)], batch_size=batch_size, seed=1, stage=1)
        last = 2 * (size + 64) // batch_size  # through two ends of an epoch
        for step in (0, last // 2, last):
            batch = source.batch(step)
            wanted = collections.Counter((s.dataset, s.index) for s in source.blend.samples(step))
            records = [chosen_record(index, 64, 100) if dataset else index for dataset, index in wanted.elements()]
            for ranks in range(1, 9):
                plan = make_plan(batch.lengths, ranks, 40)
                owned = [number for numbers in plan.owned() for number in numbers.tolist()]
                assert sorted(owned) == list(range(2 * batch_size))
                queries = [int(batch.texts[number].token_ids[0]) for number in owned if number < batch_size]
                assert sorted(queries) == sorted(records)


@pytest.mark.parametrize("one_dataset_batches", [False, True])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_billion_records_cost_what_few_cost(monkeypatch, temperature, one_dataset_batches):
    """Counted in calls of the round function, and in bytes that Python allocates at the most."""
    calls = 0
    plain = blend._round

    def counted(*arguments):
        nonlocal calls
        calls += 1
        return plain(*arguments)

    monkeypatch.setattr(blend, "_round", counted)
    sizes = [10**9, 2 * 10**9, 1000]
    data = DataConfig(
        tokenizer="t",
        datasets=[DatasetConfig(path=str(size), max_records=max(size // 3, 500)) for size in sizes],
        blend_temperature=temperature,
        one_dataset_batches=one_dataset_batches,
    )
    stores = [Numbers(size) for size in sizes]
    for step in (0, 10**7, 10**15):
        calls = 0
        tracemalloc.start()
        batch = BatchSource(data, stores, batch_size=128, seed=1, stage=1).batch(step)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(batch.texts) == 256
        # A sample takes four permutations of six rounds (of the batch, the epoch, the order, the choice), some of them
        # walked twice.
        assert calls <= 4 * 6 * 128 * 1.5
        assert peak < 2**18


def test_the_walk_sees_a_wrong_blend(monkeypatch):
    """A proof that cannot fail is none: one sample left out, one order that repeats, one share that is off."""
    for name, wrong in (
        ("_permuted", lambda value, size, key: value // 2),
        ("share_of_size", lambda size, temperature: Fraction(size + 1)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(blend, name, wrong)
            with pytest.raises((AssertionError, KeyError)):
                check([9, 4], 3)
    with pytest.raises(AssertionError), monkeypatch.context() as patch:
        patch.setattr(Blend, "drawn", lambda self, step: [step * 2 + (step > 3), step - (step > 3)])
        check([8, 4], 3)
    assert np.all([check([8, 4], 3), check([4, 8], 3)])
