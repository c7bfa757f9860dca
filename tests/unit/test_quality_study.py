"""The quality study's plan, its resuming and its fits (tools/scaling/quality*.py)."""

from __future__ import annotations

import json

import numpy as np
import pytest

from nvembed_mcore.config import DatasetConfig, LossConfig, OptimConfig
from nvembed_mcore.run_lock import lock
from tools.scaling import quality
from tools.scaling.quality_fit import FORMS, fit, levels_of, seed_deviation, summary
from tools.scaling.quality_plot import plot
from tools.scaling.quality_points import AXES, NEGATIVES, Folders, Run, deal, plan, rows_of, runs_of, tree_of


@pytest.fixture
def folders(tmp_path):
    quickstart = tmp_path / "quickstart"
    (quickstart / "data").mkdir(parents=True)
    lines = [json.dumps({"query": f"q{i}", "pos": [f"d{i}"]}) for i in range(1000)]
    (quickstart / "data" / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (quickstart / "data" / "statistics.json").write_text("{}", encoding="utf-8")
    return Folders(tmp_path / "study", quickstart)


def result_of(run: Run, score: float, identity: str = "") -> dict:
    steps = run.steps(1000)
    scores = dict.fromkeys(("recall_at_10", "recall_at_100", "mrr_at_10"), 0.5) | {"ndcg_at_10": score}
    lines = [{"step": step + 1, "loss": 1.0, "real_tokens": 10 * run.batch, "seconds": 0.5} for step in range(steps)]
    evaluations = [{"step": 0, **scores}, {"step": steps, **scores}]
    return {"evaluations": evaluations, "lines": lines, "parameters": 7, "identity": identity}


def test_each_run_is_trained_once_and_seed_by_seed():
    seeds = dict.fromkeys(AXES, 2) | {"tokens": 1}
    runs = plan(AXES, seeds)
    assert len(runs) == len(set(runs))
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert {run for axis in AXES for seed in range(1, seeds[axis] + 1) for run in runs_of(axis, seed)} == set(runs)
    # The middle point of several axes is one run.
    assert Run() in runs_of("negatives", 1) and Run() in runs_of("tokens", 1)


def test_axes_hold_equal_what_they_say():
    records = 16384
    assert [run.negatives for run in runs_of("negatives", 1)] == [number - 1 for number in NEGATIVES]
    assert {run.steps(records) * run.batch for run in runs_of("negatives", 1)} == {8 * records}
    assert {run.steps(records) for run in runs_of("negatives_equal_steps", 1)} == {32}
    alone = runs_of("negatives_alone", 1)
    assert [run.negatives for run in alone] == [15, 63, 255, 2047]
    assert len({(run.batch, run.lr, run.steps(records)) for run in alone}) == 1
    assert {run.steps(records) * run.batch for run in runs_of("width", 1)} == {records}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 96}, "width must be a multiple of 64 from 64 on, got 96"),
        ({"batch": 8, "parts": 8}, "a batch of 8 in 8 parts leaves a query without negatives"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"passes": -1}, "passes must be above 0, got -1"),
    ],
)
def test_bad_values_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Run(**wrong)


def test_records_in_parts_are_the_records(folders):
    deal(folders, 8)
    dealt = [path.read_text(encoding="utf-8").splitlines() for path in folders.parts(8)]
    assert {len(lines) for lines in dealt} == {125}
    whole = folders.records.read_text(encoding="utf-8").splitlines()
    assert [lines[0] for lines in dealt] == whole[:8]
    assert sorted(sum(dealt, [])) == sorted(whole)


def test_the_configuration_is_one_that_the_trainer_reads(folders):
    tree = tree_of(Run(batch=32, parts=4, temperature=0.02), folders, 1000)
    assert tree["steps"] == 250
    assert tree["optim"]["warmup_steps"] == 25
    assert OptimConfig(**tree["optim"]).lr == pytest.approx(8e-3 / 8**0.5)
    assert OptimConfig(**tree_of(Run(batch=4096, rate=2), folders, 1000)["optim"]).lr == pytest.approx(16e-3)
    assert LossConfig(**tree["loss"]).in_batch_from == "dataset"
    assert len([DatasetConfig(**one) for one in tree["data"]["datasets"]]) == 4


