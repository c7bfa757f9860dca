"""The checkpoint of the best evaluation stays beyond `checkpoint.keep`, whatever interrupts the run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from nvembed_mcore import train as training
from nvembed_mcore.checkpoint import folders, store
from nvembed_mcore.checkpoint.best import Best, read_best
from nvembed_mcore.cli import main
from nvembed_mcore.config import CheckpointConfig, EvalConfig
from nvembed_mcore.log import read_metrics
from nvembed_mcore.status import read_status
from nvembed_mcore.train import train
from tests.helpers import runs

# Of each evaluation; that of step 0 is no step's, and that of step 6 is not better than that of step 4.
VALUES = {0: 0.9, 2: 0.3, 4: 0.8, 6: 0.8, 8: 0.7, 10: 0.1}
KEPT = ["best", "latest", "step-00000004", "step-00000009", "step-00000010"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return runs.write_inputs(tmp_path_factory.mktemp("inputs"), with_words=True)


@pytest.fixture(autouse=True)
def told_values(monkeypatch):
    """Evaluations find what `VALUES` says; returns those that were made."""
    asked = []

    def evaluate(run) -> dict[str, float]:
        asked.append(run.done)
        return {"ndcg_at_10": VALUES[run.done], "mrr_at_10": run.done / 10}

    monkeypatch.setattr(training._Run, "evaluate", evaluate)
    return asked


def configured(inputs: Path, run_dir: Path, metric: str = "ndcg_at_10", **checkpoint):
    """Ten steps that save every third and are evaluated every other one."""
    config = runs.run_config(inputs, run_dir, steps=10, batch_size=4)
    return dataclasses.replace(
        config,
        checkpoint=CheckpointConfig(**{"every_steps": 3, "keep": 2, **checkpoint}),
        eval=EvalConfig(path=str(inputs / "beir"), every_steps=2, metric=metric),
    )


def left_by(run_dir: Path) -> tuple[list[str], Best, list[dict]]:
    """The files of `checkpoints/`, what the pointer says, and the lines of evaluations."""
    root = folders.folder_of(run_dir)
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if "loss" not in line]
    return sorted(path.name for path in root.iterdir()), read_best(root), lines


@pytest.mark.parametrize("is_async", [False, True])
def test_the_best_is_saved_when_it_is_found_and_stays(inputs, tmp_path, is_async):
    train(configured(inputs, tmp_path, async_save=is_async))
    kept, best, lines = left_by(tmp_path)
    assert kept == KEPT
    assert (best.step, best.metric, best.value) == (4, "ndcg_at_10", 0.8)
    assert [line["step"] for line in lines] == [*VALUES]
    assert store.find_checkpoint(folders.folder_of(tmp_path) / "best").step == 4
    assert store.find_checkpoint(tmp_path).step == 10
    status = read_status(tmp_path)
    assert (status.checkpoint_step, status.best_step, status.best_value) == (10, 4, 0.8)


@pytest.mark.parametrize("point", ["before_publish", "before_pointer", "after_pointer"])
def test_an_interrupted_save_of_the_best_changes_nothing(inputs, tmp_path, monkeypatch, told_values, point):
    """At each of these the process is gone between two of: the folder, the name of the best, that of the newest, the
    line of the log."""
    monkeypatch.setenv("NVEMBED_FAULT", f"error@{point}:0:4")
    with pytest.raises(RuntimeError, match=point):
        train(configured(inputs, tmp_path))
    assert (read_best(folders.folder_of(tmp_path)).step == 4) == (point != "before_publish")
    assert store.find_checkpoint(tmp_path).step == (4 if point == "after_pointer" else 3)
    del told_values[:]
    train(configured(inputs, tmp_path))
    assert told_values == [4, 6, 8, 10]
    kept, best, lines = left_by(tmp_path)
    assert kept == KEPT and (best.step, best.value) == (4, 0.8)
    assert [line["step"] for line in lines] == [*VALUES]


def test_a_step_that_was_saved_before_its_evaluation_may_be_the_best(inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(VALUES, 10, 0.95)
    (tmp_path / "STOP").parent.mkdir(exist_ok=True)
    advance = training._Run.advance

    def stops_at_the_end(run):
        if run.done == 9:
            (tmp_path / "STOP").touch()
        return advance(run)

    monkeypatch.setattr(training._Run, "advance", stops_at_the_end)
    train(configured(inputs, tmp_path))
    kept, best, _ = left_by(tmp_path)
    assert best.step == 10 and kept == ["best", "latest", "step-00000009", "step-00000010"]


def test_another_metric_or_test_set_begins_anew(inputs, tmp_path):
    train(dataclasses.replace(configured(inputs, tmp_path), stop_at=6))
    assert read_best(folders.folder_of(tmp_path)).step == 4
    train(configured(inputs, tmp_path, metric="mrr_at_10"))
    best = read_best(folders.folder_of(tmp_path))
    assert (best.step, best.metric, best.value) == (10, "mrr_at_10", 1.0)
    assert not Best(1, "a", 0.5, "x").beats(Best(2, "a", 0.5, "x"))
    assert Best(1, "a", 0.5, "y").beats(Best(2, "a", 0.6, "x"))


@pytest.mark.parametrize("changes", [dict(keep_best=False), dict(every_steps=0)], ids=str)
def test_nothing_is_kept_where_nothing_is_to_be(inputs, tmp_path, changes):
    train(configured(inputs, tmp_path, **changes))
    assert not (folders.folder_of(tmp_path) / "best").exists()
    assert (folders.step_folders(folders.folder_of(tmp_path)) != []) == ("every_steps" not in changes)


def test_commands_know_the_best(inputs, tmp_path, capsys):
    train(configured(inputs, tmp_path / "run"))
    for arguments, words in (
        (["status", tmp_path / "run"], "newest checkpoint: step 10, best: step 4 (0.8000)"),
        (["status", tmp_path / "run", "--field", "best_step"], "4\n"),
        (["inspect", tmp_path / "run" / "checkpoints" / "best"], "step 4, ndcg_at_10 0.8000"),
        (["export-hf", tmp_path / "run", tmp_path / "export", "--best"], f"exported to {tmp_path / 'export'}"),
    ):
        assert main([*map(str, arguments)]) == 0
        assert words in capsys.readouterr().out
    assert "| step | 4 |" in (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    # What the pointer says is judged before it is used.
    pointer = tmp_path / "run" / "checkpoints" / "best"
    pointer.write_text(json.dumps({"step": "../../x", "metric": "a", "value": 1.0, "test_sets": ""}))
    assert main(["export-hf", str(tmp_path / "run"), str(tmp_path / "other"), "--best"]) == 78
    assert "no complete checkpoint in" in capsys.readouterr().err
