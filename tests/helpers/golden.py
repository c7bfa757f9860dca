"""The golden run: 30 steps of a tiny configuration, from records to losses, whose numbers are kept in a file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from nvembed_mcore.log import read_metrics
from nvembed_mcore.train import train
from tests.helpers import runs

FILE = Path(__file__).parents[1] / "golden" / "train.json"
STEPS = 30


def run_golden(folder: Path) -> dict[str, list[float]]:
    """Train in `folder` on the ranks that call this; loss and gradient norm of each step."""
    inputs = folder / "inputs"
    inputs.mkdir(parents=True)
    config = runs.run_config(runs.write_inputs(inputs), folder / "run", steps=STEPS)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, path=None))
    train(config)
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    return {name: [line[name] for line in lines] for name in ("loss", "grad_norm")}


def read_golden() -> dict[str, list[float]]:
    return json.loads(FILE.read_text(encoding="utf-8"))
