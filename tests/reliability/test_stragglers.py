"""A slow rank of a real run is named in its log; a fast run's log names nobody."""

from __future__ import annotations

import os
import time

from nvembed_mcore.config import EvalConfig, LogConfig, RunConfig
from nvembed_mcore.data.source import BatchSource
from nvembed_mcore.train import train
from tests.helpers import runs


def train_with_a_slow_rank(config: RunConfig, slow: str) -> None:
    """Reading a batch takes the slow rank 0.4 s longer: many times its step."""
    batch = BatchSource.batch

    def slow_batch(self: BatchSource, step: int):
        time.sleep(0.4)
        return batch(self, step)

    BatchSource.batch = slow_batch if os.environ["RANK"] == slow else batch
    try:
        train(config)
    finally:
        BatchSource.batch = batch


def test_a_slow_rank_is_named_once(world, tmp_path):
    inputs = runs.write_inputs(tmp_path)
    log = LogConfig(progress=False, tensorboard=False, straggler_window=2)
    config = runs.run_config(inputs, tmp_path / "run", steps=8, eval=EvalConfig(), log=log)
    world(2).run(train_with_a_slow_rank, config, "1")
    (file,) = (tmp_path / "run" / "logs").rglob("rank-0.log")
    (line,) = [line for line in file.read_text(encoding="utf-8").splitlines() if "own work" in line]
    assert f"rank 1 (host {os.uname().nodename}) takes " in line
    assert line.endswith("x the median time for its own work for 6 steps")
