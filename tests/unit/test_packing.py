"""Which text goes to which rank and pack, and how a pack is laid out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nvembed_mcore.data.packing import Text, make_pack, make_plan


def passage_lengths(seed: int, count: int = 1152) -> np.ndarray:
    """Log-normal, mean 105 and 95th percentile 180 tokens, cut at 512: passages as in MS MARCO."""
    lengths = np.random.default_rng(seed).lognormal(4.586, 0.369, count).astype(np.int64)
    return lengths.clip(3, 512)


@pytest.mark.parametrize(("num_ranks", "budget"), [(1, 10**6), (1, 700), (3, 2048), (8, 512), (7, 60)])
def test_every_text_once_and_no_pack_over_its_budget(num_ranks, budget):
    lengths = passage_lengths(0, 200)
    plan = make_plan(lengths, num_ranks, budget)
    assert len(plan.packs) == num_ranks
    assert sorted(np.concatenate(plan.owned()).tolist()) == list(range(200))
    packs = [pack for packs in plan.packs for pack in packs]
    assert all(lengths[pack].sum() <= budget or len(pack) == 1 for pack in packs)
    assert all(len(pack) for pack in packs)
    assert plan.max_microbatches == max(map(len, plan.packs))


def test_packs_of_a_rank_are_few_and_even():
    lengths = passage_lengths(1)
    for packs in make_plan(lengths, 4, 4096).packs:
        loads = [int(lengths[pack].sum()) for pack in packs]
        assert len(loads) <= -(-sum(loads) // 4096) + 1
        assert max(loads) <= 1.03 * min(loads)


def test_a_text_over_the_budget_stands_alone():
    plan = make_plan([5, 100, 4, 3], 1, 12)
    assert [100] in [[[5, 100, 4, 3][number] for number in pack] for pack in plan.packs[0]]
    assert len(plan.packs[0]) == 2


@pytest.mark.parametrize("lengths", [[], [4], [4, 2, 9]])
def test_every_rank_has_a_pack(lengths):
    plan = make_plan(lengths, 5, 8)
    assert all(len(packs) >= 1 for packs in plan.packs)
    assert sum(len(numbers) == 0 for numbers in plan.owned()) == 5 - len(lengths)
    assert all(numbers.dtype == np.int64 for numbers in plan.owned())
    assert sorted(np.concatenate(plan.owned()).tolist()) == list(range(len(lengths)))


def test_the_plan_follows_from_the_lengths_alone():
    lengths = passage_lengths(2, 300)
    first, again = (make_plan(values, 6, 1024) for values in (lengths, lengths.tolist()))
    assert [[pack.tolist() for pack in packs] for packs in first.packs] == [
        [pack.tolist() for pack in packs] for packs in again.packs
    ]


def test_a_known_plan():
    """Longest first gives 9 + 4 + 4, 8 + 5, 7 + 6 tokens (17, 13, 13); trading the 9 for the 8 leaves 16, 14, 13."""
    plan = make_plan([4, 5, 6, 7, 8, 9, 4], 3, 16)
    assert [[pack.tolist() for pack in packs] for packs in plan.packs] == [[[4, 0, 6]], [[5, 1]], [[3, 2]]]


def test_equal_texts_go_in_their_order():
    plan = make_plan([7] * 6, 3, 14)
    assert [numbers.tolist() for numbers in plan.owned()] == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("lengths", [[], [4], [9, 30, 2, 5], passage_lengths(3, 150)], ids=len)
@pytest.mark.parametrize("multiple", [2, 3, 4])
def test_packs_of_a_rank_come_in_multiples(lengths, multiple):
    lengths, budget = np.array(lengths, dtype=np.int64), 800
    plan = make_plan(lengths, 3, budget, multiple)
    assert sorted(np.concatenate(plan.owned()).tolist()) == list(range(len(lengths)))
    for packs in plan.packs:
        assert len(packs) >= multiple and len(packs) % multiple == 0
        assert all(pack.dtype == np.int64 and pack.ndim == 1 for pack in packs)
        loads = [int(lengths[pack].sum()) for pack in packs]
        assert max(loads) <= budget
        # No whole multiple more than the budget asks for, with one to spare for texts that do not fit evenly.
        assert len(packs) <= multiple * (-(-(-(-sum(loads) // budget) + 1) // multiple))
        texts = sum(map(len, packs))
        assert sum(len(pack) > 0 for pack in packs) == min(texts, len(packs))


def test_many_packs_are_few():
    lengths = passage_lengths(1)
    (packs,) = make_plan(lengths, 1, 512).packs
    assert 200 < len(packs) <= 1.03 * lengths.sum() / 512


@pytest.mark.parametrize("budget", [300, 60])
def test_small_packs_are_no_more_than_texts(budget):
    """Packs of two or three texts, or of one: the budget holds although most packs cannot be filled."""
    lengths = passage_lengths(0)
    for multiple in (1, 5):
        (packs,) = make_plan(lengths, 1, budget, multiple).packs
        assert len(packs) % multiple == 0 and len(packs) <= len(lengths) + multiple - 1
        assert sum(len(pack) > 0 for pack in packs) == min(len(packs), len(lengths))
        assert all(lengths[pack].sum() <= budget or len(pack) == 1 for pack in packs)


def test_tokens_per_rank():
    tokens = make_plan([5, 100, 4, 3], 3, 12).tokens_per_rank([5, 100, 4, 3])
    assert tokens.tolist() == [100, 5, 7] and tokens.dtype == np.int64
    assert make_plan([], 2, 12).tokens_per_rank([]).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("num_ranks", "slowest"), [*((num_ranks, 1.02) for num_ranks in (8, 16, 32, 64, 128)), (256, 1.08)]
)
def test_ranks_are_balanced(num_ranks, slowest):
    for seed in range(20):
        lengths = passage_lengths(seed)
        loads = make_plan(lengths, num_ranks, 16384).tokens_per_rank(lengths)
        assert loads.sum() == lengths.sum()
        assert loads.max() <= slowest * loads.mean()


@pytest.mark.parametrize("num_ranks", [1, 8, 16, 32, 64, 128, 256])
def test_tails_are_small(num_ranks):
    for seed in range(5):
        texts = [Text(np.ones(length, np.int32), 0) for length in passage_lengths(seed)]
        plan = make_plan([len(text) for text in texts], num_ranks, 16384)
        packs = [make_pack([texts[number] for number in pack], 16) for packs in plan.packs for pack in packs]
        padded = sum(len(pack.token_ids) for pack in packs)
        assert 1 - sum(pack.real_tokens for pack in packs) / padded <= 0.02


def test_the_benchmark_writes_its_figures(tmp_path):
    program = Path(__file__).parents[2] / "tools" / "bench" / "packing.py"
    subprocess.run([sys.executable, program, "--batches", "1", "--json", tmp_path / "figures.json"], check=True)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures) == 3 * 8
    assert 1 <= figures["slowest_over_mean_128"] <= 1.02 and figures["milliseconds_1_many_packs"] > 0


def texts_of(*lengths: int) -> list[Text]:
    return [Text(np.arange(10 * i, 10 * i + n, dtype=np.int32), min(i, n - 1)) for i, n in enumerate(lengths)]


@pytest.mark.parametrize(("multiple", "tail"), [(1, 0), (3, 0), (4, 3), (16, 7)])
def test_a_pack_is_its_texts_and_a_tail(multiple, tail):
    pack = make_pack(texts_of(4, 2, 3), multiple)
    assert pack.token_ids.tolist() == [0, 1, 2, 3, 10, 11, 20, 21, 22] + [0] * tail
    assert pack.lengths.tolist() == [4, 2, 3] + [tail] * (tail > 0)
    assert pack.pooled_from.tolist() == [0, 1, 2] and pack.num_texts == 3
    assert pack.real_tokens == 9 and len(pack.token_ids) % multiple == 0
    assert {pack.token_ids.dtype, pack.lengths.dtype, pack.pooled_from.dtype} == {np.dtype(np.int64)}


@pytest.mark.parametrize("multiple", [1, 4])
def test_a_rank_without_texts_gets_a_dummy(multiple):
    pack = make_pack([], multiple)
    assert pack.token_ids.tolist() == [0] * multiple and pack.lengths.tolist() == [multiple]
    assert len(pack.pooled_from) == pack.num_texts == pack.real_tokens == 0


def test_an_empty_text_is_refused():
    with pytest.raises(AssertionError, match="empty sequence"):
        make_pack([*texts_of(3), Text(np.array([], dtype=np.int32), 0)])
