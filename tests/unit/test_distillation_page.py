"""The example of docs/how-to/distillation.md, as it stands: its files and its commands."""

from __future__ import annotations

import json
import shlex

import pytest

from nvembed_mcore.cli import main
from nvembed_mcore.data.records import read_records
from tests.helpers.pages import ROOT, blocks

PAGE = "docs/how-to/distillation.md"


@pytest.mark.slow
def test_the_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    found = blocks(PAGE)
    for block in found:
        if block.file:
            (tmp_path / block.file).write_text(block.text, encoding="utf-8")
    commands = [line for block in found if block.tested_by for line in block.text.splitlines()]
    assert len(commands) == 7
    for command in commands:
        words = shlex.split(command, comments=True)
        assert words[0] == "nvembed"
        quiet = ["--log.progress", "false"] if words[1] == "train" else []
        assert main([*words[1:], *quiet]) == 0, command
    assert "a teacher's scores of 8 of 8 records" in capsys.readouterr().out
    mined, scored = (list(read_records(tmp_path / name)) for name in ("mined/records.jsonl", "scored.jsonl"))
    assert len(scored) == 8 and all(len(one.neg_scores) == 4 for one in scored)
    for one, other in zip(mined, scored, strict=True):
        assert max(abs(a - b) for a, b in zip(one.neg_scores, other.neg_scores, strict=True)) < 1e-5
    lines = [json.loads(line) for line in (tmp_path / "runs/student/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 6 and lines[-1]["teacher_divergence"] < lines[0]["teacher_divergence"]
    assert list((tmp_path / "student").glob("*.safetensors"))
    without = (tmp_path / "student.yaml").read_text().replace("scored.jsonl", "faq.csv").replace("runs/", "other/")
    (tmp_path / "without.yaml").write_text(without)
    assert main(["train", "without.yaml"]) != 0
    assert "faq.csv:2:1: pos_scores is missing" in capsys.readouterr().err
