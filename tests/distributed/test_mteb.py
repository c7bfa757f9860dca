"""MTEB in several processes: the scores of one, whatever the layout; and nobody waits for a rank that failed."""

from __future__ import annotations

import json

import pytest
import torch.distributed as dist

from nvembed_mcore.config import ParallelConfig
from nvembed_mcore.data.tokenizer import write_mistral_tokenizer
from nvembed_mcore.evaluation.embedders import open_embedder
from nvembed_mcore.evaluation.mteb.instructions import load_instructions
from nvembed_mcore.evaluation.mteb.run import evaluate_mteb
from nvembed_mcore.parallel.groups import first_rank_leads, initialize


def in_all_layouts(root):
    """Scores as each rank has them, and what mteb wrote, by layout."""
    return {name: _evaluate(root, name, ParallelConfig(**sizes)) for name, sizes in (("dp", {}), ("tp", {"tp": 2}))}


def alone(root):
    return _evaluate(root, "alone", ParallelConfig())


def _evaluate(root, name, parallel):
    embedder = open_embedder(str(root / "mean"), parallel=parallel, token_budget=20)
    tasks = ["only rank 0 looks at these"]
    if dist.get_rank() == 0:
        from tests.helpers.mteb_tasks import SmallRetrieval, SmallSts

        tasks = [SmallRetrieval(), SmallSts()]
    scores = evaluate_mteb(
        embedder,
        tasks,
        name="test/model",
        instructions=load_instructions(root / "own.yaml"),
        folder=root / name,
        tokens_per_pack=20,
    )
    results = {}
    for file in (root / name).glob("results/test__model/*/Small*.json"):
        results[file.stem] = json.dumps(json.loads(file.read_text())["scores"])  # text, for NaN is not NaN
    return embedder.tokens, scores, results


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    from tests.helpers.exports import Case

    folder = tmp_path_factory.mktemp("mteb")
    write_mistral_tokenizer(folder / "tokenizer")
    Case("mean", folder / "tokenizer", folder)
    (folder / "own.yaml").write_text("types: {Retrieval: Find the topic, STS: Find the same}")
    return folder


def test_two_ranks_give_the_scores_of_one(world, root):
    ((tokens, scores, results),) = world(2).run(alone, root, ranks=1)
    first, second = world(2).run(in_all_layouts, root)
    for layout in ("dp", "tp"):
        assert first[layout][1] == second[layout][1]
    shared = [first["dp"][0], second["dp"][0]]
    assert sum(shared) == tokens and min(shared) > 0.4 * tokens
    assert first["dp"][1:] == (scores, results)  # to the bit
    assert [one.task for one in first["tp"][1]] == ["SmallRetrieval", "SmallSts"]
    for ours, theirs in zip(first["tp"][1], scores, strict=True):
        assert ours.score == pytest.approx(theirs.score, abs=0.01)


# Errors


def lead_and_fail(who):
    """`who` raises on its rank; returns what each rank saw, after requests that worked."""
    groups = initialize(ParallelConfig(timeout_minutes=1))

    def serve(request):
        if request == who == f"serve on {groups.rank}":
            raise ValueError(f"rank {groups.rank} cannot {request}")
        return groups.rank, request

    def work(ask):
        assert ask("one") == [(rank, "one") for rank in range(groups.world_size)]
        assert ask("two") == [(rank, "two") for rank in range(groups.world_size)]
        if who == "lead":
            raise ValueError("rank 0 cannot lead")
        ask(who)
        return "done"

    try:
        return first_rank_leads(work, serve)
    except ValueError as error:
        return str(error)


def test_an_error_of_any_rank_reaches_all(world):
    assert world(2).run(lead_and_fail, "nobody") == ["done", "done"]
    assert world(2).run(lead_and_fail, "lead") == ["rank 0 cannot lead"] * 2
    for rank in (0, 1):
        expected = f"rank {rank} cannot serve on {rank}"
        assert world(2).run(lead_and_fail, f"serve on {rank}") == [expected] * 2
