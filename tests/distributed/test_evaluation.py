"""All layouts rank as one process does, ties included, and no rank embeds or searches more than its share."""

from __future__ import annotations

import numpy as np
import pytest

from nvembed_mcore.config import ParallelConfig
from nvembed_mcore.config_eval import METRICS
from nvembed_mcore.evaluation.retrieval import score_run
from tests.helpers import evaluation, runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return runs.write_inputs(tmp_path_factory.mktemp("inputs"), with_words=True)


@pytest.fixture(scope="module")
def sets(inputs):
    return evaluation.write_sets(inputs)


def configured(inputs, sets, **size):
    return runs.run_config(inputs, inputs / "run", eval=sets, parallel=ParallelConfig(timeout_minutes=2, **size))


@pytest.fixture(scope="module")
def alone(world, inputs, sets):
    """One process: rankings by brute force, and what it evaluates to."""
    config = configured(inputs, sets)
    (expected,) = world(2).run(evaluation.brute_force, config, ranks=1)
    (found,) = world(2).run(evaluation.evaluated, config, ranks=1)
    assert found["ranked"] == expected
    return found


LAYOUTS = [dict(), dict(tp=2), dict(pp=2), dict(pp=2, chunks_per_stage=2), dict(cp=2)]


@pytest.mark.parametrize("size", LAYOUTS, ids=str)
def test_ranks_as_one_process_does(world, inputs, sets, alone, size):
    results = world(2).run(evaluation.evaluated, configured(inputs, sets, **size))
    assert [one["scores"] for one in results] == [alone["scores"]] * 2
    assert all(one["training"] for one in results)
    for number, expected in enumerate(alone["ranked"]):
        by_rank = {one["dp"]: one["ranked"][number] for one in results if one["is_last"]}
        assert [row for rank in sorted(by_rank) for row in by_rank[rank]] == expected
        # Each document came to one data-parallel rank, once, and never more than a block with a pack at its end.
        blocks = {one["dp"]: one["embedded"][number] for one in results if one["is_last"]}
        documents = sorted(document for rank in blocks.values() for block in rank for document in block)
        assert documents == list(range(len(documents)))
        assert all(len(rank) > 1 for rank in blocks.values())
        shares = [sum(map(len, rank)) for rank in blocks.values()]
        assert len(shares) == (1 if size else 2) and max(shares) - min(shares) <= 4


def test_a_mean_over_sets_and_each_by_its_name(alone, sets):
    scores = alone["scores"]
    assert [*scores] == [*METRICS, *(f"{one.name}/{metric}" for one in sets.sets for metric in METRICS)]
    for metric in METRICS:
        assert scores[metric] == np.mean([scores[f"one/{metric}"], scores[f"two/{metric}"]])
        assert scores[f"one/{metric}"] != scores[f"two/{metric}"]


def test_a_number_that_is_none_ends_every_rank(world, inputs, sets):
    for size in (dict(), dict(pp=2)):
        messages = world(2).run(evaluation.refused, configured(inputs, sets, **size))
        assert messages == ["document embedding 0 is not finite"] * 2


def test_scores_are_those_of_the_judgements(alone, inputs, sets):
    from nvembed_mcore.data.beir import read_beir
    from nvembed_mcore.evaluation.retrieval import relevance_of

    for one, ranked in zip(sets.sets, alone["ranked"], strict=True):
        expected = score_run(ranked, relevance_of(read_beir(one.path)))
        assert {metric: alone["scores"][f"{one.name}/{metric}"] for metric in METRICS} == expected
