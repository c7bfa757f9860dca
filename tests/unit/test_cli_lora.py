"""Adapters through the command line: a run, its PEFT folder, what it may be resumed with, and what is refused."""

from __future__ import annotations

import json

import pytest

from nvembed_mcore.cli import main
from nvembed_mcore.log import close_logging
from tests.helpers import runs
from tests.unit.test_cli import message_of, write_yaml


@pytest.fixture(autouse=True)
def no_handlers_left():
    yield
    close_logging()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The YAML file and the folder of a run whose adapters were asked for on the command line."""
    root = tmp_path_factory.mktemp("lora")
    path = write_yaml(runs.write_inputs(root), root / "run", {"eval.path": None})
    options = ["--model.lora.rank", "4", "--model.lora.targets", "[q, v]", "--steps", "2"]
    assert main(["train", str(path), *options]) == 0
    close_logging()
    return path, root / "run", options


def test_what_was_trained_goes_out(finished, tmp_path, capsys):
    _, run_dir, _ = finished
    assert main(["export-hf", str(run_dir), str(tmp_path / "adapters"), "--format", "peft"]) == 0
    settings = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert settings["r"] == 4 and settings["target_modules"] == ["q_proj", "v_proj"]
    assert settings["base_model_name_or_path"] is None, "it began with random weights"
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "adapters"), "--json", str(tmp_path / "found.json")]) == 0
    assert "PEFT adapters" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())["parameters"]
    assert found["adapters"] == 4 * 4 * ((32 + 64) + (32 + 16)) and found["head"] > 0
    assert main(["export-hf", str(run_dir), str(tmp_path / "merged")]) == 0
    assert main(["inspect", str(run_dir)]) == 0
    message = message_of(capsys, ["export-hf", str(run_dir), str(tmp_path / "adapters"), "--format", "peft"])
    assert f"{tmp_path / 'adapters'} exists" in message


def test_a_resumed_run_keeps_its_adapters(finished, capsys):
    path, _, options = finished
    other = ["--model.lora.rank", "4", "--model.lora.targets", "[v, q]", "--steps", "2"]
    assert main(["train", str(path), *other]) == 0, "the order of targets means nothing"
    close_logging()
    for change, shown in (
        (["--model.lora.rank", "5"], "model.lora.rank: 4 -> 5"),
        (["--model.lora.rank", "0"], "model.lora: {'alpha': 32.0"),
        (["--model.lora.dropout", "0"], "model.lora.dropout: 0.1 -> 0.0"),
    ):
        message = message_of(capsys, ["train", str(path), *options, *change])
        assert "saved -> now" in message and shown in message


def test_bad_values_are_named(finished, tmp_path, capsys):
    path, run_dir, options = finished
    new = [*options, "--run_dir", str(tmp_path / "new")]
    for change, shown in (
        (["--model.lora.rank", "-1"], "model.lora.rank must not be negative, got -1"),
        (["--model.lora.dropout", "1.5"], "model.lora.dropout must be from 0 to below 1, got 1.5"),
        (["--model.lora.targets", "[q, zz]"], "zz"),
        (["--model.lora.init_from", str(tmp_path / "none")], f"no PEFT folder at {tmp_path / 'none'}"),
    ):
        assert shown in message_of(capsys, ["train", str(path), *new, *change])
    main(["train", str(path), "--steps", "1", "--run_dir", str(tmp_path / "full")])
    close_logging()
    message = message_of(capsys, ["export-hf", str(tmp_path / "full"), str(tmp_path / "out"), "--format", "peft"])
    assert "no adapters (model.lora.rank is 0)" in message and not (tmp_path / "out").exists()
