"""`step.way: auto`: what a graph keeps, and the choice that follows from it and from the free memory."""

import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch

from nvembed_mcore.checkpoint import store
from nvembed_mcore.checkpoint.store import Checkpoint
from nvembed_mcore.data.packing import make_pack
from nvembed_mcore.memory import graph_bytes
from nvembed_mcore.resume import decided, restore
from tests.helpers import cases, models, runs
from tests.helpers.cases import Case
from tests.helpers.grid import budget_for
from tests.helpers.plain import training_batch


def graph_of_a_pack(case: Case) -> dict[str, float]:
    """Bytes that the graph of a pack keeps by our measure, of twice the tokens, and what lies in memory by torch's."""
    from nvembed_mcore.memory import graph_bytes

    step, *_ = cases.build_step(case)
    (chunk,) = step.chunks
    parameters = list(chunk.module.parameters())
    text = models.random_texts([32], 250)
    one, two = (graph_bytes(lambda: chunk(make_pack(texts)), parameters) for texts in (text, text * 2))  # noqa: B023
    weights = sum(parameter.numel() * 4 for parameter in parameters)
    return {"one": one, "two": two, "weights": weights}


def kept_by_texts(case: Case, lengths: list[int]) -> int:
    """Bytes that the graph of a pack of these texts keeps."""
    from nvembed_mcore.memory import graph_bytes

    step, *_ = cases.build_step(case)
    (chunk,) = step.chunks
    pack = make_pack(models.random_texts(lengths, 250))
    return graph_bytes(lambda: chunk(pack), list(chunk.module.parameters()))


def ways_by_free_memory(case: Case, free: list[float]) -> tuple[list[str], list[str]]:
    """Ways of a step under `auto` where rank r finds `free[r]` bytes, and what it logged of them."""
    import logging

    from nvembed_mcore import device
    from nvembed_mcore.metrics import PhaseTimer

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    loggers = [logging.getLogger(f"nvembed_mcore.{name}") for name in ("step", "memory")]
    step, groups, *_ = cases.build_step(case)
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    with mock.patch.object(device, "free_memory_bytes", lambda: free[groups.dp_rank]):
        ways = [step(training_batch(case.queries, number), number, PhaseTimer()).way for number in (1, 2)]
    for logger in loggers:
        logger.removeHandler(handler)
    return ways, lines


def test_a_graph_is_measured_without_the_weights_and_grows_with_its_tokens(world):
    (found,) = world(1).run(graph_of_a_pack, Case())
    # 32 tokens, 4 layers of width 32 and 64: some dozens of float32 a token, layer and unit of width.
    assert 32 * 4 * 32 * 4 * 10 < found["one"] < 32 * 4 * 32 * 4 * 100
    assert found["two"] == pytest.approx(2 * found["one"], rel=0.02), "weights would count once"


def test_what_multi_layer_keeps_does_not_grow_with_the_texts(world):
    """So that counting by the token is right: sixteen texts of two tokens are about one of thirty-two."""
    one, many = (world(1).run(kept_by_texts, Case(kind="multi_layer"), lengths)[0] for lengths in ([32], [2] * 16))
    assert many == pytest.approx(one, rel=0.1)


def test_a_measured_graph_is_freed():
    weight, states = torch.nn.Parameter(torch.ones(100)), []

    def forward() -> torch.Tensor:
        state = weight.exp()  # whose backward keeps its own output
        states.append(weakref.ref(state))
        return state.sum()

    assert graph_bytes(forward, [weight]) == 400
    assert states[0]() is None


PLENTY, LITTLE = 1e12, 3e5
"""Bytes; graphs of the cases below take about a megabyte."""


@pytest.mark.parametrize(
    ("free", "way"),
    [([PLENTY, PLENTY], "retain"), ([LITTLE, LITTLE], "cached"), ([PLENTY, LITTLE], "cached"), ([0, 0], "cached")],
)
def test_the_emptiest_rank_decides_for_all(world, free, way):
    case = Case(world=2, budget=budget_for(3, 2, 7))
    for ways, lines in world(2).run(ways_by_free_memory, case, free):
        assert ways == [way, way]
        assert sum("a graph keeps" in line for line in lines) == 1, "it is measured once"
        (reason,) = [line for line in lines if line.startswith("step.way auto:")]
        assert reason.startswith(f"step.way auto: {way} (graphs of ") and "tokens a rank at most" in reason


@pytest.mark.parametrize(
    ("case", "way"), [(Case(), "single"), (Case(world=2, pp=2), "cached"), (Case(world=2), "single")], ids=str
)
def test_where_there_is_no_choice_nothing_is_measured(world, case, way):
    for ways, lines in world(case.world).run(ways_by_free_memory, case, [0, 0]):
        assert ways == [way, way] and not any("a graph keeps" in line for line in lines)
        assert any(line.startswith(f"step.way auto: {way}") for line in lines)


def test_a_resumed_run_keeps_the_limit_of_its_hardware_and_layout():
    """Otherwise it could step another way, and not go on by bits."""
    layout = {"parallel": {"tp": 1}, "step": {"way": "auto"}, "optim": {"distributed": True}}
    facts = {"hardware": {"device": "cpu", "world_size": 2}, "config": layout}
    saved = Checkpoint(Path("run"), 5, facts | {"retain_tokens": 777})
    assert decided(None, facts, "retain_tokens") is decided(saved, facts, "fp8_attention") is None
    assert decided(saved, facts, "retain_tokens") == 777
    assert decided(saved, facts | {"hardware": {"device": "cpu", "world_size": 4}}, "retain_tokens") is None
    assert decided(saved, facts | {"config": layout | {"parallel": {"tp": 2}}}, "retain_tokens") is None


def test_a_checkpoint_of_an_older_version_is_refused(tmp_path, monkeypatch):
    old = Checkpoint(tmp_path / "step-00000003", 3, {"config": {}})
    monkeypatch.setattr(store, "newest_good", lambda config, run_dir: old)
    with pytest.raises(store.CheckpointError, match="step-00000003 was written by an older version"):
        restore(runs.run_config(tmp_path, tmp_path), [], None, {})
