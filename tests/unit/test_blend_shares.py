"""Shares by temperature, batches of one data set, and a part of a data set's records."""

from __future__ import annotations

import collections
import itertools
from fractions import Fraction

import numpy as np
import pytest

from nvembed_mcore.config import DataConfig, DatasetConfig
from nvembed_mcore.data.blend import Blend, chosen_record, share_of_size
from nvembed_mcore.data.source import BatchSource, make_blend, used_records
from tests.helpers.stores import Numbers


def make(sizes, batch_size, *, weights=None, temperature=1.0, one_dataset_batches=False, seed=7, stage=1):
    how = dict(temperature=temperature, one_dataset_batches=one_dataset_batches)
    return Blend(sizes, weights or [None] * len(sizes), batch_size, seed, stage, "data", **how)


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2, 2.5, 3.0, 10.0, 1e9])
@pytest.mark.parametrize("size", [1, 2, 900, 502_939, 10**9])
def test_the_share_is_the_power(size, temperature):
    share = share_of_size(size, temperature)
    assert float(share) == pytest.approx(size ** (1 / temperature), rel=1e-8)
    assert share_of_size(size, 1.0) == size, "by size it is exact"
    if temperature != 1:
        digits = str(share.numerator * 10**12 // share.denominator).rstrip("0")
        assert len(digits) <= 9, "few digits: a power's last bit is no part of them"


def test_shares_are_pinned():
    """Every machine must get these: a run that goes on elsewhere must see the same samples."""
    assert share_of_size(502_939, 2.0) == Fraction("709.181923")
    assert share_of_size(270_000, 3.0) == Fraction("64.6330407")
    assert share_of_size(900, 2.0) == 30
    assert share_of_size(10**9 + 7, 1.5) == 10**6  # 1,000,000.005


def test_temperature_moves_the_draws_from_by_size_to_uniform():
    sizes = [10_000, 100]
    draws = {t: make(sizes, 10, temperature=t).drawn(101) for t in (1.0, 2.0, 1e6)}
    assert draws[1.0] == [1000, 10]
    assert draws[2.0] == [918, 92]  # shares 100 and 10
    assert draws[1e6] == [505, 505]
    with_weight = make(sizes, 10, weights=[None, 300.0], temperature=2.0)
    assert with_weight.drawn(40) == [100, 300], "a given weight is used as it is"


def test_batches_of_one_data_set_take_turns_by_share():
    mix = make([700, 200, 100], 50, one_dataset_batches=True)
    turns = [{sample.dataset for sample in mix.samples(step)} for step in range(40)]
    assert all(len(turn) == 1 for turn in turns)
    counts = collections.Counter(next(iter(turn)) for turn in turns)
    assert counts == {0: 28, 1: 8, 2: 4}
    for step in range(40):
        ideal = [Fraction(step * share, 10) for share in (7, 2, 1)]
        assert all(abs(Fraction(n, 50) - i) < 2 for n, i in zip(mix.drawn(step), ideal, strict=True))


def test_of_one_data_set_every_batch_is_of_it():
    """One data set: the switch changes nothing."""
    for step in range(9):
        assert make([20], 7, one_dataset_batches=True).samples(step) == make([20], 7).samples(step)


@pytest.mark.parametrize(("wanted", "records"), [(1, 1), (1, 9), (4, 9), (9, 9), (12, 9), (100, 4097)])
def test_a_part_of_the_records_is_a_fixed_choice(wanted, records):
    used = min(wanted, records)
    chosen = [chosen_record(index, used, records) for index in range(used)]
    assert len(set(chosen)) == used and all(0 <= number < records for number in chosen)
    if used == records:
        assert chosen == list(range(records)), "nothing is left out, so records keep their numbers"
    elif used > 1:
        assert chosen[:-1] == [chosen_record(index, used - 1, records) for index in range(used - 1)]


def test_a_part_of_the_records_is_spread_over_the_file():
    chosen = np.array([chosen_record(index, 1000, 100_000) for index in range(1000)])
    counts = np.bincount(chosen // 10_000, minlength=10)
    assert ((counts - 100) ** 2 / 100).sum() < 28  # chi square with 9 degrees of freedom, 1 in 1000


def test_a_source_uses_the_same_part_in_both_stages_and_all_of_it_in_an_epoch():
    data = DataConfig(tokenizer="t", datasets=[DatasetConfig(path="a", max_records=30), DatasetConfig(path="b")])
    seen = []
    for seed, stage in ((1, 1), (1, 2), (5, 2)):
        source = BatchSource(data, [Numbers(1000), Numbers(10)], batch_size=8, seed=seed, stage=stage)
        texts = [source.batch(step) for step in range(5)]  # 40 samples: one epoch of both
        records = [
            (int(dataset), int(text.token_ids[0]))
            for batch in texts
            for dataset, text in zip(batch.dataset, batch.texts[: batch.num_queries], strict=True)
        ]
        assert len(set(records)) == 40
        seen.append({number for dataset, number in records if dataset == 0})
    assert seen[0] == seen[1] == seen[2] == {chosen_record(index, 30, 1000) for index in range(30)}


def test_the_blend_of_a_run_reads_every_field():
    data = DataConfig(
        tokenizer="t",
        datasets=[DatasetConfig(path="a", max_records=100), DatasetConfig(path="b", weight=20.0)],
        blend_temperature=2.0,
        one_dataset_batches=True,
    )
    sizes = used_records(data, [5000, 70])
    assert sizes == [100, 70]
    mix = make_blend(data, sizes, 10, 1, 1, "data")
    assert mix.drawn(9) == [30, 60]  # shares 10 and 20


def test_one_data_set_batches_are_pinned():
    """As `test_the_order_is_pinned`: this order must never change."""
    mix = make([10, 1000], 4, temperature=2.0, one_dataset_batches=True, seed=1234)
    drawn = [[(one.dataset, one.index, one.epoch) for one in mix.samples(step)] for step in (21, 27)]
    assert drawn == PINNED


PINNED = [
    [(1, 519, 0), (1, 493, 0), (1, 424, 0), (1, 309, 0)],
    [(0, 9, 1), (0, 6, 1), (0, 5, 0), (0, 7, 0)],
]


def test_steps_walk_through_the_data_sets_without_gaps():
    mix = make([12, 5, 9], 4, temperature=3.0, one_dataset_batches=True)
    for before, after in itertools.pairwise(mix.drawn(step) for step in range(200)):
        assert sorted(b - a for a, b in zip(before, after, strict=True)) == [0, 0, 4]
