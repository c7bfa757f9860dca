"""Real processes that are asked to stop, and that fail: where they stop, what they leave, how they end."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from nvembed_mcore import train
from nvembed_mcore.checkpoint.store import find_checkpoint
from nvembed_mcore.config import CheckpointConfig, RunConfig
from nvembed_mcore.data.faults import DataError
from nvembed_mcore.exits import Preempted
from nvembed_mcore.log import read_metrics
from nvembed_mcore.status import read_status
from nvembed_mcore.stop import StopRequests
from tests.helpers import runs
from tests.helpers.supervisor import Ranks, last_step
from tests.helpers.world import free_port

STEPS = 10


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return runs.write_inputs(tmp_path_factory.mktemp("inputs"))


def config_of(inputs: Path, run_dir: Path) -> RunConfig:
    """Without a checkpoint of its own before the last step."""
    checkpoint = CheckpointConfig(every_steps=100, keep_best=False)
    config = runs.run_config(inputs, run_dir, steps=STEPS, checkpoint=checkpoint)
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, every_steps=3))


class Run:
    """A run of two ranks, attempt after attempt."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.run_dir = config, Path(config.run_dir)
        self.file = runs.write_config(config)

    def start(self, *options: str, faults: str = "") -> Ranks:
        arguments = [str(self.file), *options]
        return Ranks(arguments, 2, self.run_dir.parent / "output", env={"NVEMBED_FAULT": faults} if faults else {})

    def status(self):
        return read_status(self.run_dir)

    def lines(self) -> list[tuple]:
        """Losses and evaluations by step, with every digit."""
        lines = read_metrics(self.run_dir / "metrics.jsonl")
        return sorted((line["step"], line.get("loss", 0.0), line.get("ndcg_at_10", 0.0)) for line in lines)

    def first_failure(self) -> dict:
        (file,) = self.run_dir.glob(f"logs/{self.status().attempt:04d}/first-failure.json")
        return json.loads(file.read_text())


@pytest.fixture(scope="module")
def straight(inputs, tmp_path_factory):
    """The same run, which nobody stopped."""
    run = Run(config_of(inputs, tmp_path_factory.mktemp("straight") / "run"))
    with run.start() as ranks:
        assert ranks.wait(60) == [0, 0]
    return run


@pytest.fixture(scope="module")
def stopped(inputs, tmp_path_factory):
    return Run(config_of(inputs, tmp_path_factory.mktemp("stopped") / "run"))


def wait_for_standstill(ranks: Ranks, rank: int) -> None:
    """Until the rank has stopped itself (the fault `stop`)."""
    file = Path(f"/proc/{ranks.processes[rank].pid}/stat")
    ranks.wait_until(lambda: file.read_text().rpartition(")")[2].split()[0] == "T")


def assert_stopped(run: Run, step: int, reason: str) -> None:
    status = run.status()
    assert (status.state, status.exit_status, status.step, status.checkpoint_step) == ("preempted", 75, step, step)
    assert status.reason == reason and status.samples_seen == step * run.config.batch_size
    assert find_checkpoint(run.run_dir).step == step
    assert max(line[0] for line in run.lines()) == step


def test_a_signal_to_one_rank_stops_all_after_the_same_step(stopped):
    """The rank stands still in step 2 when it comes; rank 0 waits for it. More come during the save."""
    with stopped.start(faults="stop@data:1:2,sleep=0.7@before_publish:0") as ranks:
        wait_for_standstill(ranks, 1)
        ranks.kill(1, signal.SIGUSR1)
        ranks.kill(1, signal.SIGCONT)
        ranks.wait_until(lambda: [*(stopped.run_dir / "checkpoints").glob(".*")])
        for number in (signal.SIGTERM, signal.SIGUSR1):
            ranks.kill(0, number)
            ranks.kill(1, number)
        assert ranks.wait(60) == [75, 75]
        assert "stopped after step 2: SIGUSR1 on rank 1; the same command goes on" in ranks.output(0)
        assert "Traceback" not in ranks.outputs()
    assert_stopped(stopped, 2, "SIGUSR1 on rank 1")


def test_a_signal_before_the_loop_stops_the_run_with_nothing_lost(stopped):
    logs = stopped.run_dir / "logs"
    with stopped.start() as ranks:
        ranks.wait_until(lambda: (logs / "0002" / "rank-0.log").exists())
        ranks.kill(0, signal.SIGTERM)
        assert ranks.wait(60) == [75, 75]
    assert_stopped(stopped, 2, "SIGTERM on rank 0")
    assert sorted(path.name for path in logs.glob("*/*")) == [*["rank-0.log"] * 2, *["rank-1.log"] * 2]


def test_the_wall_clock_stops_the_run(stopped):
    with stopped.start("--max_minutes", "0.03", faults="sleep=1.8@data:1:4") as ranks:
        assert ranks.wait(60) == [75, 75]
    assert_stopped(stopped, stopped.status().step, "the wall-clock limit of 0.03 minutes")
    assert 2 <= stopped.status().step <= 4


