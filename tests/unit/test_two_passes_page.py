"""The example of docs/how-to/adversarial-and-r-drop.md, as it stands: its files and its commands."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from nvembed_mcore.cli import main
from tests.helpers.pages import ROOT, blocks

PAGE = "docs/how-to/adversarial-and-r-drop.md"


@pytest.mark.slow
def test_the_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for block in blocks(PAGE):
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
    (commands,) = [block.text.splitlines() for block in blocks(PAGE) if block.language == "bash"]
    for command in commands:
        words = shlex.split(command)
        quiet = ["--log.progress", "false"] if words[1] == "train" else []
        assert main([*words[1:], *quiet]) == 0, command
    own = {"moved_loss", "r_drop_divergence"}
    for run, terms in (("both", own), ("fgm", {"moved_loss"})):
        lines = [json.loads(line) for line in Path("runs", run, "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert all({*line} & own == terms for line in lines), run
        clean = [
            line["loss"] - line.get("moved_loss", 0.0) - 0.5 * line.get("r_drop_divergence", 0.0) for line in lines
        ]
        assert clean[-1] < clean[0]
