"""Which text goes to which rank and pack, and how a pack is laid out."""

from __future__ import annotations

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
    assert len(plan.packs[0]) == 2 or max(map(len, plan.packs[0])) <= 3


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


MEASURED = "longest first alone reaches 1.021 to 1.033 with nine texts a rank"


@pytest.mark.parametrize(
    ("num_ranks", "slowest"),
    [
        *((num_ranks, 1.02) for num_ranks in (8, 16, 32, 64)),
        pytest.param(128, 1.02, marks=pytest.mark.xfail(reason=MEASURED, strict=True)),
        (256, 1.08),
    ],
)
def test_ranks_are_balanced(num_ranks, slowest):
    for seed in range(5):
        lengths = passage_lengths(seed)
        loads = [lengths[numbers].sum() for numbers in make_plan(lengths, num_ranks, 16384).owned()]
        assert max(loads) <= slowest * np.mean(loads)


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
