"""InfoNCE against a double loop in float64, its gradients, and the memory that it takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nvembed_mcore import loss
from nvembed_mcore.kernels.reference import Masks, allowed
from nvembed_mcore.loss import make_targets, score_columns, score_rows

MASKS = {
    "default": Masks(),
    "same documents": Masks(same_document=False),
    "data sets": Masks(same_dataset_only=True),
    "margin": Masks(margin=-0.1),
    "everything": Masks(same_dataset_only=True, margin=0.05),
}


def random_case(seed: int, num_queries: int = 9, width: int = 5) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Anchors and candidates in float64, and the arguments of `make_targets`.

    Few documents, so that ids repeat; unequal numbers of positives and of negatives, also none; two data sets.
    """
    random = np.random.default_rng(seed)
    positives, negatives = 1 + random.integers(0, 2, num_queries), random.integers(0, 4, num_queries)
    column_query = np.repeat(np.arange(num_queries), positives + negatives)
    first = np.concatenate([[0], np.cumsum(positives + negatives)[:-1]])
    hard = np.arange(len(column_query)) - first[column_query] >= positives[column_query]
    positive = np.flatnonzero(~hard)
    query = column_query[positive]
    documents = random.integers(0, 12, len(column_query))
    # Each row lists its positive and up to two more documents, repeated to fill; ids may be any int64.
    of_rows = np.column_stack([documents[positive], random.integers(0, 12, (len(positive), 2))])
    of_rows[::2, 1:] = of_rows[::2, :1]
    dataset = np.arange(num_queries) % 2
    targets = dict(
        query=query,
        positive=positive,
        weight=1.0 / positives[query],
        in_batch=query % 3 != 2,
        dataset=dataset[query],
        documents=of_rows - (1 << 60),
        column_query=column_query,
        column_hard=hard,
        column_shared=~hard | (np.arange(len(hard)) % 2 == 0),
        column_dataset=dataset[column_query],
        column_documents=documents[:, None] - (1 << 60),
    )
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(num_queries + len(column_query), width, generator=generator, dtype=torch.float64)
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    return vectors[:num_queries][query], vectors[num_queries:], targets


def some_rows(targets: dict, rows) -> dict:
    return {name: values if name.startswith("column_") else values[rows] for name, values in targets.items()}


def takes_part(targets: dict, masks: Masks, cosines: torch.Tensor, row: int, column: int) -> bool:
    """Whether a column is in a row's softmax, said plainly."""
    if column == targets["positive"][row]:
        return True
    if masks.same_document and targets["column_documents"][column, 0] in targets["documents"][row]:
        return False
    if targets["column_query"][column] == targets["query"][row]:
        return bool(targets["column_hard"][column])
    if not targets["in_batch"][row] or not targets["column_shared"][column]:
        return False
    if masks.same_dataset_only and targets["column_dataset"][column] != targets["dataset"][row]:
        return False
    return masks.margin is None or bool(cosines[row, column] <= cosines[row, targets["positive"][row]] + masks.margin)


def double_loop(anchors, candidates, targets: dict, masks: Masks, scale: float) -> dict[str, torch.Tensor]:
    """Loss, correct rows and gradients by autograd, one score after the other."""
    anchors, candidates = (vectors.clone().requires_grad_() for vectors in (anchors, candidates))
    log_scale = torch.tensor(np.log(scale), requires_grad=True)
    cosines = anchors.detach() @ candidates.detach().T
    total, correct = (anchors.sum() + candidates.sum()) * 0.0 + log_scale * 0.0, 0.0
    for row, positive in enumerate(targets["positive"]):
        scores = {
            column: torch.dot(anchors[row], candidates[column]) * log_scale.exp()
            for column in range(len(candidates))
            if takes_part(targets, masks, cosines, row, column)
        }
        weight = targets["weight"][row]
        total = total - weight * (scores[positive].exp() / sum(score.exp() for score in scores.values())).log()
        correct += weight * all(score <= scores[positive] for score in scores.values())
    grads = torch.autograd.grad(total, (anchors, candidates, log_scale))
    names = ("grad_rows", "grad_columns", "grad_log_scale")
    return {"loss": total.detach(), "correct": torch.tensor(correct), **dict(zip(names, grads, strict=True))}


def score(anchors, candidates, targets: dict, masks: Masks, scale: float):
    rows, columns = make_targets(**targets, masks=masks)
    return score_rows(anchors, candidates, rows, columns, masks, scale, with_columns=True)


