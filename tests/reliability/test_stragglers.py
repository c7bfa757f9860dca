"""A slow rank of a real run is named in its log."""

from __future__ import annotations

import os
from unittest import mock

from nvembed_mcore import fault_injection
from nvembed_mcore.config import EvalConfig, LogConfig, RunConfig
from tests.helpers import runs


def train_slowly(config: RunConfig, faults: str) -> None:
    from nvembed_mcore.train import train

    with mock.patch.dict(os.environ, {fault_injection.VARIABLE: faults}):
        train(config)


def test_a_slow_rank_is_named_once(world, tmp_path):
    inputs = runs.write_inputs(tmp_path, with_words=True)
    log = LogConfig(progress=False, tensorboard=False, straggler_window=2)
    config = runs.run_config(inputs, tmp_path / "run", steps=8, eval=EvalConfig(), log=log)
    # Reading a batch takes rank 1 many times as long as a step.
    slow = ",".join(f"sleep=0.3@data:1:{step}" for step in range(1, 9))
    world(2).run(train_slowly, config, slow)
    (file,) = (tmp_path / "run" / "logs").rglob("rank-0.log")
    (line,) = [line for line in file.read_text(encoding="utf-8").splitlines() if "own work" in line]
    assert f"rank 1 (host {os.uname().nodename}) takes " in line
    assert line.endswith("x the median time for its own work for 6 steps")