def test_a_stop_file_stops_the_run_and_must_be_removed(stopped):
    """At step 6, where an evaluation is due: it is made up for by the next attempt."""
    file = stopped.run_dir / "STOP"
    with stopped.start(faults="stop@data:1:6") as ranks:
        wait_for_standstill(ranks, 1)
        file.touch()
        ranks.kill(1, signal.SIGCONT)
        assert ranks.wait(60) == [75, 75]
    assert_stopped(stopped, 6, f"the file {file}")
    with stopped.start() as ranks:
        assert ranks.wait(60) == [78, 78]
        assert f"{file} is there, which stops this run: remove it to go on" in ranks.output(0)
    status = stopped.status()
    assert (status.state, status.step, status.checkpoint_step, status.attempt) == ("config_error", 6, 6, 5)
    file.unlink()


def test_it_ends_as_the_run_that_nobody_stopped(stopped, straight):
    with stopped.start() as ranks:
        assert ranks.wait(60) == [0, 0]
        assert "goodput " in ranks.output(0)
    assert stopped.lines() == straight.lines()
    status = stopped.status()
    assert (status.state, status.exit_status, status.step) == ("done", 0, STEPS)


def test_the_record_accounts_for_every_second(stopped):
    record = json.loads((stopped.run_dir / "run.json").read_text())
    attempts = record["attempts"]
    assert [one["state"] for one in attempts] == [*["preempted"] * 4, "done"]
    assert [(one["from_step"], one["kept_step"]) for one in attempts][1] == (2, 2)
    wall = (datetime.fromisoformat(attempts[-1]["end"]) - datetime.fromisoformat(attempts[0]["start"])).total_seconds()
    assert record["seconds"].pop("wall") == pytest.approx(wall, abs=0.01)
    assert sum(record["seconds"].values()) == pytest.approx(wall, abs=0.01)
    assert record["seconds"]["lost"] == 0 and 0 < record["goodput"] < 1
    assert record["versions"]["torch"] and attempts[0]["layout"]["dp"] == 2


def test_a_crash_of_one_rank_is_told_as_the_first_failure(inputs, tmp_path):
    checkpoint = CheckpointConfig(every_steps=2, keep_best=False)
    run = Run(dataclasses.replace(config_of(inputs, tmp_path / "run"), checkpoint=checkpoint))
    with run.start(faults="error@step_begin:1:4") as ranks:
        assert ranks.wait(60) == [70, 70]
        assert "Traceback" not in ranks.outputs()
        assert "internal: RuntimeError: the failure that error@step_begin:1:4" in ranks.output(1)
        assert f"(its trace: {run.run_dir / 'logs' / '0001' / 'rank-1.log'}, or again with --debug)" in ranks.output(1)
        assert "failed first, in step 4: RuntimeError: the failure that error@step_begin:1:4" in ranks.output(0)
    failure, status = run.first_failure(), run.status()
    assert (failure["rank"], failure["step"], failure["operation"], failure["exit_status"]) == (1, 3, "step 4", 70)
    assert "RuntimeError" in failure["traceback"][-1]
    assert (status.state, status.exit_status, status.step, status.checkpoint_step) == ("crashed", 70, 3, 2)
    assert status.reason == failure["error"]
    # The next attempt takes step 3 again: its time was lost.
    with run.start("--stop_at", "3") as ranks:
        assert ranks.wait(60) == [0, 0]
    lost, kept = (one["seconds"] for one in json.loads((run.run_dir / "run.json").read_text())["attempts"])
    assert lost["lost"] > 0 and lost["productive"] > 0 and kept["lost"] == 0


def test_a_full_disk_is_no_error_of_the_configuration(inputs, tmp_path):
    run = Run(config_of(inputs, tmp_path / "run"))
    with run.start(faults="full@step_begin:1:2") as ranks:
        assert ranks.wait(60) == [74, 74]
        assert "No space left on device" in ranks.output(0)
    assert (run.status().state, run.first_failure()["rank"]) == ("storage_error", 1)


def test_a_refused_start_leaves_no_folder(inputs, tmp_path):
    run = Run(config_of(inputs, tmp_path / "run"))
    with run.start("--checkpoint.resume", "must") as ranks:
        assert ranks.wait(60) == [78, 78]
    assert not run.run_dir.exists()


def test_a_signal_that_ended_readers_of_the_data_too_is_a_stop(monkeypatch, inputs, tmp_path):
    """A scheduler signals every process of a job, also those that tokenise."""

    def build(*_):
        raise DataError("a process that read the data was ended from outside")

    monkeypatch.setattr(train, "_Run", build)
    stops, config = StopRequests(), config_of(inputs, tmp_path / "run")
    with pytest.raises(DataError):
        train._build(config, None, stops, None)
    stops.signal = "SIGTERM"
    with pytest.raises(Preempted, match="stopped after step 0: SIGTERM while the data were read"):
        train._build(config, None, stops, None)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_torchrun_reaches_its_ranks(inputs, tmp_path, number):
    """It hands the signal on, waits for the ranks, and ends with 1 whatever they ended with: hence status.json."""
    run = Run(dataclasses.replace(config_of(inputs, tmp_path / "run"), steps=10000))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "0"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    launcher += ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout", "60"]
    process = subprocess.Popen([*launcher, "-m", "nvembed_mcore", "train", str(run.file)], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not (run.run_dir / "metrics.jsonl").exists() or last_step(run.run_dir) < 2:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) == 1
    finally:
        process.kill()
    status = run.status()
    assert (status.state, status.exit_status) == ("preempted", 75) and status.reason.startswith(number.name)
    assert find_checkpoint(run.run_dir).step == status.step >= 2
