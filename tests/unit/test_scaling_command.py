"""`nvembed plan`: its screen, its JSON, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from nvembed_mcore.cli import main
from nvembed_mcore.exits import Exit
from nvembed_mcore.scaling.lengths import Lengths

RECIPES = Path(__file__).parents[2] / "examples/recipes"
STAGES = [str(RECIPES / f"nv_embed_v1/stage{stage}.yaml") for stage in (1, 2)]
MISTRAL = ["--architecture", str(RECIPES / "mistral_7b_v0_1.json")]


@pytest.fixture(autouse=True)
def texts(monkeypatch):
    """Queries of 30 tokens, each with a positive and seven negatives of 105."""

    def sampled(config, path):
        queries = config.batch_size
        owner = np.concatenate([np.arange(queries), np.repeat(np.arange(queries), 8)])
        tokens = np.where(np.arange(9 * queries) < queries, 30, 105)
        positive = (np.arange(9 * queries) >= queries) & (np.arange(9 * queries) % 8 == 0)
        return Lengths(tokens[None], owner[None], positive[None], "texts of a test")

    monkeypatch.setattr("nvembed_mcore.scaling.lengths.sample_lengths", sampled)


def test_a_plan_shows_layouts_terms_memory_and_money(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert main(["plan", STAGES[0], "--gpus", "8", *MISTRAL, "--price", "2.5", "--explain", "--json", str(file)]) == 0
    screen = capsys.readouterr().out
    for words in ("111,360 tokens a step, 20,000 steps", "texts of a test", "as configured", "where", "the fastest:"):
        assert words in screen
    found = json.loads(file.read_text())
    (plan,) = found["stages"][0]["plans"]
    fastest = plan["layouts"][0]
    assert f"{fastest['seconds']:.3f}" in screen and f"{fastest['tokens_per_second_per_gpu']:,.0f}" in screen
    assert fastest["dollars"] == pytest.approx(2.5 * fastest["gpu_hours"])
    assert fastest["gpu_hours"] == pytest.approx(fastest["seconds"] * 20000 * 8 / 3600)
    assert sum(fastest["seconds_by_term"].values()) == pytest.approx(fastest["seconds"])
    assert f"{sum(fastest['memory'].values()) / 1e9:.1f}" in screen
    assert plan["as_configured"]["layout"]["tp"] == 2
    assert "6 T L (2 A d H + 2 G d H + 3 F H)" in screen and "matmul_share" in screen and "nvlink4" in screen


def test_stages_of_a_recipe_are_added(tmp_path, capsys):
    file = tmp_path / "plan.json"
    fields = ["--step.tokens_per_microbatch", "4096"]
    assert main(["plan", *STAGES, "--gpus", "1,2", *MISTRAL, "--top", "1", "--json", str(file), *fields]) == 0
    found = json.loads(file.read_text())
    hours = [sum(stage["plans"][n]["layouts"][0]["gpu_hours"] for stage in found["stages"]) for n in (0, 1)]
    screen = capsys.readouterr().out.partition("all 2 stages")[2]
    assert all(f" {number:,.0f} " in screen for number in hours)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpus", "8"], "give a configuration before its fields"),
        ([STAGES[0], "--gpus", "8"], "no config.json is. Give the backbone's with --architecture"),
        ([STAGES[0], "--gpus", "8", *MISTRAL, "--device", "h300"], "no device 'h300'; there are a100"),
        ([STAGES[0], "--gpus", "8", *MISTRAL, "--batch_size", "0"], "batch_size must be at least 1"),
        (["absent.yaml", "--gpus", "8"], "no configuration file at absent.yaml"),
        ([*STAGES, "--gpus", "8", *MISTRAL, "--dry-run"], "--dry-run builds one configuration"),
        ([STAGES[0], "--gpus", "8", *MISTRAL, "--dry-run", "--device", "h300"], "no device 'h300'; there are a100"),
        ([STAGES[0], "--gpus", "8", *MISTRAL, "--ranks", "0"], "--ranks chooses what --dry-run builds"),
    ],
)
def test_what_cannot_work_ends_with_what_to_mend(arguments, says, capsys):
    assert main(["plan", *arguments]) == Exit.CONFIGURATION
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--gpus", "0", "must be a whole number of at least 1, got '0'"),
        ("--gpus", "8,x", "must be a whole number of at least 1, got 'x'"),
        ("--gpus", "", "must be a whole number of at least 1, got ''"),
        ("--top", "0", "must be a whole number of at least 1, got '0'"),
        ("--price", "-3", "must be a number of dollars, 0 or more, got '-3'"),
        ("--price", "nan", "must be a number of dollars, 0 or more, got 'nan'"),
        ("--price", "cheap", "must be a number of dollars, 0 or more, got 'cheap'"),
    ],
)
def test_options_that_are_no_numbers_are_refused(option, value, says, capsys):
    with pytest.raises(SystemExit):
        main(["plan", STAGES[0], "--gpus", "8", option, value])
    assert f"{option}: {says}" in capsys.readouterr().err


def test_on_a_narrow_screen_no_figure_is_cut(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["plan", STAGES[0], "--gpus", "8", *MISTRAL, "--price", "2.5", "--explain", "--device", "H200"]) == 0
    screen = capsys.readouterr().out
    rows = [line for line in screen.splitlines() if re.match(r" [1248]  [1248] ", line)]
    assert len(rows) == 6 and max(map(len, rows)) <= 100
    assert "…" not in screen


def test_a_run_is_not_told_to_take_one_pack_in_every_step(capsys):
    """A batch of longer texts would end it."""
    assert main(["plan", STAGES[0], "--gpus", "64", *MISTRAL, "--top", "1"]) == 0
    screen = capsys.readouterr().out
    assert " single " in screen and "--step.way auto" in screen and "--step.way single" not in screen
