"""Distillation against a double loop in float64: values, gradients, who computes what, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nvembed_mcore import distillation
from nvembed_mcore.config import ConfigError
from nvembed_mcore.config_step import DistillationConfig
from nvembed_mcore.data.batch import Batch
from nvembed_mcore.distillation import divergence, is_distilled, share_of
from tests.helpers.plain import training_batch

ON = DistillationConfig(weight=0.7, teacher_temperature=0.5)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    vectors = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(vectors, dim=-1)


def looped(queries, passages, scores, scale) -> dict[str, torch.Tensor]:
    """By autograd, one score after the other; a score of NaN has no passage."""
    queries, passages = (vectors.clone().requires_grad_() for vectors in (queries, passages))
    log_scale = torch.full((len(queries),), float(np.log(scale)), dtype=torch.float64, requires_grad=True)
    losses = []
    for i in range(len(queries)):
        there = [j for j in range(scores.shape[1]) if not np.isnan(scores[i, j])]
        ours = [torch.dot(queries[i], passages[i, j]) * log_scale[i].exp() for j in there]
        of_student = sum(score.exp() for score in ours)
        of_teacher = sum(np.exp(scores[i, j]) for j in there)
        terms = [
            np.exp(scores[i, j]) / of_teacher * (scores[i, j] - np.log(of_teacher) - (score.exp() / of_student).log())
            for j, score in zip(there, ours, strict=True)
        ]
        losses.append(sum(terms))
    grads = torch.autograd.grad(sum(losses), (queries, passages, log_scale))
    names = ("grad_queries", "grad_passages", "grad_log_scale")
    return {"loss": torch.stack(losses).detach(), **dict(zip(names, grads, strict=True))}


def teacher_of(scores: np.ndarray) -> torch.Tensor:
    """Logarithms of probabilities, as a share makes them."""
    return torch.log_softmax(torch.as_tensor(np.where(np.isnan(scores), -np.inf, scores)), dim=1)


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_equals_a_double_loop(scale):
    queries, passages = unit(6, 5), unit(6, 4, 5, seed=1)
    scores = np.random.default_rng(0).normal(size=(6, 4)) * 2
    scores[1, 2:], scores[4, 3] = np.nan, np.nan
    expected = looped(queries, passages, scores, scale)
    found = divergence(queries, passages, teacher_of(scores), scale)
    for name, truth in expected.items():
        torch.testing.assert_close(getattr(found, name), truth, rtol=1e-12, atol=1e-12 * scale, msg=name)
    assert (found.loss >= 0).all() and not found.grad_passages[1, 2:].any()


def test_a_student_that_scores_like_the_teacher_is_left_alone():
    queries, passages = unit(3, 5), unit(3, 4, 5, seed=1)
    cosines = torch.einsum("qd,qcd->qc", queries, passages)
    found = divergence(queries, passages, torch.log_softmax(20 * cosines, dim=1), 20.0)
    assert all(float(values.abs().max()) < 1e-12 for values in vars(found).values())


def test_a_certain_teacher_gives_no_numbers_that_are_none():
    """Scores whose softmax is 0 in float32: cross-entropy with the one that is left."""
    queries, passages = unit(1, 5).float(), unit(1, 3, 5, seed=1).float()
    found = divergence(queries, passages, torch.tensor([[0.0, -2e4, -torch.inf]]), 2.0)
    assert all(bool(values.isfinite().all()) for values in vars(found).values())
    scores = 2.0 * (passages[0, :2] @ queries[0])
    assert float(found.loss) == pytest.approx(float(scores.logsumexp(0) - scores[0]), rel=1e-5)


def whole(batch: Batch, vectors: torch.Tensor, scale: float, config: DistillationConfig) -> dict[str, torch.Tensor]:
    """Sum of the divergences and its gradients to all vectors, by the double loop, query by query."""
    total, grad, grad_log_scale = 0.0, torch.zeros_like(vectors), 0.0
    for i in range(batch.num_queries):
        own = np.flatnonzero((batch.passage_query == i) & np.isfinite(batch.teacher_scores))
        if len(own) < 2:
            continue
        texts = batch.num_queries + own
        scores = batch.teacher_scores[own].astype(np.float64)[None] / config.teacher_temperature
        found = looped(vectors[i][None], vectors[texts][None], scores, scale)
        total, grad_log_scale = total + found["loss"].sum(), grad_log_scale + found["grad_log_scale"].sum()
        grad[i] += found["grad_queries"][0]
        grad[texts] += found["grad_passages"][0]
    return {"loss": total, "grad": grad, "grad_log_scale": grad_log_scale}


@pytest.mark.parametrize("block", [1, 1 << 22])
@pytest.mark.parametrize("alone", [False, True])
def test_ranks_together_make_the_whole(monkeypatch, block, alone):
    """Three ranks, one without texts, passages away from their queries; queries with one passage or no scores."""
    monkeypatch.setattr(distillation, "BLOCK_NUMBERS", block)
    batch = training_batch(7, 1)
    numbers = np.random.default_rng(1).permutation(len(batch.texts))
    owned = [numbers[:9], numbers[9:], numbers[:0]]
    vectors = unit(len(batch.texts), 6)
    expected = whole(batch, vectors, 3.0, ON)
    loss, grad, grad_log_scale = 0.0, torch.zeros_like(vectors), 0.0
    for rank, mine in enumerate(owned):
        share = share_of(batch, owned, rank, ON, alone=alone, weight=0.7)
        part = vectors.new_zeros(len(mine) if alone else len(vectors), 6)
        found = share.score_(vectors, 3.0, part)
        loss, grad_log_scale = loss + found[0], grad_log_scale + found[1]
        if alone:
            grad[mine] += part
        else:
            grad += part
    # The teacher's probabilities are float32 numbers.
    assert float(loss) == pytest.approx(float(expected["loss"]), rel=1e-6)
    assert float(grad_log_scale) == pytest.approx(0.7 * float(expected["grad_log_scale"]), rel=1e-5)
    torch.testing.assert_close(grad, 0.7 * expected["grad"], rtol=1e-5, atol=1e-7)


def test_what_is_distilled():
    batch = training_batch(7, 1)
    assert is_distilled(batch).tolist() == [True, True, True, False, True, False, True]
    assert np.isnan(batch.teacher_scores[batch.passage_query == 5]).all()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(weight=-1.0), ["loss.distillation.weight", "-1.0"]),
        (dict(weight=float("inf")), ["loss.distillation.weight", "inf"]),
        (dict(weight=1.0), ["loss.distillation.teacher_temperature must be given", "1.0"]),
        (dict(weight=1.0, teacher_temperature=0.0), ["loss.distillation.teacher_temperature", "0.0"]),
    ],
)
def test_values_that_cannot_work_are_refused(fields, words):
    with pytest.raises(ConfigError) as caught:
        DistillationConfig(**fields)
    assert all(word in str(caught.value) for word in words)
