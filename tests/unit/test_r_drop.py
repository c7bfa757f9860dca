"""R-Drop's divergence and its gradients against a double loop in float64, and the memory that it takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nvembed_mcore import loss
from nvembed_mcore.kernels.reference import Masks
from nvembed_mcore.loss import make_targets
from nvembed_mcore.r_drop import MATRICES, diverge_columns, diverge_rows
from tests.unit.test_loss import MASKS, PARTS, LargestOutput, random_case, some_rows, takes_part

WITHOUT_MARGIN = {name: masks for name, masks in MASKS.items() if masks.margin is None}


def two_views(seed: int, noise: float = 0.3, **sizes):
    """A case of `test_loss` with vectors of a second view."""
    anchors, candidates, targets = random_case(seed, **sizes)
    random = torch.Generator().manual_seed(100 + seed)

    def near(vectors):
        moved = vectors + noise * torch.randn(vectors.shape, generator=random, dtype=vectors.dtype)
        return torch.nn.functional.normalize(moved, dim=1)

    return [anchors, near(anchors)], [candidates, near(candidates)], targets


def double_loop(anchors, candidates, targets, masks, scale) -> dict:
    """The divergence and its gradients by autograd, one score after the other."""
    anchors, candidates = ([one.clone().requires_grad_() for one in views] for views in (anchors, candidates))
    log_scale = torch.tensor(np.log(scale), requires_grad=True)
    total = sum(one.sum() for one in (*anchors, *candidates)) * 0.0 + log_scale * 0.0
    for row, weight in enumerate(targets["weight"]):
        part = [
            column
            for column in range(len(candidates[0]))
            if all(
                takes_part(targets, masks, one.detach() @ other.detach().T, row, column)
                for one, other in zip(anchors, candidates, strict=True)
            )
        ]
        p, q = (
            torch.stack([torch.dot(one[row], other[column]) * log_scale.exp() for column in part]).softmax(0)
            for one, other in zip(anchors, candidates, strict=True)
        )
        for column in range(len(part)):
            total = total + weight / 2 * p[column] * (p[column] / q[column]).log()
            total = total + weight / 2 * q[column] * (q[column] / p[column]).log()
    grads = torch.autograd.grad(total, (*anchors, *candidates, log_scale))
    return {"total": total.detach(), "rows": grads[:2], "columns": grads[2:4], "log_scale": grads[4]}


def diverge(anchors, candidates, targets, masks, scale):
    rows, columns = make_targets(**targets, masks=masks)
    return diverge_rows(anchors, candidates, rows, columns, masks, scale, with_columns=True)


def assert_same(found, expected: dict, tolerance: float) -> None:
    pairs = [(found.total, expected["total"]), (found.grad_log_scale, expected["log_scale"])]
    pairs += [*zip(found.grad_rows, expected["rows"], strict=True)]
    pairs += [*zip(found.grad_columns, expected["columns"], strict=True)]
    for value, truth in pairs:
        largest = float(truth.abs().max()) if truth.numel() else 0.0
        torch.testing.assert_close(value.double(), truth, rtol=tolerance, atol=tolerance * largest)


@pytest.fixture(params=[1, 200, 1 << 22])
def block_scores(request, monkeypatch):
    monkeypatch.setattr(loss, "BLOCK_SCORES", request.param)
    monkeypatch.setattr(loss, "LEAST_ROWS", 1)


@pytest.mark.usefixtures("block_scores")
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_against_a_double_loop(masks):
    """A margin hides in both views what exceeds it in either."""
    case = (*two_views(0), masks, 1 / 0.3)
    assert_same(diverge(*case), double_loop(*case), 1e-12)


def test_each_mask_changes_the_divergence():
    whole = {name: float(diverge(*two_views(0), masks, 1 / 0.3).total) for name, masks in MASKS.items()}
    assert len({round(value, 6) for value in whole.values()}) == len(MASKS)


@pytest.mark.parametrize("scale", [3.0, 50.0])
def test_float32(scale):
    anchors, candidates, targets = two_views(3, noise=0.1)
    expected = double_loop(anchors, candidates, targets, Masks(), scale)
    narrow = ([one.float() for one in views] for views in (anchors, candidates))
    assert_same(diverge(*narrow, targets, Masks(), scale), expected, 1e-4)


def test_bfloat16_is_summed_in_float32():
    anchors, candidates, targets = two_views(3)
    anchors, candidates = ([one.bfloat16() for one in views] for views in (anchors, candidates))
    wide = ([one.double() for one in views] for views in (anchors, candidates))
    expected = double_loop(*wide, targets, Masks(), 20.0)
    found = diverge(anchors, candidates, targets, Masks(), 20.0)
    assert found.grad_rows[0].dtype == found.grad_columns[1].dtype == torch.float32
    assert_same(found, expected, 2e-2)
    assert float(found.total) == pytest.approx(float(expected["total"]), rel=1e-5)


def test_equal_views_do_not_diverge():
    anchors, candidates, targets = random_case(1)
    found = diverge([anchors] * 2, [candidates] * 2, targets, MASKS["everything"], 20.0)
    for value in (found.total, *found.grad_rows, *found.grad_columns):
        assert float(value.abs().max()) == 0.0


def test_ranks_add_up_to_the_whole():
    anchors, candidates, targets = two_views(5)
    whole = diverge(anchors, candidates, targets, Masks(), 10.0)
    parts = [
        diverge([one[rows] for one in anchors], candidates, some_rows(targets, rows), Masks(), 10.0) for rows in PARTS
    ]
    for view in range(2):
        torch.testing.assert_close(torch.cat([part.grad_rows[view] for part in parts]), whole.grad_rows[view])
        torch.testing.assert_close(sum(part.grad_columns[view] for part in parts), whole.grad_columns[view])
    for name in ("total", "grad_log_scale"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))


@pytest.mark.usefixtures("block_scores")
@pytest.mark.parametrize("masks", WITHOUT_MARGIN.values(), ids=WITHOUT_MARGIN)
def test_columns_alone_have_the_gradient_that_the_rows_give_them(masks):
    anchors, candidates, targets = two_views(6)
    whole = diverge(anchors, candidates, targets, masks, 10.0)
    for part in PARTS:
        columns = np.arange(len(candidates[0]))[part]
        place = np.full(len(candidates[0]), -1)
        place[columns] = np.arange(len(columns))
        chosen = {name: values[columns] if name.startswith("column_") else values for name, values in targets.items()}
        rows, some = make_targets(**(chosen | {"positive": place[targets["positive"]]}), masks=masks)
        grads = diverge_columns(anchors, [one[part] for one in candidates], rows, some, masks, 10.0, whole.of_rows)
        for grad, expected in zip(grads, whole.grad_columns, strict=True):
            torch.testing.assert_close(grad, expected[part], rtol=1e-10, atol=1e-12)


def test_scores_exist_only_in_blocks(monkeypatch):
    anchors, candidates, targets = two_views(7, num_queries=64)
    monkeypatch.setattr(loss, "LEAST_ROWS", 1)
    size = len(candidates[0])
    for rows, largest in ((2, candidates[0].numel()), (len(anchors[0]), len(anchors[0]) * size)):
        monkeypatch.setattr(loss, "BLOCK_SCORES", MATRICES * rows * size)
        with LargestOutput() as seen:
            diverge(anchors, candidates, targets, Masks(), 10.0)
        assert seen.numel == largest, "inputs and their gradients are the largest, or the one block"
