"""Weights & Biases in a process of its own, and what the tracker does where wandb does not."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nvembed_mcore import trackers
from nvembed_mcore.config import ConfigError, LogConfig, WandbConfig
from nvembed_mcore.exits import Exit
from nvembed_mcore.trackers import WeightsAndBiases, check_installed
from tests.helpers.tracking import KEY, broken_server, records_of

has_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is missing (extra `track`)")

PROGRAM = """
import sys
from pathlib import Path
from nvembed_mcore.config import WandbConfig
from nvembed_mcore.exits import Exit
from nvembed_mcore.trackers import WeightsAndBiases
tracker = WeightsAndBiases(Path(sys.argv[1]), WandbConfig(mode=sys.argv[2]), {"optim": {"lr": 0.5}}, 0)
tracker.log(1, {"train/loss": 0.25})
tracker.close(Exit.PREEMPTED)
assert not {"torch", "megatron"} & sys.modules.keys()
"""


@has_wandb
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_run_that_is_offline_asks_nobody(tmp_path, mode):
    """Nor one without a login. What wandb reports of itself it would send at the end of its process."""
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    key = {"WANDB_API_KEY": KEY} if mode == "offline" else {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    with broken_server() as (address, asked):
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), address)
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path), mode],
            env=environment | proxies | key | {"WANDB_BASE_URL": address, "PYTHONPATH": os.getcwd()},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    assert asked == [] and ("nobody is logged in" in done.stderr) == (mode == "online")
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    records = records_of(folder)
    (line,) = [one["history"]["item"] for one in records if one["type"] == "history"]
    assert (line["step"], line["train/loss"]) == (1, 0.25)
    assert records[-1]["exit"]["exit_code"] == Exit.PREEMPTED and any(one["type"] == "preempting" for one in records)


class Run:
    """A run of wandb that keeps what it gets, and fails or stands still when it is told to."""

    id, offline, url = "abcd1234", True, None

    def __init__(self, error=None, stands=None):
        self.error, self.stands, self.lines, self.exit_code = error, stands, [], None
        self.has_begun = threading.Event()

    def define_metric(self, *names, **how):
        pass

    def log(self, line):
        self.has_begun.set()
        if self.error:
            raise self.error
        if self.stands:
            self.stands.wait(20)
        self.lines.append(line)

    def finish(self, exit_code):
        self.exit_code = exit_code


def tracker_of(monkeypatch, run):
    monkeypatch.setattr(trackers, "_start", lambda *arguments: run)
    return WeightsAndBiases(Path("run"), WandbConfig(mode="online"), {}, 0)


def test_what_fails_in_wandb_ends_there(monkeypatch, caplog):
    caplog.set_level("WARNING")
    tracker = tracker_of(monkeypatch, Run(error=RuntimeError("gone")))
    for step in range(1, 4):
        tracker.log(step, {"train/loss": 1.0})
    tracker.close(Exit.DONE)
    tracker.log(5, {"train/loss": 1.0})
    assert caplog.messages == ["no more numbers go to Weights & Biases; metrics.jsonl has them: RuntimeError('gone')"]


def test_a_run_does_not_wait_for_wandb(monkeypatch, caplog):
    caplog.set_level("WARNING")
    monkeypatch.setattr(trackers, "_MOST_WAITING", 3)
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 0.05)
    run = Run(stands=threading.Event())
    tracker = tracker_of(monkeypatch, run)
    for step in range(1, 9):
        tracker.log(step, {"train/loss": 1.0})
        assert run.has_begun.wait(20)
    tracker.close(Exit.DONE)
    run.stands.set()
    assert [re.sub("since step .*|within .*", "", words) for words in caplog.messages] == [
        "Weights & Biases takes no more numbers ",
        "Weights & Biases is not done ",
    ]
    assert len(run.lines) <= 4 and run.exit_code is None


def test_the_id_of_a_damaged_file_is_not_taken(tmp_path, caplog):
    file = tmp_path / "wandb" / "id"
    assert trackers._read_id(file) is None and caplog.messages == []
    new = trackers._new_id(file)
    assert trackers._read_id(file) == new and new != trackers._new_id(file)
    file.write_bytes(b"../../\xff\n")
    assert trackers._read_id(file) is None and "holds no id" in caplog.messages[0]


def test_wandb_that_is_missing_is_refused_before_the_run(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_installed(LogConfig())
    with pytest.raises(ConfigError, match=r"log\.wandb\.mode is 'offline', but wandb is not installed: pip install"):
        check_installed(LogConfig(wandb=WandbConfig(mode="offline")))


def test_empty_names_are_refused():
    for name in ("project", "entity", "name"):
        with pytest.raises(ConfigError, match=f"log.wandb.{name} must not be empty"):
            WandbConfig(**{name: ""})
