"""Quality beside sentence-transformers and beside the paper's tables (tools/bench/quality*.py): both trainers begin
alike, what is planned is what the tables name, and the tables say what the numbers say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from nvembed_mcore.cli.run_config import read_run_config
from tools.bench import quality
from tools.bench import quality_recipes as recipes
from tools.bench.quality_measure import MEASURES, topics_of
from tools.bench.quality_plot import plot_orders, plot_poolings, plot_side
from tools.bench.quality_recipes import Recipe, orders, poolings
from tools.bench.quality_runs import Study, done, keep
from tools.bench.quality_table import (
    PAPER_ORDERS,
    PAPER_POOLINGS,
    claims_table,
    mean_of,
    orders_table,
    paired,
    poolings_table,
    recipe_figures,
    side_figures,
    side_table,
)


def test_both_trainers_take_the_same_first_step(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    monkeypatch.setattr(
        "sys.argv", ["tools/bench/quality.py", str(tmp_path / "smoke"), "--smoke", "--json", str(path)]
    )
    quality.main()
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert figures["side_peer_first_loss_difference"] <= 1e-6
    assert figures["side_peer_first_norm_difference"] <= 1e-5
    assert figures["side_cached_loss_difference"] <= 1e-6 and figures["side_cached_steps"] == 1
    assert figures["side_peer_loss_difference_all_steps"] <= 1e-3
    assert 0 < figures["side_peer_weights_apart"] <= 1e-2
    # Again: nothing is trained, and what is too far apart is an error.
    monkeypatch.setattr(quality, "train_both", lambda pairing, study: quality.found_pairing(pairing, study))
    monkeypatch.setattr(quality, "SMOKE_BOUND", -1.0)
    with pytest.raises(SystemExit, match="the trainers begin differently"):
        quality.main()


def test_the_recipes_are_those_of_the_tables():
    assert {(one.pooling, one.mask) for one in poolings(1)} == set(PAPER_POOLINGS)
    assert {(one.taught, one.order) for one in orders(2)} == {(t, o) for t in (False, True) for o in PAPER_ORDERS}
    # The recipe of both tables is one run.
    assert {*poolings(3)} & {*orders(3)} == {Recipe(seed=3)}


def test_the_stages_are_what_the_recipe_says(tmp_path):
    trees = {one: recipes.trees(one, tmp_path / one.name, tmp_path) for one in [*poolings(2), *orders(2)]}
    for recipe, stages in trees.items():
        assert sum(one["steps"] for one in stages) == recipes.STEPS + recipes.TAUGHT_STEPS * recipe.taught
        assert [one["optim"]["lr"] for one in stages] == [recipes.RATES[0], *[recipes.RATES[1]] * (len(stages) - 1)]
        assert {one["model"]["pooling"]["kind"] for one in stages} == {recipe.pooling}
        begins = [one["model"].get("init_from") for one in stages]
        assert begins == [None, *[one["run_dir"] for one in stages[:-1]]]
    in_batch = {
        recipe.order: [[one["in_batch_negatives"] for one in tree["data"]["datasets"]] for tree in trees[recipe]]
        for recipe in trees
        if recipe in {*orders(2)} and not recipe.taught
    }
    alone, both = [False, False], [True, True]
    assert in_batch == {"one_in_batch": [both], "one_alone": [alone], "two_stages": [[True], alone],
                        "reversed": [alone, [True]]}  # fmt: skip


def test_a_stage_is_a_configuration_that_the_trainer_reads(tmp_path):
    recipe = Recipe(pooling="self_attention", mask="causal", seed=2)
    (tmp_path / "run.yaml").write_text(json.dumps(recipes.trees(recipe, tmp_path, tmp_path)[1]), encoding="utf-8")
    config = read_run_config([str(tmp_path / "run.yaml")])
    assert (config.model.pooling.kind, config.model.attention_mask) == ("self_attention", "causal")
    assert config.model.init_from == str(tmp_path / "stage1") and config.seed == config.stage == 2
    assert [one.uses_in_batch_negatives for one in config.data.datasets] == [False, False]


def test_a_docstring_has_the_topic_of_its_module():
    modules = {"a": "torch.nn.modules.linear", "b": "torch.nn.init", "c": "numpy.linalg", "d": "torch"}
    topics = {"torch.nn.modules", "torch.nn"}
    assert topics_of("abcde", modules, topics) == {"a": "torch.nn.modules", "b": "torch.nn"}


def test_a_result_of_another_configuration_is_refused(tmp_path):
    assert done(tmp_path, "one") is None
    keep(tmp_path, {"stages": []}, "one")
    assert done(tmp_path, "one") == {"stages": [], "identity": "one"}
    with pytest.raises(ValueError, match="is of a configuration one, this study's would be two"):
        done(tmp_path, "two")


def test_the_name_of_a_run_follows_its_data_and_not_its_place(tmp_path):
    names = []
    for place, statistics in (("a", "{}"), ("b", "{}"), ("c", '{"seed": 1}')):
        study = Study(tmp_path / place / "out", tmp_path / place / "qs")
        study.data.mkdir(parents=True)
        (study.data / "statistics.json").write_text(statistics, encoding="utf-8")
        names.append(study.identity([str(study.output), str(study.quickstart)]))
    assert names[0] == names[1] != names[2]


def test_means_have_the_interval_of_student():
    mean = mean_of([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1.0, 2.0, 4.0]))
    assert (mean.value - mean.half, mean.value + mean.half) == pytest.approx((low, high))
    assert mean.holds_zero and mean_of([0.5]).holds_zero and mean_of([0.5]).text() == "0.500"
    # Only seeds that both have; the pairing takes what seeds have in common out.
    difference = paired({1: 1.0, 2: 5.0, 3: 9.0, 4: 0.0}, {1: 0.9, 2: 4.9, 3: 8.9})
    assert (difference.value, difference.seeds) == (pytest.approx(0.1), 3) and not difference.holds_zero
    with pytest.raises(ValueError, match="at least one value"):
        mean_of([])


def recipe_results(seeds):
    """After each stage 0.5; latent is better by 0.1, causal worse by 0.2, the second stage better by 0.01."""
    found = {}
    for seed in seeds:
        for recipe in dict.fromkeys([*poolings(seed), *orders(seed)]):
            value = 0.5 + 0.1 * (recipe.pooling == "latent") - 0.2 * (recipe.mask == "causal") + 0.001 * seed
            value += 0.3 * recipe.taught
            stages = [dict.fromkeys(MEASURES, value + 0.01 * number) for number in range(len(recipe.stages))]
            found[recipe] = {"stages": stages}
    return found


def test_tables_of_the_recipes_say_what_was_measured(tmp_path):
    found = recipe_results([1, 2, 3])
    del found[Recipe(order="reversed", seed=1)], found[Recipe(order="reversed", seed=2)]
    figures = recipe_figures(found)
    assert figures["two_stages_latent_causal_stage1_ndcg_at_10_mean"] == pytest.approx(0.402)
    assert figures["two_stages_latent_causal_stage2_accuracy_mean"] == pytest.approx(0.412)
    assert figures["bidirectional_minus_causal_v_measure_mean"] == pytest.approx(0.2)
    assert figures["latent_minus_mean_ndcg_at_10_mean"] == pytest.approx(0.1)
    assert figures["two_stages_minus_reversed_ndcg_at_10_seeds"] == 1
    assert "| latent attention, causal | 0.402 ± 0.002 | 0.412 ± 0.002 |" in poolings_table(figures)
    taught = " | ".join(["0.922 ± 0.002"] * 3)
    assert f"| two stages, reversed | 0.613 | 0.613 | 0.613 | {taught} | 61.91 | 71.85 |" in orders_table(figures)
    table = claims_table(figures)
    assert "| latent attention - mean | **+0.100 ± 0.000** |" in table
    assert "| two stages - two stages, reversed | +0.000 |" in table
    assert "| two stages - one stage, without (after 100 steps of search) | **+0.010 ± 0.000** |" in table
    assert "| bidirectional - causal, mean of the poolings | **+0.200 ± 0.000** |" in table
    plot_poolings(found, tmp_path / "poolings.png")
    plot_orders(found, tmp_path / "stages.png")
    assert {path.name for path in tmp_path.iterdir()} == {"poolings.png", "stages.png"}


def test_what_was_not_run_is_not_in_the_tables():
    figures = recipe_figures({Recipe(): recipe_results([1])[Recipe()]})
    assert poolings_table(figures).count("not run") == 7 * 4 and orders_table(figures).count("not run") == 7 * 3
    assert not any("minus" in name for name in figures)


def side_result(seed):
    ours = np.linspace(5.0, 1.0, 30) + seed
    results = {
        "ours": {"losses": ours, "norms": ours, "seconds": 2.0, "tokens": 100},
        "peer": {"losses": ours * (1 + 1e-6 * np.arange(30)), "norms": ours * 1.001, "seconds": 6.0},
        "repacked": {"losses": ours, "norms": ours, "seconds": 3.0, "tokens": 100},
        "changed": {"peer": 0.01 * seed, "repacked": 0.02},
    }
    value = {"initial": 0.01, "ours": 0.3, "peer": 0.302 - 0.001 * seed, "repacked": 0.3}
    return results | {"quality": {name: dict.fromkeys(MEASURES[:3], one + seed) for name, one in value.items()}}


def test_figures_of_both_trainers(tmp_path):
    found = {seed: side_result(seed) for seed in (1, 2, 3)}
    figures = side_figures(found)
    assert figures["side_peer_first_loss_difference"] == 0
    assert figures["side_peer_loss_difference_10_steps"] == pytest.approx(9e-6, rel=1e-3)
    assert figures["side_peer_loss_difference_all_steps"] == pytest.approx(29e-6, rel=1e-3)
    assert figures["side_peer_first_norm_difference"] == pytest.approx(1e-3, rel=1e-2)
    assert figures["side_peer_weights_apart"] == pytest.approx(0.03)
    assert figures["side_ours_minus_peer_ndcg_at_10_mean"] == pytest.approx(0.0)
    assert figures["side_ours_minus_peer_ndcg_at_10_holds_zero"]
    assert figures["side_seed_deviation_ndcg_at_10"] == pytest.approx(1.0)
    assert "side_cached_steps" not in figures
    assert "| this trainer - smaller packs | +0.0000 ± 0.0000 |" in side_table(figures)
    plot_side(found, tmp_path / "side.png")
    assert (tmp_path / "side.png").stat().st_size > 10_000


def test_bad_seeds_end_the_program(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["quality.py", "out", "--seeds", "0"])
    with pytest.raises(SystemExit):
        quality.main()
    assert "--seeds must be at least 1, got 0" in capsys.readouterr().err
    assert not Path("out").exists()
