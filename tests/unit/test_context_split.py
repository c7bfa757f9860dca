"""How context-parallel ranks share a pack."""

from __future__ import annotations

import numpy as np
import pytest

from nvembed_mcore.data.packing import WHOLE, Split, Text, make_pack, make_plan


def texts_of(*lengths: int) -> list[Text]:
    return [Text(np.arange(100 * i + 1, 100 * i + 1 + n, dtype=np.int32), 0) for i, n in enumerate(lengths)]


def test_the_split_is_that_of_transformer_engine():
    """The example of its `attn_forward_func_with_cp`: sequences of 8 and 4 tokens on two ranks."""
    first, second = (Split(rank, 2).places(np.array([8, 4])) for rank in (0, 1))
    assert first.tolist() == [0, 1, 6, 7, 8, 11] and second.tolist() == [2, 3, 4, 5, 9, 10]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_token_is_on_one_rank(size):
    lengths = np.random.default_rng(0).integers(1, 60, 40)
    filled = Split(size=size).filled(lengths)
    assert (filled % (2 * size) == 0).all() and (filled >= lengths).all() and (filled < lengths + 2 * size).all()
    parts = [Split(rank, size).places(filled) for rank in range(size)]
    assert {len(part) for part in parts} == {filled.sum() // size}
    assert sorted(np.concatenate(parts).tolist()) == list(range(filled.sum()))
    assert all((np.diff(part) > 0).all() for part in parts)


def test_without_context_parallelism_nothing_is_filled():
    assert WHOLE.filled([3, 1]).tolist() == [3, 1]
    assert WHOLE.places(np.array([3, 1])).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("multiple", "tail"), [(1, 0), (3, 8), (4, 0), (16, 16)])
def test_parts_of_a_pack(multiple, tail):
    """Texts of 5, 2 and 3 tokens on two ranks are filled to 8, 4 and 4; each rank's part to the multiple."""
    texts = texts_of(5, 2, 3)
    first, second = (make_pack(texts, multiple, Split(rank, 2)) for rank in (0, 1))
    empty = [0] * (tail // 2)
    assert first.token_ids.tolist() == [1, 2, 0, 0, 101, 0, 201, 0, *empty]
    assert second.token_ids.tolist() == [3, 4, 5, 0, 102, 0, 202, 203, *empty]
    for pack in (first, second):
        assert pack.lengths.tolist() == [5, 2, 3] + [tail] * (tail > 0) and pack.num_texts == 3
        assert pack.real_tokens == 10 and pack.padded_tokens == 16 + tail
        assert len(pack.token_ids) % multiple == 0


@pytest.mark.parametrize(("multiple", "tokens"), [(1, 2), (3, 6), (16, 16)])
def test_ranks_without_texts_share_a_dummy(multiple, tokens):
    for rank in range(4):
        pack = make_pack([], multiple, Split(rank, 4))
        assert pack.token_ids.tolist() == [0] * tokens and pack.lengths.tolist() == [4 * tokens]
        assert pack.num_texts == pack.real_tokens == 0


def test_a_shared_pack_holds_the_budget_of_its_ranks():
    """Three texts of 7 tokens count 8 each: 24 fit where two ranks have 12 tokens each, and not where they have 11."""
    for budget, packs in ((12, 1), (11, 2)):
        assert len(make_plan([7, 7, 7], 1, budget, cp=2).packs[0]) == packs
    assert make_plan([7, 7, 7], 1, 21).max_microbatches == 1
    lengths = np.random.default_rng(1).integers(1, 900, 300)
    for cp in (2, 4):
        plan = make_plan(lengths, 3, 2048, cp=cp)
        filled = Split(size=cp).filled(lengths)
        assert all(filled[pack].sum() <= cp * 2048 for packs in plan.packs for pack in packs)
