"""FGM and R-Drop beyond the proof grid: what they cost and what not, dropout, what cannot work, and their effects."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest

from nvembed_mcore.config import ConfigError, LossConfig, StepConfig
from tests.helpers import cases, effects, models, runs
from tests.helpers.cases import Case
from tests.helpers.grid import ALL_TARGETS, BOUND, EPSILON, LEARNED, R_DROP, budget_for
from tests.helpers.plain import run_plainly, training_batch


def forwards_of_a_step(case: Case) -> tuple[int, int, dict[str, float]]:
    """Forward passes of this rank's first chunk, its packs, and the terms of the loss."""
    from nvembed_mcore.metrics import PhaseTimer
    from nvembed_mcore.model.encoder import Encoder

    step, *_ = cases.build_step(case, **cases.dropping(0.1))
    honest, calls = Encoder.forward, []

    def counted(encoder, pack):
        calls.append(encoder)
        return honest(encoder, pack)

    with mock.patch.object(Encoder, "forward", counted):
        output = step(training_batch(case.queries, 1), 1, PhaseTimer())
    assert (step.adversary is None) == (case.fgm == 0) and step.chunks[0].module.behind_embedding is None
    return calls.count(step.chunks[0].module), output.num_microbatches, output.terms


@pytest.mark.parametrize(("way", "packs"), [("single", 1), ("retain", 3), ("cached", 3)])
def test_only_what_is_asked_for_is_embedded(world, way, packs):
    """As often as before where neither option is on; otherwise each walk, over packs that stand there twice."""
    budget = budget_for(packs, 1, 7) if packs > 1 else 100_000
    case = dict(way=way, budget=budget, distributed=False)
    again = packs - 1 if way == "cached" else 0
    assert world(1).run(forwards_of_a_step, Case(**case)) == [(packs + again, packs, {})]
    ((forwards, _, terms),) = world(1).run(forwards_of_a_step, Case(**case, fgm=EPSILON))
    assert forwards == 2 * (packs + again) and set(terms) == {"moved_loss"}
    if way != "single":
        ((forwards, _, terms),) = world(1).run(forwards_of_a_step, Case(**case, fgm=EPSILON, loss=R_DROP))
        again = 2 * packs - 1 if way == "cached" else 0
        assert forwards == 2 * (2 * packs + again) and set(terms) == {"moved_loss", "r_drop_divergence"}
        assert terms["r_drop_divergence"] > 1e-5, "the second embedding of a text drops something else"


