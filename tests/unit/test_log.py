"""Messages by rank, and `metrics.jsonl` across interruptions."""

from __future__ import annotations

import io
import json
import logging
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

from nvembed_mcore import progress
from nvembed_mcore.config import LogConfig
from nvembed_mcore.log import MetricLog, close_logging, read_metrics, setup_logging

QUIET = LogConfig(tensorboard=False, progress=False)


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restore_logging():
    yield
    close_logging()


@pytest.fixture
def said(caplog):
    """Messages of the package as one list of texts."""
    caplog.set_level(logging.INFO, logger="nvembed_mcore")
    return lambda: [record.getMessage() for record in caplog.records]


def metric_log(folder, config=QUIET, *, is_writer=True, total_steps=10, start_step=0, facts=None):
    return MetricLog(
        folder,
        config,
        is_writer=is_writer,
        total_steps=total_steps,
        start_step=start_step,
        description="stage 1",
        facts=facts,
    )


def test_rank_0_speaks_and_every_rank_keeps_a_file(tmp_path, capsys):
    for rank in (0, 1):
        logger = setup_logging(rank, tmp_path / "logs")
        logger.info("hello from %d", rank)
        logging.getLogger("nvembed_mcore.data").warning("careful %d", rank)
        logger.debug("unseen")
    error = capsys.readouterr().err
    assert "hello from 0" in error and "careful 0" in error
    assert "from 1" not in error and "careful 1" not in error and "unseen" not in error
    for rank in (0, 1):
        lines = (tmp_path / "logs" / f"rank-{rank}.log").read_text().splitlines()
        assert len(lines) == 2
        assert lines[0].endswith(f"INFO rank {rank} nvembed_mcore: hello from {rank}")


def test_setting_up_again_says_things_once(capsys):
    setup_logging(0)
    setup_logging(0).info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_a_long_message_stays_one_line_where_there_is_no_terminal(capsys):
    setup_logging(0).info("x" * 500)
    assert capsys.readouterr().err.count("\n") == 1


def test_lines_are_flat_exact_and_flushed(tmp_path):
    with metric_log(tmp_path) as metrics:
        metrics.log_eval(0, {"ndcg_at_10": 0.1 + 0.2})
        metrics.log(1, {"loss": torch.tensor(0.1), "step": 1, "lr": np.float32(0.5), "real_tokens": 7})
        text = (tmp_path / "metrics.jsonl").read_text()
    assert text == (
        '{"step": 0, "ndcg_at_10": 0.30000000000000004}\n'
        '{"step": 1, "loss": 0.10000000149011612, "lr": 0.5, "real_tokens": 7}\n'
    )


def steps_of(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_resume_leaves_one_line_a_step(tmp_path):
    with metric_log(tmp_path) as metrics:
        metrics.log_eval(0, {"ndcg_at_10": 0.0})
        for step in range(1, 8):
            metrics.log(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed in the middle of a line
    with metric_log(tmp_path, start_step=4) as metrics:
        for step in range(5, 11):
            metrics.log(step, {"loss": -float(step)})
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, *range(1, 11)]
    assert [line.get("loss") for line in lines] == [None, 1, 2, 3, 4, -5, -6, -7, -8, -9, -10]


def test_starting_over_replaces_the_file(tmp_path):
    for value in (0.25, 0.5):
        with metric_log(tmp_path) as metrics:
            metrics.log_eval(0, {"ndcg_at_10": value})
            metrics.log(1, {"loss": value})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "ndcg_at_10": 0.5}, {"step": 1, "loss": 0.5}]


def test_an_evaluation_done_again_replaces_the_first(tmp_path):
    with metric_log(tmp_path) as metrics:
        metrics.log(1, {"loss": 1.0})
        metrics.log_eval(1, {"ndcg_at_10": 0.25})
    with metric_log(tmp_path, start_step=1) as metrics:
        metrics.log_eval(1, {"ndcg_at_10": 0.5})
        metrics.log(2, {"loss": 2.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 1.0},
        {"step": 1, "ndcg_at_10": 0.5},
        {"step": 2, "loss": 2.0},
    ]