def assert_same(found, expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, truth in expected.items():
        value = getattr(found, name)
        assert value.shape == truth.shape, name
        largest = float(truth.abs().max()) if truth.numel() else 0.0
        torch.testing.assert_close(value.double(), truth.double(), rtol=tolerance, atol=tolerance * largest, msg=name)


@pytest.fixture(params=[1, 60, 1 << 22])
def block_scores(request, monkeypatch):
    monkeypatch.setattr(loss, "BLOCK_SCORES", request.param)
    monkeypatch.setattr(loss, "LEAST_ROWS", 1)


@pytest.mark.usefixtures("block_scores")
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_against_a_double_loop(seed, masks):
    case = (*random_case(seed), masks, 1 / 0.3)
    # Weights are float32, of which 1 and 1/2 lose nothing.
    assert_same(score(*case), double_loop(*case), 1e-12)


def test_each_mask_changes_the_loss():
    """So that a mask which did nothing could not agree with the double loop."""
    whole = {name: float(double_loop(*random_case(0), masks, 1 / 0.3)["loss"]) for name, masks in MASKS.items()}
    assert len({round(value, 6) for value in whole.values()}) == len(MASKS)


def test_float32_at_a_low_temperature():
    anchors, candidates, targets = random_case(3)
    expected = double_loop(anchors, candidates, targets, Masks(), 50.0)
    assert_same(score(anchors.float(), candidates.float(), targets, Masks(), 50.0), expected, 3e-5)


def naive_bfloat16(anchors, candidates, targets, masks, scale) -> dict[str, torch.Tensor]:
    """What autograd makes of the whole score matrix in bfloat16."""
    rows, columns = make_targets(**targets, masks=masks)
    anchors, candidates = (vectors.clone().requires_grad_() for vectors in (anchors, candidates))
    scores = (anchors * scale) @ candidates.T
    of_positive = scores.gather(1, rows.positive[:, None])[:, 0]
    keep = allowed(scores, of_positive, rows, columns, masks)
    losses = torch.nn.functional.cross_entropy(
        scores.masked_fill(~keep, float("-inf")), rows.positive, reduction="none"
    )
    total = (losses * rows.weight).sum()
    total.backward()
    return {"loss": total.detach(), "grad_rows": anchors.grad, "grad_columns": candidates.grad}


@pytest.mark.usefixtures("block_scores")
@pytest.mark.parametrize("seed", [0, 1])
def test_bfloat16_is_at_least_as_exact_as_plain_torch(seed):
    """Products of bfloat16 added up in float32: against float64 of the same rounded vectors, everything is float32."""
    anchors, candidates, targets = random_case(seed)
    anchors, candidates = anchors.bfloat16(), candidates.bfloat16()
    truth = double_loop(anchors.double(), candidates.double(), targets, Masks(), 20.0)
    plain = naive_bfloat16(anchors, candidates, targets, Masks(), 20.0)
    found = score(anchors, candidates, targets, Masks(), 20.0)
    for name, naive in plain.items():
        value = getattr(found, name)
        assert value.dtype == torch.float32
        error, of_plain = ((one.double() - truth[name]).abs().max() for one in (value, naive))
        assert error <= of_plain, (name, error, of_plain)
    for name in ("loss", "correct", "grad_log_scale"):
        # The gradient to log(scale) is a sum of rounded numbers that almost cancel.
        torch.testing.assert_close(getattr(found, name).double(), truth[name].double(), rtol=1e-2, atol=2e-2)
    rows, columns = make_targets(**targets, masks=Masks())
    again = score_columns(anchors, candidates, rows, columns, Masks(), 20.0, found.softmax)
    torch.testing.assert_close(again, found.grad_columns, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("rows", [[2, 5, 7], [8], []])
def test_a_rank_that_holds_some_rows_or_none(rows):
    anchors, candidates, targets = random_case(4)
    rows = np.array(rows, dtype=np.int64)
    case = (anchors[torch.as_tensor(rows)], candidates, some_rows(targets, rows), Masks(), 10.0)
    assert_same(score(*case), double_loop(*case), 1e-12)


PARTS = (slice(0, 2), slice(2, 2), slice(2, 7), slice(7, None))


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_ranks_add_up_to_the_whole(masks):
    anchors, candidates, targets = random_case(5)
    whole = score(anchors, candidates, targets, masks, 10.0)
    parts = [score(anchors[rows], candidates, some_rows(targets, rows), masks, 10.0) for rows in PARTS]
    torch.testing.assert_close(torch.cat([part.grad_rows for part in parts]), whole.grad_rows)
    for name in ("loss", "correct", "grad_columns", "grad_log_scale"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))


@pytest.mark.usefixtures("block_scores")
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_columns_alone_have_the_gradient_that_the_rows_give_them(masks):
    anchors, candidates, targets = random_case(6)
    whole = score(anchors, candidates, targets, masks, 10.0)
    for part in PARTS:
        columns = np.arange(len(candidates))[part]
        place = np.full(len(candidates), -1)
        place[columns] = np.arange(len(columns))
        chosen = {name: values[columns] if name.startswith("column_") else values for name, values in targets.items()}
        rows, some = make_targets(**(chosen | {"positive": place[targets["positive"]]}), masks=masks)
        grad = score_columns(anchors, candidates[part], rows, some, masks, 10.0, whole.softmax)
        torch.testing.assert_close(grad, whole.grad_columns[part], rtol=1e-10, atol=1e-12)


def two_queries(in_batch: bool, ids: list[int], documents: list[list[int]]) -> dict:
    """Query 0 with columns 0 (positive) and 1, query 1 with columns 2 (positive) and 3."""
    return dict(
        query=np.array([0, 1]),
        positive=np.array([0, 2]),
        weight=np.ones(2),
        in_batch=np.array([in_batch, True]),
        dataset=np.zeros(2),
        documents=np.array(documents),
        column_query=np.array([0, 0, 1, 1]),
        column_hard=np.array([False, True, False, True]),
        column_shared=np.ones(4, dtype=bool),
        column_dataset=np.zeros(4),
        column_documents=np.array(ids)[:, None],
    )


@pytest.mark.parametrize(
    ("in_batch", "ids", "documents", "expected"),
    [
        (True, [0, 1, 2, 3], [[0, 0], [2, 2]], [[1, 1, 1, 1], [1, 1, 1, 1]]),
        (False, [0, 1, 2, 3], [[0, 0], [2, 2]], [[1, 1, 0, 0], [1, 1, 1, 1]]),
        # Column 3 is the same document as the positive of query 0; column 1 as that of query 1.
        (True, [0, 2, 2, 0], [[0, 0], [2, 2]], [[1, 1, 1, 0], [1, 0, 1, 1]]),
        # Document 2 is another positive of query 0.
        (True, [0, 1, 2, 3], [[0, 2], [2, 2]], [[1, 1, 0, 1], [1, 1, 1, 1]]),
    ],
)
def test_who_takes_part(in_batch, ids, documents, expected):
    rows, columns = make_targets(**two_queries(in_batch, ids, documents), masks=Masks())
    assert allowed(torch.zeros(2, 4), torch.zeros(2), rows, columns, Masks()).int().tolist() == expected
    assert rows.is_masked.tolist() == [0 in row for row in expected], "only rows that miss a column are compared"


def test_a_margin_hides_no_hard_negative_of_its_own():
    rows, columns = make_targets(**two_queries(True, [0, 1, 2, 3], [[0, 0], [2, 2]]), masks=Masks(margin=0.1))
    scores = torch.tensor([[0.5, 0.9, 0.9, 0.55], [0.9, 0.5, 0.5, 0.9]])
    found = allowed(scores, torch.tensor([0.5, 0.5]), rows, columns, Masks(margin=0.1))
    assert found.int().tolist() == [[1, 1, 0, 1], [0, 1, 1, 1]]


def test_a_query_without_any_negative_has_no_loss():
    targets = some_rows(two_queries(False, [0, 0, 2, 3], [[0, 0], [2, 2]]), slice(0, 1))
    anchors, candidates, _ = random_case(6)
    found = score(anchors[:1], candidates[:4], targets, Masks(), 20.0)
    assert float(found.loss) == 0.0 and float(found.correct) == 1.0
    assert float(found.grad_rows.abs().max()) == 0.0 and float(found.grad_columns.abs().max()) == 0.0


class LargestOutput(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_scores_exist_only_in_blocks(monkeypatch):
    anchors, candidates, targets = random_case(7, num_queries=64)
    monkeypatch.setattr(loss, "LEAST_ROWS", 1)
    for rows, largest in ((2, candidates.numel()), (len(anchors), len(anchors) * len(candidates))):
        monkeypatch.setattr(loss, "BLOCK_SCORES", rows * len(candidates))
        with LargestOutput() as seen:
            score(anchors, candidates, targets, MASKS["everything"], 10.0)
        assert seen.numel == largest, "inputs and their gradients are the largest, or the one block"
