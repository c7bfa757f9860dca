"""Runs with trackers, as Weights & Biases reads them back."""

from __future__ import annotations

import dataclasses
import html
import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

from nvembed_mcore.config import LogConfig, OptimConfig, WandbConfig
from nvembed_mcore.log import read_metrics
from nvembed_mcore.resume import plain
from tests.helpers import pages, runs, tracking

pytestmark = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is missing (extra `track`)")

PAGE = "docs/how-to/tracking.md"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return runs.write_inputs(tmp_path_factory.mktemp("inputs"), with_words=True)


def config_of(inputs: Path, folder: Path, mode: str, **changes):
    log = LogConfig(progress=False, tensorboard=False, wandb=WandbConfig(mode=mode, project="tests"))
    return runs.run_config(inputs, folder, log=log, **changes)


@pytest.fixture(scope="module")
def offline(world, inputs, tmp_path_factory):
    """A run that was stopped after five steps and went on: its folder, and what was said of trackers."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    config = config_of(inputs, folder, "online")
    variables = {"WANDB_MODE": "offline", "WANDB_API_KEY": tracking.KEY}
    (result,) = world(1).run(tracking.train_tracked, [dataclasses.replace(config, stop_at=5), config], variables)
    return folder, result


def parts_of(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("*run-*"), key=lambda one: (one.stat().st_mtime_ns, one.name))


def test_wandb_has_the_numbers_and_the_configuration(offline):
    folder, result = offline
    assert result["served"] and all("offline" in words for words in result["said"])
    (identity,) = {one.stem.removeprefix("run-") for one in folder.glob("wandb/*/*.wandb")}
    assert (folder / "wandb" / "id").read_text() == identity + "\n"
    first, second = (tracking.records_of(part) for part in parts_of(folder))
    history, begun = [], []
    for records in (first, second):
        begun += [one["run"] for one in records if one["type"] == "run"]
        history += [one["history"]["item"] for one in records if one["type"] == "history"]
        assert records[-1]["exit"]["exit_code"] == 0
    expected = [
        {"step": line["step"]}
        | {f"{'train' if 'loss' in line else 'eval'}/{name}": line[name] for name in line if name != "step"}
        for line in read_metrics(folder / "metrics.jsonl")
    ]
    found = [{name: value for name, value in item.items() if not name.startswith("_")} for item in history]
    # What is stopped at step 5 is evaluated there, and the file has that once.
    assert found == expected and [line["step"] for line in found] == [0, 1, 2, 3, 4, 4, 5, 5, 6, 7, 8, 8]
    assert [one.get("resume", False) for one in begun] == [False, True]
    for one in begun:
        assert (one["run_id"], one["project"], one["display_name"]) == (identity, "tests", "first")
        assert one["config"]["update"]["optim"]["lr"] == 2e-3
        assert one["config"]["update"]["data"]["datasets"][0]["instruction"] == "Find it"


def test_wandb_has_neither_secrets_nor_the_machines_own(offline):
    folder, _ = offline
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in files)
    for file in files:
        assert b"CANARY" not in file.read_bytes(), file
        assert file.name not in ("requirements.txt", "wandb-metadata.json", "output.log", "diff.patch")


def test_a_server_that_is_down_costs_nothing_but_the_server(world, inputs, tmp_path):
    config = config_of(inputs, tmp_path / "run", "online", steps=2, optim=OptimConfig(lr=1e-3))
    with tracking.broken_server() as (address, asked):
        variables = {"WANDB_BASE_URL": address, "WANDB_API_KEY": tracking.KEY}
        (result,) = world(1).run(tracking.train_tracked, [config], variables, seconds=1.0)
    assert asked and result["served"]
    assert "goes on offline" in result["said"][0] and tracking.KEY not in str(result["said"])
    (part,) = [one for one in parts_of(tmp_path / "run") if one.name.startswith("offline-")]
    assert sum(one["type"] == "history" for one in tracking.records_of(part)) == 4


def test_the_commands_of_the_page_and_their_report(world, inputs, tmp_path):
    """The page has the numbers of the files, and what differs."""
    config = config_of(inputs, tmp_path / "runs" / "stage1", "off", steps=4)
    tree = plain(config) | {"run_dir": "runs/stage1"}
    (tmp_path / "stage1.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    tested = [one.text for one in pages.blocks(PAGE) if one.tested_by == ("tests/distributed/test_tracking.py",)]
    assert world(1).run(tracking.run_commands, "".join(tested).splitlines(), tmp_path) == [[0, 0, 0]]
    assert len(parts_of(tmp_path / "runs" / "stage1")) == 1 and not (tmp_path / "runs" / "other" / "wandb").exists()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    drawn = [json.loads(html.unescape(one))["curves"] for one in re.findall('data-curves="(.*?)"', page)]
    for curve, name in ((drawn[0], "loss"), (drawn[2], "ndcg_at_10")):
        for (number, steps, values), run in zip(curve, ("stage1", "other"), strict=True):
            lines = [one for one in read_metrics(tmp_path / "runs" / run / "metrics.jsonl") if name in one]
            assert steps == [one["step"] for one in lines], number
            assert values == pytest.approx([one[name] for one in lines], rel=1e-5)
    section = page.partition("What differs")[2].partition("<h2>")[0]
    cells = re.findall("<tr><td>(.*?)</tr>", section)
    assert [re.findall(r"[^<>]+(?=<)", f">{row}<")[0] for row in cells] == ["optim.lr", "log.wandb.mode"]
    assert "0.002" in cells[0] and "4.0e-05" in cells[0] and "offline" in cells[1]


def test_a_run_without_it_does_not_start_it(world, inputs, tmp_path):
    (result,) = world(1).run(tracking.train_tracked, [config_of(inputs, tmp_path / "run", "off", steps=1)], {})
    assert result == {"said": [], "served": False}
    assert not (tmp_path / "run" / "wandb").exists()
