"""The example of docs/data.md, as it stands: its files and its commands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from nvembed_mcore.cli import main

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+) ?([\w.]*)(?:\{[^}\n]*\})?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_example(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").partition("## What a path may be")[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    blocks = BLOCK.findall(page)
    files = {name: content for _, name, content in blocks if name}
    assert set(files) == {"faq.csv", "stage1.yaml", "stage2.yaml", "answers.txt"}
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    commands = [line for kind, _, content in blocks if kind == "bash" for line in content.splitlines()]
    assert len(commands) == 8
    for command in commands:
        words = shlex.split(command, comments=True)
        assert words[0] == "nvembed"
        quiet = ["--log.progress", "false"] if words[1] == "train" else []
        assert main([*words[1:], *quiet]) == 0, command
    assert "A run may start; no warnings." in capsys.readouterr().out
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("check.html", "mined/report.html"))
    mined = [json.loads(line) for line in (tmp_path / "mined" / "records.jsonl").read_text().splitlines()]
    assert len(mined) == 12 and sum(len(record["neg"]) for record in mined) >= 12
    assert all(record["pos"][0] not in record["neg"] for record in mined)
    lines = [json.loads(line) for line in (tmp_path / "runs" / "faq2" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    vectors = np.load(tmp_path / "vectors" / "shard-00000.npy")
    assert vectors.shape == (3, 128) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
