"""Step times that others published, predicted with constants of another family of models."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def published():
    sys.path.insert(0, str(ROOT / "tools/scaling"))
    try:
        yield importlib.import_module("validate_published")
    finally:
        sys.path.remove(str(ROOT / "tools/scaling"))


def test_other_families_are_predicted_within_seven_per_cent(published):
    rows = published.read_rows()
    found = published.errors(rows, {})
    others = [row for row in rows if row.family != published.FITTED_FAMILY]
    figures = published.summary(rows, found)
    assert figures["rows_published"] == len(others) >= 20
    assert {min(row.layout.gpus for row in rows), max(row.layout.gpus for row in rows)} == {8, 4608}
    assert figures["median_error_published"] <= 0.07
    assert figures["max_error_published"] <= 0.25


def test_every_published_run_has_its_source_and_splits_evenly(published):
    for row in published.read_rows():
        assert len(row.source) > 20 and row.published > 0
        assert row.packs * row.layout.dp * row.microbatch == row.sequences
        # Interleaved stages need a multiple of their number.
        assert row.layout.chunks == 1 or row.packs % row.layout.pp == 0


def test_the_program_writes_its_figures(tmp_path):
    file = tmp_path / "validate.json"
    command = [sys.executable, "tools/scaling/validate.py", "--only", "published", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(ROOT)})
    assert json.loads(file.read_text())["median_error_published"] <= 0.07
    assert done.stdout.count(" s ") > 100 and "gpt3-177b" in done.stdout
