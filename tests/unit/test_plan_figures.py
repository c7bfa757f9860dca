"""The figures made by plan (tools/scaling/figures.py), from answers of `nvembed plan` that are written here."""

from __future__ import annotations

import csv

import pytest

from tools.scaling.figures import GPUS, Scenario, add_efficiency, ends, row_of, scenarios, write_csv
from tools.scaling.figures_plot import draw


def answer(gpus: int, seconds: float, sequences: int) -> dict:
    layout = {"tp": 2, "pp": 1, "cp": 1, "dp": gpus // 2, "way": "retain", "tokens_per_microbatch": 8192}
    fastest = {
        "layout": layout,
        "seconds": seconds,
        "seconds_low": 0.9 * seconds,
        "seconds_high": 1.2 * seconds,
        "tokens_per_second_per_gpu": 100 * sequences / seconds / gpus,
        "mfu": 0.4,
        "microbatches": 2,
        "fullest_over_mean": 1.1,
        "seconds_by_term": {"matmul": 0.8 * seconds, "host": 0.2 * seconds},
        "memory": {"weights": 14e9, "activations": 30e9},
    }
    return {"gpus": gpus, "layouts": [fastest, {}], "rejected": []}


def test_every_scenario_is_asked_once_and_keeps_what_its_study_keeps():
    found = [*scenarios()]
    assert len({tuple(one.words) + (one.study,) for one in found}) == len(found)
    assert {one.queries for one in found if one.study == "strong"} == {128}
    assert {one.queries / one.gpus[0] for one in found if one.study == "weak"} == {16}
    words = Scenario("strong", 2, "full", "FP8", 128, (8, 64)).words
    assert words[1].endswith("nv_embed_v2/stage2.yaml")
    assert "--model.lora.rank 0 --precision.fp8 tensorwise" in " ".join(words)
    assert "--gpus 8,64" in " ".join(words)


def test_efficiency_is_that_of_the_same_kind_and_ends_at_half(tmp_path):
    scenario = Scenario("strong", 1, "LoRA", "BF16", 128, (8, 16, 32))
    times = {8: 8.0, 16: 5.0, 32: 4.5}
    rows = [row_of(scenario, answer(gpus, seconds, 1152)) for gpus, seconds in times.items()]
    nothing = {"gpus": 64, "layouts": [], "rejected": [{"reason": "too many ranks"}]}
    rows.append(row_of(scenario, nothing))
    add_efficiency(rows)
    assert [row.get("efficiency") for row in rows] == [1.0, pytest.approx(0.8), pytest.approx(8 / 4.5 / 4), None]
    assert ends(rows) == {"end_of_strong_stage1_LoRA_BF16": 16}
    assert rows[-1]["why"] == "too many ranks"
    write_csv(rows, tmp_path / "plan.csv")
    with (tmp_path / "plan.csv").open(encoding="utf-8", newline="") as file:
        table = [*csv.DictReader(file)]
    assert table[1]["seconds"] == "5" and table[1]["t_host"] == "1" and table[3]["seconds"] == ""


def test_all_plots_are_drawn(tmp_path):
    rows = [row_of(one, answer(gpus, 100 / gpus + 0.05, 9 * one.queries)) for one in scenarios(GPUS[3:7:2])
            for gpus in one.gpus]  # fmt: skip
    add_efficiency(rows)
    draw(rows, tmp_path)
    names = ["plan-efficiency", "plan-memory", "plan-strong", "plan-terms", "plan-weak"]
    assert sorted(path.stem for path in tmp_path.iterdir()) == names
    assert all(path.stat().st_size > 20_000 for path in tmp_path.iterdir())
