"""The comparison of step times over gloo: what it makes of a table whose seconds are known."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools" / "scaling"))  # its programs import one another, as they do when they are run

import validate_seconds  # noqa: E402
from study_spec import read_study  # noqa: E402

from nvembed_mcore.scaling import hardware  # noqa: E402

TRUE = {"matmul_share": 0.5, "memory_share": 0.3, "host_layer": 0.0008, "host_step": 0.02}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The study's points with seconds that the model has with other constants than its own."""
    monkeypatch.chdir(ROOT)
    file = tmp_path / "cpu.csv"
    monkeypatch.setattr(validate_seconds, "TABLE", file)
    points = read_study(validate_seconds.STUDY).points()
    write(file, [(point.name, "cached" if point.layout["pp"] > 1 else "single", 1.0) for point in points])
    cluster = hardware.cluster("cpu").with_constants(**TRUE)
    found = validate_seconds.measured()
    write(file, [(one.name, one.layout.way, one.predicted(cluster)) for one in found])
    return file


def write(file: Path, rows: list[tuple[str, str, float]]) -> None:
    with open(file, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["row", "point", "way", "seconds", "spread"])
        writer.writerows(["point", name, way, seconds, 0.1] for name, way, seconds in rows)


def test_constants_of_one_process_tell_the_times_of_two(table, capsys):
    figures = validate_seconds.report()
    assert figures["median_error_seconds"] < 0.05 and figures["median_error_seconds_fitted"] < 0.02
    assert figures["median_spread_seconds"] == pytest.approx(0.1) and figures["rows_seconds"] == 10
    printed = capsys.readouterr().out
    assert printed.count("tested on") == 10 and printed.count("fitted on") == 4 and "host_layer" in printed


def test_points_of_another_study_are_refused(table):
    write(table, [("weak-gpus1-tp1pp1-q8-00000000", "single", 1.0)])
    with pytest.raises(ValueError, match="which .*cpu.yaml does not describe"):
        validate_seconds.measured()


def test_what_was_fitted_is_stored_with_its_range(table, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "FOLDER", shutil.copytree(hardware.FOLDER, tmp_path / "hardware"))
    validate_seconds.fit_and_store()
    stored = hardware.constants("fitted_cpu")
    assert stored.host_step.low < stored.host_step.value < stored.host_step.high
    assert stored.host_step.value == pytest.approx(TRUE["host_step"], rel=0.5)
    hardware.cluster.cache_clear()  # other tests know the constants of the project
