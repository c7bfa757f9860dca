"""How a process ends: what its errors mean, what it records, and that it does end."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from nvembed_mcore import run_lock
from nvembed_mcore.attempts import Attempt, next_folder
from nvembed_mcore.cli import main
from nvembed_mcore.config import ConfigError, DataConfig, DatasetConfig, ModelConfig, RunConfig
from nvembed_mcore.data.faults import DataError
from nvembed_mcore.exits import Exit, Preempted, StorageError, exit_of
from nvembed_mcore.run_lock import RunInUseError
from nvembed_mcore.status import read_status
from nvembed_mcore.stop import StopRequests


def config_of(folder) -> RunConfig:
    data = DataConfig(tokenizer="tokenizer", datasets=[DatasetConfig(path="train.jsonl")])
    return RunConfig(run_dir=str(folder), steps=10, batch_size=4, data=data, model=ModelConfig(config="model"))


def attempt_that_ends_with(error: BaseException | None, folder, loop: bool = True) -> None:
    attempt = Attempt(config_of(folder), started=0.0)
    with attempt:
        attempt.begin(next_folder(folder), {})
        if loop:
            attempt.starts_the_loop(2)
            with attempt.does("productive", 3):
                pass
        if error is not None:
            raise error


def test_one_attempt_at_a_time(tmp_path, monkeypatch):
    """The second start waits a little, then ends with 70 and leaves the record of the first one alone."""
    first = Attempt(config_of(tmp_path), started=0.0)
    first.begin(first.take(), {})
    monkeypatch.setattr(run_lock.lock, "__defaults__", (0.3,))
    status = (tmp_path / "status.json").read_bytes()
    with pytest.raises(RunInUseError) as caught, Attempt(config_of(tmp_path), started=0.0) as second:
        second.take()
    assert exit_of(caught.value) == Exit.CRASHED
    assert f"in use by host {socket.gethostname()}, pid {os.getpid()};" in str(caught.value)
    with pytest.raises(ConfigError), Attempt(config_of(tmp_path), started=0.0):
        raise ConfigError("refused before it looks")
    assert (tmp_path / "status.json").read_bytes() == status
    with first:
        pass
    with Attempt(config_of(tmp_path), started=0.0) as third:
        third.begin(third.take(), {})
    assert read_status(tmp_path).attempt == 2


@pytest.mark.parametrize(
    ("error", "at_start", "in_the_loop"),
    [
        (ConfigError("a"), 78, 78),
        (DataError("a"), 78, 78),
        (FileNotFoundError("a"), 78, 74),
        (ValueError("of a library"), 78, 70),
        (OSError(errno.ENOSPC, "full"), 74, 74),
        (StorageError("a"), 74, 74),
        (ConnectionResetError("a"), 70, 70),
        (TimeoutError("a"), 70, 70),
        (RuntimeError("a"), 70, 70),
        (MemoryError(), 70, 70),
        (KeyboardInterrupt(), 130, 130),
        (Preempted(3, "SIGTERM on rank 0"), 75, 75),
    ],
)
def test_what_an_error_means(tmp_path, error, at_start, in_the_loop):
    assert exit_of(error) == at_start
    with pytest.raises(type(error)):
        attempt_that_ends_with(error, tmp_path)
    assert exit_of(error) == in_the_loop == read_status(tmp_path).exit_status


def test_a_run_that_saves_nothing_does_not_say_that_it_goes_on():
    assert str(Preempted(3, "a")) == "stopped after step 3: a; the same command goes on"
    assert "takes these steps again" in str(Preempted(3, "a", is_saved=False))


STATES = {
    DataError("a"): "data_error",
    ConfigError("a"): "config_error",
    StorageError("a"): "storage_error",
    Preempted(3, "a"): "preempted",
    KeyboardInterrupt(): "interrupted",
    RuntimeError("a"): "crashed",
}


@pytest.mark.parametrize("error", STATES, ids=STATES.values())
def test_the_state_of_a_run_has_a_word(tmp_path, error):
    with pytest.raises(type(error)):
        attempt_that_ends_with(error, tmp_path)
    assert read_status(tmp_path).state == STATES[error]


def test_the_first_failure_stands_and_the_others_take_its_status(tmp_path, monkeypatch):
    first, second = Attempt(config_of(tmp_path), 0.0), None
    monkeypatch.setenv("RANK", "1")
    second = Attempt(config_of(tmp_path), 0.0)
    folder = next_folder(tmp_path)
    first.begin(folder, {})
    second.begin(folder, {})
    with pytest.raises(StorageError), second:
        raise StorageError("the disk of rank 1")
    cascade = RuntimeError("Connection closed by peer [127.0.0.1]:1234")
    with pytest.raises(RuntimeError), first:
        raise cascade
    assert exit_of(cascade) == Exit.STORAGE
    assert cascade.follows.startswith("rank 1 on ")
    assert cascade.follows.endswith("failed first, in the start: StorageError: the disk of rank 1")
    failure = json.loads((folder / "first-failure.json").read_text())
    assert (failure["rank"], failure["exit_status"], failure["pid"]) == (1, 74, os.getpid())
    assert (read_status(tmp_path).state, read_status(tmp_path).exit_status) == ("storage_error", 74)
    assert json.loads((tmp_path / "run.json").read_text())["attempts"][0]["state"] == "storage_error"


@pytest.mark.parametrize(("text", "killed"), [("Connection closed by peer [127.0.0.1]:1", True), ("no number", False)])
def test_a_rank_that_was_killed_leaves_no_word_of_its_own(tmp_path, text, killed):
    with pytest.raises(RuntimeError):
        attempt_that_ends_with(RuntimeError(text), tmp_path)
    failure = json.loads((tmp_path / "logs" / "0001" / "first-failure.json").read_text())
    assert ("another rank went away before" in failure["hint"]) == killed
    assert failure["operation"] == "after step 3"


def test_a_damaged_status_refuses_no_start(tmp_path):
    (tmp_path / "status.json").write_text("{")
    (tmp_path / "run.json").write_text("{")
    attempt_that_ends_with(None, tmp_path)
    assert read_status(tmp_path).state == "done"


def test_an_attempt_has_a_folder_of_its_own(tmp_path):
    assert [next_folder(tmp_path / "run").name for _ in range(3)] == ["0001", "0002", "0003"]
    (tmp_path / "run" / "logs" / "0002").rmdir()
    assert next_folder(tmp_path / "run").name == "0004"


def test_what_was_refused_before_it_began_makes_no_folder_but_tells_in_one(tmp_path):
    with pytest.raises(ConfigError), Attempt(config_of(tmp_path / "new"), 0.0):
        raise ConfigError("no")
    assert not (tmp_path / "new").exists()
    attempt_that_ends_with(None, tmp_path)
    assert read_status(tmp_path).state == "done"
    with pytest.raises(ConfigError), Attempt(config_of(tmp_path), 0.0):
        raise ConfigError("no")
    status = read_status(tmp_path)
    assert (status.state, status.reason, status.step, status.attempt) == ("config_error", "ConfigError: no", 3, 2)


def test_status_in_words_and_one_field(tmp_path, capsys):
    assert main(["status", str(tmp_path)]) == 78
    assert "no status.json" in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        attempt_that_ends_with(RuntimeError("boom"), tmp_path)
    assert main(["status", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "crashed: RuntimeError: boom (exit status 70)"
    assert said[1] == "step 3 of 10, 12 queries seen; newest checkpoint: step 2"
    assert said[2].startswith("attempt 1, told by ")
    assert said[3] == "the first failure: logs/0001/first-failure.json"
    for field, value in {"state": "crashed", "exit_status": "70", "checkpoint_step": "2"}.items():
        assert main(["status", str(tmp_path), "--field", field]) == 0
        assert capsys.readouterr().out == value + "\n"
    (tmp_path / "status.json").write_text("{")
    assert main(["status", str(tmp_path)]) == 78


def test_every_key_of_the_status_has_a_line(tmp_path):
    """So that `sed` can read it."""
    attempt_that_ends_with(None, tmp_path)
    lines = (tmp_path / "status.json").read_text().splitlines()
    assert ' "state": "done",' in lines and ' "exit_status": 0,' in lines and len(lines) == 14


def test_signals_only_set_a_flag_until_the_end():
    before, of_terminal = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGINT)
    with StopRequests() as stops:
        with stops:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stops.signal == "SIGUSR1"
        assert signal.getsignal(signal.SIGINT) is of_terminal
    assert signal.getsignal(signal.SIGUSR1) == before


def test_another_thread_than_the_first_installs_nothing():
    before = signal.getsignal(signal.SIGTERM)
    inside = []

    def enter() -> None:
        with StopRequests():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert inside == [before]


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_a_crash_ends_with_70_and_one_line_though_leaving_takes_for_ever(tmp_path):
    code = f"""
