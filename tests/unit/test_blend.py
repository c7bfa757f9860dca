"""The blend: a pure function of the step whose epochs are permutations and whose shares are exact."""

import collections
import itertools
import random
from fractions import Fraction

import pytest

from nvembed_mcore.data import blend
from nvembed_mcore.data.blend import Blend, Sample, choose_negatives, choose_positives

MIXES = [
    ([1, 1, 1], [None, None, None], 2),
    ([5, 9], [None, None], 7),
    ([5, 9], [None, None], 14),
    ([24, 3, 10], [1.0, 0.1, 0.7], 8),
    ([24, 3, 10], [0.1, 0.1, 0.1], 9),
    ([2, 100, 31, 7], [None, 50.0, 31.5, None], 13),
    ([6, 6, 6, 6, 6, 6, 6], [None] * 7, 5),
    ([40, 1], [39.0, 0.5], 30),
]


def make(sizes, weights, batch_size, seed=7, stage=1, fingerprint="data"):
    return Blend(sizes, weights, batch_size, seed, stage, fingerprint)


def check_sequence(sizes, weights, batch_size, epochs=4):
    """Everything that must hold, until the slowest data set has seen `epochs` epochs, or for 400 steps."""
    mix = make(sizes, weights, batch_size)
    shares = [Fraction(size if weight is None else weight) for size, weight in zip(sizes, weights, strict=True)]
    draws = [[] for _ in sizes]
    step = 0
    while step < 400 and min(len(d) / size for d, size in zip(draws, sizes, strict=True)) < epochs:
        assert mix.drawn(step) == [len(d) for d in draws]
        batch = mix.samples(step)
        assert len(batch) == batch_size
        assert len({(sample.dataset, sample.index) for sample in batch}) == batch_size, "a sample twice in one batch"
        counts = collections.Counter(sample.dataset for sample in batch)
        step += 1
        for dataset, share in enumerate(shares):
            ideal = share / sum(shares) * step * batch_size
            draws[dataset] += sorted((sample.epoch, sample.index) for sample in batch if sample.dataset == dataset)
            assert abs(len(draws[dataset]) - ideal) < 2
        assert sum(counts.values()) == batch_size
    for size, drawn in zip(sizes, draws, strict=True):
        by_epoch = collections.defaultdict(list)
        for epoch, index in drawn:
            by_epoch[epoch].append(index)
        assert [epoch for epoch, _ in drawn] == sorted(epoch for epoch, _ in drawn)
        for epoch in range(len(drawn) // size):
            assert sorted(by_epoch[epoch]) == list(range(size)), f"epoch {epoch} is no permutation"
        assert len(set(by_epoch[len(drawn) // size])) == len(drawn) % size
    return mix, step


@pytest.mark.parametrize("size", range(1, 25))
def test_one_data_set_with_every_batch_size(size):
    for batch_size in range(1, size + 1):
        check_sequence([size], [None], batch_size)


@pytest.mark.parametrize("sizes,weights,batch_size", MIXES)
def test_mixtures(sizes, weights, batch_size):
    mix, steps = check_sequence(sizes, weights, batch_size)
    straight = [mix.samples(step) for step in range(steps)]
    order = list(range(steps))
    random.Random(0).shuffle(order)
    again = {step: make(sizes, weights, batch_size).samples(step) for step in order[:60]}
    assert all(straight[step] == batch for step, batch in again.items())


def test_pairs_of_small_data_sets_by_size_never_refuse_a_batch():
    for first, second in itertools.combinations_with_replacement(range(1, 7), 2):
        for batch_size in range(1, first + second + 1):
            check_sequence([first, second], [None, None], batch_size, epochs=3)


def test_many_data_sets_stay_within_two_of_their_share():
    chooser = random.Random(1)
    for shape in ("even", "random", "halving", "one heavy"):
        count = 40
        weights = {
            "even": [1.0] * count,
            "random": [chooser.random() + 1e-6 for _ in range(count)],
            "halving": [2.0**-i for i in range(count)],
            "one heavy": [1e6] + [chooser.random() + 1e-3 for _ in range(count - 1)],
        }[shape]
        mix = make([10**9] * count, weights, 1)
        total = sum(map(Fraction, weights))
        before = mix.drawn(0)
        for sample in [*range(1, 300), *(chooser.randrange(10**12) for _ in range(100))]:
            counts = mix.drawn(sample)
            assert sum(counts) == sample
            worst = max(abs(n - sample * Fraction(w) / total) for n, w in zip(counts, weights, strict=True))
            assert worst < 2, (shape, sample, float(worst))
            if sample < 300:
                assert sorted(b - a for a, b in zip(before, counts, strict=True)) == [0] * (count - 1) + [1]
                before = counts


def test_two_data_sets_stay_within_half_a_sample():
    mix = make([700, 300], [None, None], 1)
    assert max(abs(mix.drawn(g)[0] - Fraction(7, 10) * g) for g in range(1000)) == Fraction(1, 2)


def test_seed_stage_fingerprint_and_epoch_change_the_order():
    base = make([1000], [None], 100)
    others = [
        make([1000], [None], 100, seed=8),
        make([1000], [None], 100, stage=2),
        make([1000], [None], 100, fingerprint="other"),
    ]
    orders = [[sample.index for sample in mix.samples(0)] for mix in (base, *others)]
    orders.append([sample.index for sample in base.samples(10)])
    assert base.samples(10)[0].epoch == 1
    for one, two in itertools.combinations(orders, 2):
        same = sum(a == b for a, b in zip(one, two, strict=True))
        assert one != two and same < 10


def test_two_data_sets_of_one_size_have_different_orders():
    batch = make([1000, 1000], [None, None], 200).samples(0)
    first, second = ([sample.index for sample in batch if sample.dataset == d] for d in (0, 1))
    assert len(first) == len(second) == 100 and len(set(first) & set(second)) < 40


def test_data_sets_are_mixed_inside_a_batch():
    datasets = [sample.dataset for sample in make([500, 500], [None, None], 100).samples(3)]
    changes = sum(a != b for a, b in itertools.pairwise(datasets))
    assert 25 < changes < 75


def test_order_is_close_to_uniform():
    """Over 2400 seeds each of 24 records is first about 100 times (standard deviation 9.8), and so for the second."""
    for position in (0, 1):
        counts = collections.Counter(
            make([24], [None], 1, seed=seed).samples(position)[0].index for seed in range(2400)
        )
        assert len(counts) == 24 and all(50 < n < 150 for n in counts.values())
        assert sum((n - 100) ** 2 / 100 for n in counts.values()) < 60  # chi square with 23 degrees of freedom


@pytest.mark.parametrize("size", [2, 3, 10, 100, 1000, 4097])
def test_permutation_is_a_permutation(size):
    key = blend._key("x", size)
    assert sorted(blend._permuted(i, size, key) for i in range(size)) == list(range(size))


def test_a_billion_records_cost_no_more_than_a_thousand(monkeypatch):
    calls = 0
    plain = blend._round

    def counted(*arguments):
        nonlocal calls
        calls += 1
        return plain(*arguments)

    monkeypatch.setattr(blend, "_round", counted)
    costs = []
    for size, step in ((10**3, 3), (10**9, 0), (10**9, 10**7), (10**9, 10**15)):
        calls = 0
        mix = make([size, 3 * size], [None, None], 128)
        batch = mix.samples(step)
        assert len(set(batch)) == 128 and all(sample.index < 3 * size for sample in batch)
        costs.append(calls)
    # three permutations a sample, six rounds each, and now and then a second walk
    assert max(costs) <= 3 * 6 * 128 * 1.5, costs


def test_the_order_is_pinned():
    """A run that is resumed with a newer version must see the same samples: this order must never change."""
    batch = make([10, 1000], [2.0, 3.0], 4, seed=1234, stage=1, fingerprint="0" * 32).samples(300)
    assert batch == PINNED


PINNED = [
    Sample(dataset=0, index=0, epoch=48),
    Sample(dataset=0, index=3, epoch=48),
    Sample(dataset=1, index=611, epoch=0),
    Sample(dataset=1, index=201, epoch=0),
]


def test_errors_name_both_numbers():
    with pytest.raises(ValueError, match="between 1 and the 12 records of the data, got 13"):
        make([5, 7], [None, None], 13)
    with pytest.raises(ValueError, match="got 0"):
        make([5, 7], [None, None], 0)
    with pytest.raises(ValueError, match="a batch of 10 takes up to 9 records of data set 0, which has 5"):
        make([5, 7], [9.0, 1.0], 10)
    with pytest.raises(ValueError, match="a batch of 10 takes up to 6 records of data set 0, which has 5"):
        make([5, 7], [6.0, 4.0], 10)
    assert len(make([5, 7], [5.0, 5.0], 10).samples(9)) == 10
    with pytest.raises(ValueError, match="data set 1 must have at least 1 record, got 0"):
        make([5, 0], [None, None], 1)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight of data set 0"):
            make([5], [weight], 1)
    with pytest.raises(ValueError, match="1 sizes, 2 weights"):
        make([5], [None, None], 1)
    with pytest.raises(ValueError, match="got 0 sizes"):
        make([], [], 1)
    with pytest.raises(ValueError, match="got -1"):
        make([5], [None], 1).samples(-1)


@pytest.mark.parametrize("available,wanted", [(1, 0), (8, 7), (14, 7), (20, 7), (30, 1), (9, 8)])
def test_negatives_change_every_epoch_and_all_serve(available, wanted):
    used = collections.Counter()
    before = None
    for epoch in range(available):
        chosen = choose_negatives(available, wanted, seed=1, stage=1, sample=Sample(0, 5, epoch))
        assert len(set(chosen)) == len(chosen) == wanted and all(0 <= n < available for n in chosen)
        assert chosen == choose_negatives(available, wanted, seed=1, stage=1, sample=Sample(0, 5, epoch))
        assert set(chosen) != before or not wanted
        before = set(chosen)
        used.update(chosen)
    rounds = -(-available // wanted) if wanted else 0
    chosen = [choose_negatives(available, wanted, seed=1, stage=1, sample=Sample(0, 5, e)) for e in range(rounds)]
    assert len(set(itertools.chain(*chosen))) == (available if wanted else 0), "all serve as soon as they can"
    assert not wanted or set(used.values()) == {wanted} and len(used) == available


def test_few_negatives_are_all_used():
    sample = Sample(0, 5, 3)
    assert choose_negatives(3, 7, seed=1, stage=1, sample=sample) == [0, 1, 2]
    assert choose_negatives(0, 7, seed=1, stage=1, sample=sample) == []
    with pytest.raises(ValueError, match="-1"):
        choose_negatives(3, -1, seed=1, stage=1, sample=sample)


def test_choices_depend_on_sample_seed_and_stage():
    def chosen(seed=1, stage=1, dataset=0, index=0):
        return tuple(choose_negatives(50, 7, seed=seed, stage=stage, sample=Sample(dataset, index, 0)))

    assert len({chosen(), chosen(seed=2), chosen(stage=2), chosen(dataset=1), chosen(index=1)}) == 5


def test_positives_take_turns():
    turns = [choose_positives(3, 1, seed=1, stage=1, sample=Sample(0, 9, epoch)) for epoch in range(6)]
    assert sorted(turns[:3]) == [[0], [1], [2]] and turns[:3] == turns[3:]
    assert choose_positives(1, 1, seed=1, stage=1, sample=Sample(0, 9, 4)) == [0]
    firsts = [choose_positives(3, 1, seed=1, stage=1, sample=Sample(0, index, 0)) for index in range(30)]
    assert {first for (first,) in firsts} == {0, 1, 2}


def test_several_positives_are_different_ones():
    pairs = [choose_positives(5, 2, seed=1, stage=1, sample=Sample(0, 9, epoch)) for epoch in range(5)]
    assert all(len(set(pair)) == 2 for pair in pairs)
    assert sorted(number for pair in pairs for number in pair) == sorted([*range(5)] * 2), "all equally often"
    assert choose_positives(2, 3, seed=1, stage=1, sample=Sample(0, 9, 1)) == [0, 1]


@pytest.mark.parametrize(("available", "wanted"), [(0, 1), (2, 0)])
def test_a_sample_without_a_positive_is_refused(available, wanted):
    with pytest.raises(ValueError, match=f"at least one positive, got {available} of which {wanted} are wanted"):
        choose_positives(available, wanted, seed=1, stage=1, sample=Sample(0, 0, 0))