@pytest.mark.parametrize("distributed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gradients_of_both_walks_are_reduced_once(world, distributed):
    case = Case(world=2, way="retain", budget=budget_for(3, 2, 7), distributed=distributed, overlap=True, fgm=EPSILON)
    for _, sizes, gradients in world(2).run(cases.step_traffic, case):
        found = sizes["reduce_scatter" if distributed else "all_reduce", "data"]
        # What a text's gradient is exchanged by, and a few scalars, stand beside it.
        assert gradients <= found <= 1.3 * gradients


def loss_and_norm(world, case: Case) -> tuple[float, float]:
    return world(case.world).run(cases.dropout_step, case)[0]


@pytest.mark.parametrize(
    "case",
    [
        dict(fgm=EPSILON, loss=R_DROP),
        pytest.param(dict(fgm=EPSILON, loss=R_DROP, targets=ALL_TARGETS, lora_dropout=0.2), marks=pytest.mark.slow),
        pytest.param(dict(world=2, fgm=EPSILON), marks=pytest.mark.slow),
        pytest.param(dict(world=2, tp=2, sp=True, fgm=EPSILON, loss=R_DROP), marks=pytest.mark.slow),
        pytest.param(dict(world=2, cp=2, loss=R_DROP), marks=pytest.mark.slow),
        pytest.param(dict(world=2, fp8="delayed", fgm=EPSILON, loss=R_DROP), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_cached_replays_the_dropout_of_each_pass(world, case):
    retain, cached = (loss_and_norm(world, Case(**case, way=way, budget=100)) for way in ("retain", "cached"))
    assert cached[0] == pytest.approx(retain[0], rel=1e-6) and cached[1] == pytest.approx(retain[1], rel=1e-5)


def alone(values, groups, is_split):
    return values


def with_norms_of_parts(case: Case) -> dict[str, float]:
    from nvembed_mcore import adversarial

    with mock.patch.object(adversarial, "sum_over_token_parts", alone):
        return cases.training_steps(case)


@pytest.mark.slow
def test_a_move_by_the_norm_of_a_part_does_not_pass(world):
    """A test of the test: each tensor rank with the norm of its own tokens."""
    case = Case(world=2, tp=2, sp=True, way="cached", budget=budget_for(3, 1, 7), fgm=EPSILON, loss=LEARNED)
    found = world(2).run(with_norms_of_parts, case)
    assert max(result["parameters"] for result in found) > 100 * BOUND


@pytest.mark.parametrize("changes", [dict(epsilon=EPSILON), R_DROP], ids=str)
def test_each_changes_the_loss(changes):
    """So that a step which ignored it could not agree with the reference."""
    plain, changed = (run_plainly(3, "latent", 0.5, **LEARNED, **more)[0].loss for more in ({}, changes))
    assert abs(plain - changed) > 1000 * BOUND * plain


def step_on_a_query_without_negatives(case: Case) -> tuple[float, float, float]:
    from nvembed_mcore.data.batch import Sample, make_batch
    from nvembed_mcore.metrics import PhaseTimer

    step, *_ = cases.build_step(case)
    query, passage = models.random_texts([8, 12], 250)
    batch = make_batch([Sample(query, [passage], np.array([0]), np.array([0]), in_batch=False)])
    output = step(batch, 1, PhaseTimer())
    return output.loss, output.grad_norm, output.terms["moved_loss"]


def test_a_text_without_a_gradient_stays_where_it_is(world):
    assert world(1).run(step_on_a_query_without_negatives, Case(fgm=EPSILON)) == [(0.0, 0.0, 0.0)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepConfig(fgm_epsilon=-0.5), "step.fgm_epsilon must not be negative, got -0.5"),
        (lambda: StepConfig(fgm_epsilon=1.0, fgm_weight=0.0), "step.fgm_weight must be above 0, got 0.0"),
        (lambda: LossConfig(r_drop_weight=-1.0), "loss.r_drop_weight must not be negative, got -1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_r_drop_is_refused_where_both_embeddings_would_be_equal(tmp_path):
    import dataclasses

    from nvembed_mcore.build import build_empty_model

    config = dataclasses.replace(runs.run_config(tmp_path, tmp_path / "run"), loss=LossConfig(r_drop_weight=0.5))
    says = (
        "loss.r_drop_weight = 0.5 .* nothing is dropped: model.lora.rank is 0, model.lora.dropout 0.1 and the model's "
        "attention_dropout 0.0"
    )
    with pytest.raises(ConfigError, match=says):
        build_empty_model(config, models.tiny_config(), groups=None)
    with pytest.raises(ConfigError, match="step.way 'single' .* loss.r_drop_weight 0.5 each pack is embedded twice"):
        dataclasses.replace(config, step=StepConfig(way="single"))


SEEDS = pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)


@SEEDS
def test_fgm_makes_a_model_that_withstands_moved_texts(world, seed):
    """Loss of held-out texts that are moved as far as those of the training, after equal steps."""
    plain, adversarial = (
        world(1).run(effects.term_after, training, dict(fgm=0.1), dropout=0.0, seed=seed)[0]
        for training in ({}, dict(fgm=0.1))
    )
    assert adversarial < 0.8 * plain


@SEEDS
def test_r_drop_makes_embeddings_agree_under_dropout(world, seed):
    """Divergence of held-out texts' scores, after equal steps under the same dropout."""
    plain, agreeing = (
        world(1).run(effects.term_after, training, dict(r_drop=1.0), dropout=0.3, seed=seed)[0]
        for training in ({}, dict(r_drop=8.0))
    )
    assert agreeing < 0.75 * plain