import tempfile
tempfile.tempdir = {str(tmp_path)!r}
import sys, threading, types
from nvembed_mcore import cli
cli.LEAVING_SECONDS = 0.2
sys.modules["nvembed_mcore.parallel.groups"] = types.SimpleNamespace(shutdown=threading.Event().wait)
cli.train = lambda *arguments: 1 / 0
sys.exit(cli.main(["train"]))
"""
    done = run_python(code)
    assert done.returncode == 70
    (trace,) = tmp_path.iterdir()
    assert done.stderr == (
        f"nvembed: error: internal: ZeroDivisionError: division by zero (its trace: {trace}, or again with --debug)\n"
    )
    assert trace.read_text().endswith("in <lambda>\nZeroDivisionError: division by zero\n")
    assert trace.stat().st_mode & 0o077 == 0


def test_a_failure_to_leave_does_not_hide_the_error():
    code = """
import sys, types
from nvembed_mcore import cli
from nvembed_mcore.exits import StorageError
def shutdown():
    raise RuntimeError("a dead rank")
def train(*arguments):
    raise StorageError("the disk")
sys.modules["nvembed_mcore.parallel.groups"] = types.SimpleNamespace(shutdown=shutdown)
cli.train = train
sys.exit(cli.main(["train"]))
"""
    done = run_python(code)
    assert done.returncode == 74
    assert done.stderr == "nvembed: error: the disk\n"


def test_a_signal_at_the_very_end_does_not_change_the_status():
    code = """
import atexit, os, signal, sys
from nvembed_mcore import cli
atexit.register(os.kill, os.getpid(), signal.SIGTERM)
cli.train = lambda *arguments: 75
sys.argv = ["nvembed", "train"]
sys.exit(cli.main())
"""
    assert run_python(code).returncode == 75
