"""A small scaling study on this machine: runs over one and two processes, one that was removed, one that fails."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import yaml

from nvembed_mcore.train import train
from tests.helpers import chromium
from tests.helpers.runs import run_config, write_config, write_inputs

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "scaling" / "study.py"
sys.path.append(str(TOOL.parent))  # its programs import one another, as they do when they are run

from study_runs import prepare, runs_of  # noqa: E402
from study_spec import read_study  # noqa: E402


def write_study(folder: Path, **changes) -> Path:
    """A study of a tiny run: data parallelism over one and two processes, and texts that are made."""
    inputs = write_inputs(folder / "inputs", with_words=True)
    base = write_config(run_config(inputs, folder / "base"))
    series = {
        "name": "weak scaling",
        "weak": 4,
        "gpus": [1, 2],
        "layouts": [{"tp": 1}, {"tp": 2}],
        "lengths": [{"queries": 12, "documents": 24, "synthetic": True}],
    }
    tree = {
        "name": "a small study",
        "output": str(folder / "output"),
        "base": str(base),
        "cluster": "cpu",
        "gpus_per_node": 2,
        "warmup_steps": 1,
        "steps": 3,
        "communication_every": 3,
        "repeats": 1,
        "series": [series],
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(tree | changes, sort_keys=False), encoding="utf-8")
    return file


pytestmark = pytest.mark.slow  # every run of the suite has a study under SLURM (tests/reliability/test_slurm.py)


@pytest.fixture(scope="module")
def done(tmp_path_factory, world):
    """The folder of a study, and what its program said. Before it, all runs were made in this session's processes;
    then that over two data-parallel ranks was removed, and a series added that cannot work."""
    folder = tmp_path_factory.mktemp("study")
    file = write_study(folder)
    study = read_study(file)
    configs = prepare(study)
    for run in runs_of(study):
        world(run.point.gpus).run(train, configs[run.point.name], timeout_seconds=60)
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    broken = {"name": "no tokens", "batch": 4, "gpus": 1, "set": {"data.tokenizer": "nowhere"}}
    file.write_text(yaml.safe_dump(tree | {"series": [*tree["series"], broken]}), encoding="utf-8")
    (removed,) = [run for run in runs_of(study) if run.point.layout["tp"] == 1 and run.point.gpus == 2]
    shutil.rmtree(removed.folder)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOL), "run", str(file), "--json", str(folder / "figures.json")]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170)
    return folder, study, removed, said


def test_only_what_is_missing_runs(done):
    folder, study, removed, said = done
    assert "4 runs, 2 of them complete" in said.stderr, said.stderr
    assert f"1 of 2: {removed.point.name}, repeat 1: " in said.stderr
    assert removed.is_complete() and (removed.folder.with_suffix(".log")).exists()
    assert not (removed.folder / "checkpoints").exists(), "nothing is saved"
    others = [run for run in runs_of(study) if run != removed]
    assert not any(run.log.exists() for run in others), "they ran in this session alone"


def test_a_run_that_fails_is_named_and_stops_no_other(done):
    folder, _, _, said = done
    assert said.returncode == 1
    assert "2 of 2: no-tokens-gpus1-tp1pp1-q4-" in said.stderr and "FAILED (status 78)" in said.stderr
    page = (folder / "output" / "report.html").read_text(encoding="utf-8")
    assert "Runs that failed" in page and page.count("nowhere") >= 2


def test_the_table_is_tidy(done):
    folder, study, _, _ = done
    rows = parquet.read_table(folder / "output" / "table.parquet").to_pylist()
    with open(folder / "output" / "table.csv", newline="", encoding="utf-8") as file:
        assert [row["point"] for row in csv.DictReader(file)] == [row["point"] for row in rows]
    points = {(row["gpus"], row["tp"]): row for row in rows if row["row"] == "point"}
    assert set(points) == {(1, 1), (2, 1), (2, 2)} and len(rows) == 6
    for (gpus, tp), row in points.items():
        assert (row["dp"], row["queries"], row["steps"], row["dtype"]) == (gpus // tp, 4 * gpus, 3, "float32")
        # Three negatives a query at most; every text is as long as its limit.
        assert row["texts"] == 4 * gpus * 4 and row["real_tokens"] == 4 * gpus * (12 + 3 * 24)
        assert row["tokens_per_second_per_gpu"] == pytest.approx(row["tokens_per_second"] / gpus)
        assert 0 < row["seconds"] <= row["seconds_p95"] and 0 < row["fill"] <= 1
        assert 0 < row["model_memory_bytes"] < row["memory_bytes"] and row["mfu"] is None
        assert row["predicted_seconds_low"] < row["predicted_seconds"] < row["predicted_seconds_high"]
        assert (row["torch"], row["device"]) == (points[1, 1]["torch"], "cpu")
    base = points[1, 1]
    assert base["efficiency"] == 1 and base["communication_share"] == 0
    data, tensor = points[2, 1], points[2, 2]
    assert data["efficiency"] == pytest.approx(data["tokens_per_second_per_gpu"] / base["tokens_per_second_per_gpu"])
    assert 0 < data["communication_seconds_data"] and 0 < data["communication_share"] < 1
    assert 0 < tensor["communication_seconds_tensor"] and tensor["bytes_tensor"] > 0
    assert base["way"] == "retain" and data["bytes_data"] > 0
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    assert (figures["points"], figures["runs"], figures["runs_complete"], figures["runs_failed"]) == (3, 4, 3, 1)
    assert figures[f"{base['point']}_seconds"] == base["seconds"]


def test_the_report_opens_in_a_browser(done, tmp_path):
    folder, _, _, _ = done
    shown = chromium.show(folder / "output" / "report.html", tmp_path)
    assert shown.errors == []
    titles = ["Tokens a second", "Efficiency", "Seconds by phase", "Memory", "Prediction and measurement"]
    assert list(shown.images) == titles and all(width > 600 for width in shown.images.values())
    names = ("scaling", "efficiency", "phases", "memory", "prediction")
    assert {file.name for file in (folder / "output").glob("*.png")} == {f"{name}.png" for name in names}
