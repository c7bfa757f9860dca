"""The figures made by plan (tools/scaling/figures.py), mostly from predictions that are written here."""

from __future__ import annotations

import csv
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from nvembed_mcore.scaling.layout import Layout
from nvembed_mcore.scaling.plan import Plan, Rejected
from nvembed_mcore.scaling.predict import Prediction
from tools.scaling.figures import (
    GPUS,
    Scenario,
    add_efficiency,
    answers,
    columns,
    ends,
    scenarios,
    why,
    write_csv,
)
from tools.scaling.figures_plot import draw


def prediction(gpus: int, seconds: float, sequences: int) -> Prediction:
    return Prediction(
        layout=Layout(gpus=gpus, tp=2, way="retain"),
        balance=SimpleNamespace(microbatches=2),
        memory={"weights": 14e9, "activations": 30e9},
        memory_limit=139e9,
        seconds={"matmul": 0.8 * seconds, "host": 0.2 * seconds},
        total=seconds,
        low=0.9 * seconds,
        high=1.2 * seconds,
        tokens=100.0 * sequences,
        flops=1e15,
        peak=1e15 * gpus,
    )


def row_of(one: Scenario, gpus: int, seconds: float) -> dict:
    kind = {name: getattr(one, name) for name in ("study", "stage", "weights", "precision", "queries")}
    return kind | {"gpus": gpus} | columns(prediction(gpus, seconds, 9 * one.queries))


def test_every_scenario_is_asked_once_and_keeps_what_its_study_keeps():
    found = [*scenarios()]
    assert len(set(found)) == len(found)
    assert {one.queries for one in found if one.study == "strong"} == {128}
    assert {one.queries / one.gpus[0] for one in found if one.study == "weak"} == {16}
    config, workload = Scenario("strong", 2, "full", "FP8", 128, (8, 64)).work()
    assert (config.stage, config.batch_size, config.model.adapters, config.precision.fp8) == (
        2,
        128,
        None,
        "tensorwise",
    )
    assert np.count_nonzero(workload.lengths[0]) == 1152


def test_a_weak_scenario_keeps_the_layout_of_the_fewest_gpus():
    kind = [Scenario("weak", 1, "LoRA", "BF16", 16 * gpus, (gpus,)) for gpus in (8, 16)]
    first, second = answers(kind, "h200")
    assert 0 < first["seconds"] < 1.1 * second["seconds"]
    assert second["layout"] == replace(first["layout"], gpus=16)
    assert first["fits"]
    assert not columns(replace(prediction(8, 1.0, 9), memory={"activations": 140e9}))["fits"]


def test_efficiency_is_that_of_the_same_kind_and_ends_at_half(tmp_path):
    scenario = Scenario("strong", 1, "LoRA", "BF16", 128, (8, 16, 32))
    times = {8: 8.0, 16: 5.0, 32: 4.5}
    rows = [row_of(scenario, gpus, seconds) for gpus, seconds in times.items()]
    nothing = Plan(64, [], [Rejected(Layout(gpus=64), "too many ranks")], "too many ranks")
    rows.append({**rows[0], "gpus": 64, "why": why(nothing)})
    del rows[-1]["seconds"]
    add_efficiency(rows)
    assert [row.get("efficiency") for row in rows] == [1.0, pytest.approx(0.8), pytest.approx(8 / 4.5 / 4), None]
    assert ends(rows) == {"end_of_strong_stage1_LoRA_BF16": 16}
    assert rows[-1]["why"] == "too many ranks"
    write_csv(rows, tmp_path / "plan.csv")
    with (tmp_path / "plan.csv").open(encoding="utf-8", newline="") as file:
        table = [*csv.DictReader(file)]
    assert table[1]["seconds"] == "5" and table[1]["t_host"] == "1" and table[3]["seconds"] == ""


def test_all_plots_are_drawn(tmp_path):
    rows = [row_of(one, gpus, 100 / gpus + 0.05) for one in scenarios(GPUS[3:7:2])
            for gpus in one.gpus]  # fmt: skip
    add_efficiency(rows)
    draw(rows, tmp_path)
    names = ["plan-efficiency", "plan-memory", "plan-strong", "plan-terms", "plan-weak"]
    assert sorted(path.stem for path in tmp_path.iterdir()) == names
    assert all(path.stat().st_size > 20_000 for path in tmp_path.iterdir())