def test_other_ranks_do_nothing(tmp_path):
    with metric_log(tmp_path / "run", LogConfig(), is_writer=False) as metrics:
        metrics.log(1, {"loss": 1.0})
        metrics.log_eval(1, {"ndcg_at_10": 1.0})
    assert not (tmp_path / "run").exists()


def test_plain_progress_is_rare_and_ends_with_the_last_step(tmp_path, said, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with metric_log(tmp_path, LogConfig(tensorboard=False)) as metrics:
        metrics.log_eval(0, {"ndcg_at_10": 0.125})
        for step in range(1, 11):
            now[0] += 4.0
            metrics.log(step, {"loss": 2.0 / step, "tokens_per_second": 17000.4})
    assert said() == [
        "stage 1: 0/10 steps  nDCG@10 0.125",
        "stage 1: 3/10 steps  loss 0.6667  nDCG@10 0.125  17,000 tokens/s  ETA 0:00:28",
        "stage 1: 6/10 steps  loss 0.3333  nDCG@10 0.125  17,000 tokens/s  ETA 0:00:16",
        "stage 1: 9/10 steps  loss 0.2222  nDCG@10 0.125  17,000 tokens/s  ETA 0:00:04",
        "stage 1: 10/10 steps  loss 0.2000  nDCG@10 0.125  17,000 tokens/s",
    ]


def test_bar_on_a_terminal(tmp_path, monkeypatch):
    screen = Screen()
    monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=True, width=120))
    with metric_log(tmp_path, LogConfig(tensorboard=False)) as metrics:
        metrics.log(10, {"loss": 0.5, "tokens_per_second": 1234.0})
    for part in ("stage 1", "10/10", "loss 0.5000", "1,234 tokens/s"):
        assert part in screen.getvalue()


def test_pace_of_a_resumed_run_is_that_of_its_own_steps(tmp_path, said, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with metric_log(tmp_path, start_step=6) as metrics:
        now[0] += 30.0
        metrics.log(7, {"loss": 1.0})
    assert said() == ["stage 1: 7/10 steps  loss 1.0000  ETA 0:01:30"]


def test_lines_instead_of_a_bar_when_it_is_not_wanted(tmp_path, said, monkeypatch):
    screen = Screen()
    monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=True, width=120))
    with metric_log(tmp_path) as metrics:
        metrics.log(10, {"loss": 0.5})
    assert said() == ["stage 1: 10/10 steps  loss 0.5000"] and screen.getvalue() == ""


def test_the_file_is_complete_after_an_error(tmp_path, said):
    with pytest.raises(KeyboardInterrupt), metric_log(tmp_path, LogConfig(tensorboard=False)) as metrics:
        metrics.log(1, {"loss": 1.0})
        raise KeyboardInterrupt
    assert steps_of(tmp_path) == [1]


def test_tensorboard_has_the_same_numbers_and_the_configuration(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    facts = {"optim": {"lr": 0.5}}
    with metric_log(tmp_path, LogConfig(progress=False), facts=facts) as metrics:
        metrics.log_eval(0, {"ndcg_at_10": 0.25})
        for step in range(1, 6):
            metrics.log(step, {"loss": float(step)})
    with metric_log(tmp_path, LogConfig(progress=False), facts=facts, start_step=3) as metrics:
        metrics.log(4, {"loss": -4.0})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3), (4, -4)]
    assert [(event.step, event.value) for event in events.Scalars("eval/ndcg_at_10")] == [(0, 0.25)]
    texts = events.Tensors("config/text_summary")
    assert [(event.step, *event.tensor_proto.string_val) for event in texts] == [
        (0, b"    optim:\n      lr: 0.5\n"),
        (3, b"    optim:\n      lr: 0.5\n"),
    ]


def test_tensorboard_that_is_missing_is_named(tmp_path, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with metric_log(tmp_path, LogConfig(progress=False)) as metrics:
        metrics.log(1, {"loss": 1.0})
    assert "TensorBoard is not installed" in said()[0]
    assert steps_of(tmp_path) == [1]


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"loss": 1.0}'])
def test_a_damaged_file_is_named_with_its_line(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not"):
        read_metrics(tmp_path / "metrics.jsonl")
