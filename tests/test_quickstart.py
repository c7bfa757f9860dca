"""The quick start through its own script, with few steps and one package."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(
    not (ROOT / ".venv" / "bin" / "python").exists(), reason="run.sh makes .venv: run tools/test.sh, which has it"
)
def test_quickstart_script(tmp_path):
    output = tmp_path / "quickstart"
    few = ["--stage1-steps", "4", "--stage2-steps", "2", "--held-out", "60", "--packages", "numpy"]
    command = ["bash", "examples/quickstart/run.sh", "--output", str(output), *few]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((output / "summary.json").read_text())
    for row in ("untrained", "stage1", "stage2", "bm25"):
        for metric in ("ndcg_at_10", "recall_at_10", "recall_at_100", "mrr_at_10"):
            assert 0 <= summary[row][metric] <= 1
    assert summary["bm25"]["ndcg_at_10"] > summary["untrained"]["ndcg_at_10"]
    assert summary["tokens_per_second"] > 0
    assert 0 <= summary["pad_fraction"] < 0.02
    assert summary["peak_memory_gb"] > 0.1
    assert (Path(summary["export_dir"]) / "model.safetensors").is_file()
    assert (output / "training.png").stat().st_size > 10_000
    assert "differ by at most" in done.stdout.replace("\n", " ")
    assert "to the last digit" in done.stdout.replace("\n", " ")
