"""The order of samples when ranks come and go and the run is restarted, at any step: none repeated, none skipped.

`test_blend_exhaustive.py` walks through the blend; here ranks come and go, each with what it knows itself.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from nvembed_mcore.config import DataConfig, DatasetConfig
from nvembed_mcore.data.packing import make_pack, make_plan
from nvembed_mcore.data.source import BatchSource
from tests.helpers.stores import Numbers

BUDGET = 24
"""Tokens of a pack: of the texts of 1 to 7 tokens some stand together, and ranks have several packs."""


def source_of(size: int, batch_size: int) -> BatchSource:
    """What a process that just started knows."""
    data = DataConfig(tokenizer="t", datasets=[DatasetConfig(path="a")])
    return BatchSource(data, [Numbers(size)], batch_size=batch_size, seed=3, stage=1)


def seen_by(source: BatchSource, step: int, rank: int, ranks: int, multiple: int) -> dict[int, int]:
    """What one rank embeds in a step, by its own plan: of each text of the batch its record."""
    batch = source.batch(step)
    numbers = make_plan(batch.lengths, ranks, BUDGET, multiple).packs[rank]
    assert len(numbers) % multiple == 0
    seen = {}
    for pack_numbers in numbers:
        pack = make_pack([batch.texts[number] for number in pack_numbers])
        begins = np.cumsum(pack.lengths) - pack.lengths
        for number, begin in zip(pack_numbers.tolist(), begins.tolist(), strict=False):
            assert number not in seen
            seen[number] = int(pack.token_ids[begin])
    return seen


def records_of_step(sources: list[BatchSource], step: int, multiple: int = 1) -> list[int]:
    """The records of a step in the order of the batch, put together from what the ranks embed."""
    seen: dict[int, int] = {}
    count = 0
    for rank, source in enumerate(sources):
        mine = seen_by(source, step, rank, len(sources), multiple)
        count += len(mine)
        seen |= mine
    queries = len(seen) // 2
    assert count == len(seen) and sorted(seen) == list(range(2 * queries)), "each text on one rank"
    records = [seen[number] for number in range(queries)]
    assert [seen[queries + number] for number in range(queries)] == records, "a query keeps its passage"
    return records


def check_passes(records: list[list[int]], size: int) -> int:
    """Every pass has every record once, wherever the batches were cut; returns the passes."""
    # Inside a batch that ends a pass, the samples of the next one are mixed with the last of the old one.
    left, ahead, passes = set(range(size)), set(), 0
    for batch in records:
        assert len(set(batch)) == len(batch), "twice in a batch"
        for record in batch:
            if record in left:
                left.remove(record)
            else:
                assert record not in ahead, "repeated before the pass was over"
                ahead.add(record)
        if len(ahead) and left:
            raise AssertionError(f"a pass went on to the next with {sorted(left)} left out")
        if not left:
            left, ahead, passes = set(range(size)) - ahead, set(), passes + 1
    return passes


def batch_sizes(size: int) -> list[int]:
    return sorted({1, size // 3, size - 1, size} & set(range(1, size + 1)))


def test_ranks_that_come_and_go_at_any_step():
    """Every size to 64, batches of one record to a whole pass, another number of ranks after every restart."""
    rng, steps_seen, passes = random.Random(5), 0, 0
    for size in range(1, 65):
        for batch_size in batch_sizes(size):
            steps = min(10, 2 + 2 * size // batch_size)
            straight = [records_of_step([source_of(size, batch_size)], step) for step in range(steps)]
            elastic, sources = [], []
            for step in range(steps):
                if not sources or rng.random() < 0.3:  # a restart, with as many ranks as there are now
                    ranks = rng.randint(1, 8)
                    sources = [source_of(size, batch_size) for _ in range(ranks)]
                elastic.append(records_of_step(sources, step, multiple=rng.choice((1, 1, 2))))
            assert elastic == straight
            passes += check_passes(straight, size)
            steps_seen += steps
    assert steps_seen > 1200 and passes > 350


@pytest.mark.parametrize("ranks", range(1, 9))
def test_a_resume_at_every_step_through_the_tail_of_a_pass(ranks):
    """The rest of the run is the same from wherever it is taken up, by any number of ranks."""
    size, batch_size = 13, 5
    straight = [records_of_step([source_of(size, batch_size)], step) for step in range(9)]
    for begin in range(9):
        sources = [source_of(size, batch_size) for _ in range(ranks)]
        assert [records_of_step(sources, step) for step in range(begin, 9)] == straight[begin:]


def test_ten_samples_in_microbatches_of_two_on_three_ranks():
    """Megatron's own random sampler gives these ranks 2, 1 and 1 microbatches of a pass, and they then disagree on how
    many samples were seen."""
    straight = [records_of_step([source_of(10, 6)], step) for step in range(10)]
    sources = [source_of(10, 6) for _ in range(3)]
    assert [records_of_step(sources, step) for step in range(10)] == straight
    assert check_passes(straight, 10) == 6
    assert [source.blend.drawn(5) for source in sources] == [[30]] * 3, "the state is the step, and all ranks have it"
    for step in range(10):
        plan = make_plan(sources[0].batch(step).lengths, 3, BUDGET)
        assert min(len(numbers) for numbers in plan.owned()) > 0


@pytest.mark.parametrize("wrong", ["skipped", "repeated", "swapped"])
def test_a_wrong_order_is_seen(wrong):
    records = [records_of_step([source_of(8, 3)], step) for step in range(6)]
    assert check_passes(records, 8) == 2
    first = list(itertools.chain(*records[:2]))
    others = {
        "skipped": [records[0], *records[2:]],
        "repeated": [records[0], records[0], *records[1:]],
        "swapped": [records[0], [first[0], *records[1][1:]], *records[2:]],
    }
    with pytest.raises(AssertionError):
        check_passes(others[wrong], 8)
