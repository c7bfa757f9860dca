"""Kill anywhere: SIGKILL to any rank at any moment costs one save interval at most, and not a bit of the result."""

from __future__ import annotations

import dataclasses
import random

import pytest

from nvembed_mcore.config import CheckpointConfig, EvalConfig, LoraConfig, LossConfig, StepConfig
from tests.helpers import kills, runs
from tests.helpers.supervisor import Ranks

STEPS, EVERY, KEEP, RANKS = 12, 3, 2, 2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return runs.write_inputs(tmp_path_factory.mktemp("inputs"), with_words=True)


def config_of(inputs, run_dir, **checkpoint):
    """Dropout in the adapters, a learned temperature, and forward passes that are done again."""
    config = runs.run_config(
        inputs,
        run_dir,
        steps=STEPS,
        checkpoint=CheckpointConfig(every_steps=EVERY, keep=KEEP, **checkpoint),
        step=StepConfig(way="cached", tokens_per_microbatch=100),
        loss=LossConfig(temperature=0.1, learn_temperature=True),
        eval=EvalConfig(),
    )
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, lora=LoraConfig(rank=2, alpha=8, dropout=0.2))
    )


@pytest.fixture(scope="module")
def unharmed(inputs, tmp_path_factory):
    """The run that nobody killed."""
    run_dir = tmp_path_factory.mktemp("runs") / "unharmed"
    config = runs.write_config(config_of(inputs, run_dir))
    with Ranks([str(config)], RANKS, run_dir.parent / "output") as ranks:
        assert ranks.wait(60) == [0, 0], ranks.outputs()
    return run_dir


@pytest.mark.parametrize("seed", [7, pytest.param(8, marks=pytest.mark.slow)])
def test_a_run_killed_everywhere_ends_with_the_same_bits(inputs, unharmed, tmp_path, seed):
    """Attempts save synchronously and asynchronously by turns, beginning with the latter."""
    run_dir = tmp_path / "run"
    config = str(runs.write_config(config_of(inputs, run_dir)))
    commands = [[config], [config, "--checkpoint.async_save", "true"]]
    plan = list(kills.schedule(random.Random(seed), RANKS, STEPS, EVERY, KEEP))
    assert {blow.point for blow in plan} == {"", *kills.STEP_POINTS, *kills.IN_VAIN, "after_pointer", "during_prune"}
    attempts, saved = [], set()
    for attempt in kills.supervise(commands, run_dir, RANKS, plan):
        # While a save is still being written, the run is up to an interval ahead of it.
        if attempts:
            before = attempts[-1]
            allowed = 2 * EVERY if "--checkpoint.async_save" in before.arguments else EVERY
            assert before.reached - attempt.began <= allowed, before
        attempts.append(attempt)
        saved |= {*attempt.checkpoints}
        assert len(attempt.checkpoints) >= min(KEEP, len(saved)), f"after {attempt.blow} a promised checkpoint is gone"
    assert [attempt.blow for attempt in attempts] == [*plan, None]
    assert kills.files(run_dir) == kills.files(unharmed) == {"latest", "step-00000009", "step-00000012"}
    assert kills.curve(run_dir) == kills.curve(unharmed)
    assert [step for step, *_ in kills.curve(run_dir)] == list(range(1, STEPS + 1))
    assert kills.digest(run_dir) == kills.digest(unharmed)
