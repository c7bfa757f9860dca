"""A slow rank of a real run is named in its log."""

from __future__ import annotations

import os

from nvembed_mcore.config import EvalConfig, LogConfig
from nvembed_mcore.exits import Exit
from tests.helpers import runs
from tests.helpers.supervisor import Ranks


def test_a_slow_rank_is_named_once(tmp_path):
    inputs = runs.write_inputs(tmp_path)
    log = LogConfig(progress=False, tensorboard=False, straggler_window=2)
    config = runs.run_config(inputs, tmp_path / "run", steps=8, eval=EvalConfig(), log=log)
    # Reading a batch takes rank 1 many times as long as a step.
    slow = ",".join(f"sleep=0.3@data:1:{step}" for step in range(1, 9))
    with Ranks([str(runs.write_config(config))], 2, tmp_path / "output", env={"NVEMBED_FAULT": slow}) as ranks:
        assert ranks.wait(60) == [Exit.DONE, Exit.DONE], ranks.outputs()
    (file,) = (tmp_path / "run" / "logs").rglob("rank-0.log")
    (line,) = [line for line in file.read_text(encoding="utf-8").splitlines() if "own work" in line]
    assert f"rank 1 (host {os.uname().nodename}) takes " in line
    assert line.endswith("x the median time for its own work for 6 steps")