def test_what_is_finished_or_taken_is_not_trained_again(folders, monkeypatch):
    trained = []
    monkeypatch.setattr(quality, "_train", lambda run, _: trained.append(run))
    done, taken, new = Run(), Run(seed=2), Run(seed=3)
    folders.run(done).mkdir(parents=True)
    identity = quality.identity_of(done, folders, quality._architecture(done))
    (folders.run(done) / "result.json").write_text(json.dumps(result_of(done, 0.2, identity)), encoding="utf-8")
    claim = folders.output / "claims" / taken.name
    claim.mkdir(parents=True)
    with lock(claim):
        for run in (done, taken, new):
            quality.train(run, folders)
    assert trained == [new]
    (folders.run(done) / "result.json").write_text(json.dumps(result_of(done, 0.2, "other")), encoding="utf-8")
    with pytest.raises(ValueError, match=f"configuration other, this study's would be {identity}"):
        quality.train(done, folders)


@pytest.mark.parametrize(
    ("form", "parameters"),
    [
        ("log", {"a": 0.1, "b": 0.02}),
        ("power", {"limit": 0.4, "a": 1.5, "exponent": 0.6}),
        ("parabola", {"best": 300.0, "top": 0.3, "curvature": 0.01}),
    ],
)
def test_known_curves_are_found(form, parameters):
    x = np.array([64.0, 128, 256, 512, 1024, 4096])
    y = FORMS[form].curve(x, parameters)
    random = np.random.default_rng(1)
    found = fit([(at, [*(value + random.normal(0, 1e-3, 3))]) for at, value in zip(x, y, strict=True)], "negatives")
    assert found.form == form
    assert found.parameters == pytest.approx(parameters, rel=0.15)
    assert all(found.low[name] <= value <= found.high[name] for name, value in found.parameters.items())
    assert found.residual < 1e-3
    low, high = found.band(x)
    assert ((low <= found.curve(x)) & (found.curve(x) <= high)).all()


def test_points_that_cannot_be_fitted():
    assert fit([(1.0, [0.1]), (2.0, [0.2])], "width") is None
    alone = fit([(1.0, [0.1]), (2.0, [0.2]), (4.0, [0.3])], "width")
    assert alone.form == "log" and alone.low == {} and alone.band(np.ones(1)) is None
    with pytest.raises(ValueError, match="x above 0"):
        fit([(0.0, [0.1]), (2.0, [0.2]), (3.0, [0.3])], "width")


def test_a_curve_that_the_points_do_not_bear_says_so():
    """And where more is better no form with a best value is tried, though it would be nearer."""
    x = [64.0, 128.0, 256.0, 512.0, 1024.0]
    peaked = [
        (at, [0.3 - 0.02 * abs(place - 2) ** 2 + 0.001 * seed for seed in range(3)]) for place, at in enumerate(x)
    ]
    assert fit(peaked, "negatives").form == "parabola" and fit(peaked, "negatives").is_borne
    assert fit(peaked, "tokens").form != "parabola" and not fit(peaked, "tokens").is_borne
    valley = [(at, [-y for y in values]) for at, values in peaked]
    assert fit(valley, "negatives").form != "parabola"


def test_table_figures_and_plots(tmp_path):
    """Runs on two axes count on both; a missing run leaves the others."""
    seeds = dict.fromkeys(AXES, 2)
    runs = [run for run in plan(AXES, seeds) if run.batch <= 4096]
    found = {run: result_of(run, 0.1 + 0.01 * np.log2(run.batch) + 0.001 * run.seed) for run in runs}
    rows = [*rows_of(AXES, seeds, found)]
    levels = levels_of(rows, "negatives")
    assert [x for x, _ in levels] == [63, 255, 1023, 4095]
    assert seed_deviation(levels) == pytest.approx(0.001 / 2**0.5)
    figures = summary(rows)
    assert figures["ndcg_of_negatives_255"] == pytest.approx(0.1815)
    assert figures["b_of_negatives_low"] <= figures["b_of_negatives"] <= figures["b_of_negatives_high"]
    assert {row["axis"] for row in rows} == {*AXES, "tokens_on_the_way"}
    plot([row for row in rows if row["axis"] == "negatives"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["quality-negatives.png"]
