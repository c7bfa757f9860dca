"""InfoNCE against a double loop in float64, its gradients, and the memory that it takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nvembed_mcore import loss
from nvembed_mcore.loss import Targets, info_nce


def random_case(seed: int, num_queries: int = 9, width: int = 5) -> tuple[torch.Tensor, torch.Tensor, Targets]:
    """Unit vectors in float64; few documents, so that ids repeat, and unequal numbers of negatives, also none."""
    random = np.random.default_rng(seed)
    counts = 1 + random.integers(0, 4, num_queries)
    passage_query = np.repeat(np.arange(num_queries), counts)
    passage_ids = random.integers(0, 12, len(passage_query))
    positive = np.cumsum(counts) - counts
    # Each row lists its positive and up to two more documents, repeated to fill.
    others = random.integers(0, 12, (num_queries, 2))
    positive_ids = np.column_stack([passage_ids[positive], others])
    positive_ids[::2, 1:] = positive_ids[::2, :1]
    targets = Targets(
        query=torch.arange(num_queries),
        positive=torch.as_tensor(positive),
        in_batch=torch.as_tensor(np.arange(num_queries) % 3 != 2),
        positive_ids=torch.as_tensor(positive_ids),
        passage_query=torch.as_tensor(passage_query),
        passage_ids=torch.as_tensor(passage_ids),
    )
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(num_queries + len(passage_query), width, generator=generator, dtype=torch.float64)
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    return vectors[:num_queries], vectors[num_queries:], targets


def double_loop(
    queries: torch.Tensor, passages: torch.Tensor, targets: Targets, temperature: float
) -> tuple[torch.Tensor, int]:
    """Sum of losses and number of correct rows, one score after the other."""
    total, correct = (queries.sum() + passages.sum()) * 0.0, 0
    for row in range(len(queries)):
        positive = int(targets.positive[row])
        scores = {}
        for column in range(len(passages)):
            is_own = int(targets.passage_query[column]) == int(targets.query[row])
            is_same = int(targets.passage_ids[column]) in targets.positive_ids[row].tolist()
            hidden = (not is_own and not bool(targets.in_batch[row])) or (targets.mask_same_document and is_same)
            if column == positive or not hidden:
                scores[column] = torch.dot(queries[row], passages[column]) / temperature
        total = total - (scores[positive].exp() / sum(score.exp() for score in scores.values())).log()
        correct += all(score <= scores[positive] for score in scores.values())
    return total, correct


def gradients(function, queries, passages, targets, temperature):
    """Loss, correct rows and both gradients, with an upstream gradient that is not one."""
    queries, passages = (vectors.clone().requires_grad_() for vectors in (queries, passages))
    total, correct = function(queries, passages, targets, temperature)
    grads = torch.autograd.grad(total * 0.37, (queries, passages))
    return total.detach(), int(correct), grads


def assert_same(found, expected, tolerance: float) -> None:
    assert found[1] == expected[1]
    for value, truth in zip((found[0], *found[2]), (expected[0], *expected[2]), strict=True):
        assert value.shape == truth.shape
        largest = float(truth.abs().max()) if truth.numel() else 0.0
        torch.testing.assert_close(value.double(), truth, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("block_scores", [1, 70, 1 << 22])
@pytest.mark.parametrize("mask_same_document", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_against_a_double_loop(monkeypatch, seed, mask_same_document, block_scores):
    monkeypatch.setattr(loss, "BLOCK_SCORES", block_scores)
    queries, passages, targets = random_case(seed)
    targets = replace(targets, mask_same_document=mask_same_document)
    expected = gradients(double_loop, queries, passages, targets, 0.3)
    assert_same(gradients(info_nce, queries, passages, targets, 0.3), expected, 1e-12)


def test_float32_at_a_low_temperature():
    queries, passages, targets = random_case(3)
    expected = gradients(double_loop, queries, passages, targets, 0.02)
    assert_same(gradients(info_nce, queries.float(), passages.float(), targets, 0.02), expected, 3e-5)


@pytest.mark.parametrize("rows", [[2, 5, 7], [8], []])
def test_a_rank_that_holds_some_rows_or_none(rows):
    queries, passages, targets = random_case(4)
    rows = torch.tensor(rows, dtype=torch.long)
    case = (queries[rows], passages, targets.rows(rows), 0.1)
    assert_same(gradients(info_nce, *case), gradients(double_loop, *case), 1e-12)


def test_ranks_add_up_to_the_whole():
    queries, passages, targets = random_case(5)
    whole = gradients(info_nce, queries, passages, targets, 0.1)
    parts = [
        gradients(info_nce, queries[rows], passages, targets.rows(rows), 0.1)
        for rows in (slice(0, 2), slice(2, 7), slice(7, 9))
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), whole[0])
    torch.testing.assert_close(torch.cat([part[2][0] for part in parts]), whole[2][0])
    torch.testing.assert_close(sum(part[2][1] for part in parts), whole[2][1])


def targets_of_two(in_batch: bool, ids: list[int], positive_ids: list[list[int]]) -> Targets:
    """Query 0 with passages 0 (positive) and 1, query 1 with passages 2 (positive) and 3."""
    return Targets(
        query=torch.tensor([0, 1]),
        positive=torch.tensor([0, 2]),
        in_batch=torch.tensor([in_batch, True]),
        positive_ids=torch.tensor(positive_ids),
        passage_query=torch.tensor([0, 0, 1, 1]),
        passage_ids=torch.tensor(ids),
    )


@pytest.mark.parametrize(
    ("in_batch", "ids", "positive_ids", "expected"),
    [
        (True, [0, 1, 2, 3], [[0, 0], [2, 2]], [[1, 1, 1, 1], [1, 1, 1, 1]]),
        (False, [0, 1, 2, 3], [[0, 0], [2, 2]], [[1, 1, 0, 0], [1, 1, 1, 1]]),
        # Passage 3 is the same document as the positive of query 0; passage 1 as that of query 1.
        (True, [0, 2, 2, 0], [[0, 0], [2, 2]], [[1, 1, 1, 0], [1, 0, 1, 1]]),
        # Document 2 is another positive of query 0.
        (True, [0, 1, 2, 3], [[0, 2], [2, 2]], [[1, 1, 0, 1], [1, 1, 1, 1]]),
    ],
)
def test_who_takes_part(in_batch, ids, positive_ids, expected):
    assert targets_of_two(in_batch, ids, positive_ids).allowed().int().tolist() == expected


def test_a_query_without_any_negative_has_no_loss():
    targets = targets_of_two(False, [0, 0, 2, 3], [[0, 0], [2, 2]]).rows(slice(0, 1))
    queries, passages, _ = random_case(6)
    total, correct, grads = gradients(info_nce, queries[:1], passages[:4], targets, 0.05)
    assert float(total) == 0.0 and correct == 1
    assert all(float(grad.abs().max()) == 0.0 for grad in grads)


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
    queries, passages, targets = random_case(7, num_queries=64)
    everything = len(queries) * len(passages)
    for rows, largest in ((2, passages.numel()), (64, everything)):
        monkeypatch.setattr(loss, "BLOCK_SCORES", rows * len(passages))
        with LargestOutput() as seen:
            gradients(info_nce, queries, passages, targets, 0.1)
        assert seen.numel == largest, "inputs and their gradients are the largest, or the one block"
