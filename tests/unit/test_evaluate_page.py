"""The commands of docs/how-to/evaluate-while-training.md, on a run of a few steps in place of the tutorial's."""

from __future__ import annotations

import dataclasses
import json
import shlex

import yaml

from nvembed_mcore.cli import main
from nvembed_mcore.config import CheckpointConfig, EvalConfig, PoolingConfig
from nvembed_mcore.log import read_metrics
from nvembed_mcore.resume import plain
from tests.helpers import pages, runs

PAGE = "docs/how-to/evaluate-while-training.md"


def test_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    inputs = runs.write_inputs(tmp_path / "inputs", with_words=True)
    (tmp_path / "data").mkdir()
    (inputs / "beir").rename(tmp_path / "data" / "heldout")
    config = runs.run_config(inputs, tmp_path / "unused", steps=2, batch_size=4, eval=EvalConfig())
    pooled = dataclasses.replace(config.model, pooling=PoolingConfig(kind="mean"))
    config = dataclasses.replace(config, model=pooled, checkpoint=CheckpointConfig(every_steps=1))
    tree = plain(config)
    del tree["eval"], tree["optim"]["ema_decay"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    found = pages.blocks(PAGE)
    for block in found:
        if block.file:
            (tmp_path / block.file).write_text(
                block.text.replace("every_steps: 20", "every_steps: 1"), encoding="utf-8"
            )
    lines = [
        shlex.split(line, comments=True) for block in found if block.tested_by for line in block.text.splitlines()
    ]
    for name, *arguments in lines:
        assert name == "nvembed" and main(arguments) == 0, arguments
    said = capsys.readouterr().out
    best = json.loads((tmp_path / "runs/evaluated/checkpoints/best").read_text(encoding="utf-8"))
    assert f"best: step {best['step']} ({best['value']:.4f})" in said and best["metric"] == "heldout/ndcg_at_10"
    assert "weights averaged, decay" in said and (tmp_path / "best" / "model.safetensors").is_file()
    evaluations = [line for line in read_metrics("runs/evaluated/metrics.jsonl") if "loss" not in line]
    assert [line["step"] for line in evaluations] == [0, 1, 2]
    assert evaluations[0].keys() >= {"ndcg_at_10", "heldout/ndcg_at_10", "without-instruction/mrr_at_10"}
