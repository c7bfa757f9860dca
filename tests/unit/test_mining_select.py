"""Choosing negatives against a loop over queries and candidates, written from the definitions."""

from __future__ import annotations

import random

import numpy as np
import pytest

from nvembed_mcore.mining.select import (
    METHODS,
    Rules,
    allowed,
    barred,
    choose,
    lacks_candidates,
    limits,
)


class Case:
    """Candidates of nine queries with repeated texts, barred texts and ids, and absent candidates."""

    def __init__(self, seed: int, num_queries: int = 9, k: int = 25) -> None:
        draw = np.random.default_rng(seed)
        self.scores = np.sort(draw.uniform(-1, 1, (num_queries, k)).astype(np.float32), axis=1)[:, ::-1]
        self.texts = draw.integers(0, 30, (num_queries, k)).astype(np.uint64)
        self.ids = draw.integers(0, 40, (num_queries, k)).astype(np.uint64)
        self.present = np.arange(k) < draw.integers(10, k + 1, (num_queries, 1))
        self.barred_texts = [draw.integers(0, 30, draw.integers(1, 4)).astype(np.uint64) for _ in range(num_queries)]
        self.barred_ids = [draw.integers(0, 40, draw.integers(1, 4)).astype(np.uint64) for _ in range(num_queries)]
        self.positives = draw.uniform(-0.5, 1, num_queries).astype(np.float32)
        self.query_ids = [f"q{index}" for index in range(num_queries)]

    def chosen(self, rules: Rules) -> list[list[int]]:
        is_barred = barred(self.texts, self.ids, self.present, self.barred_texts, self.barred_ids)
        is_allowed = allowed(self.scores, is_barred, limits(self.positives, rules), rules)
        return [columns.tolist() for columns in choose(is_allowed, rules, self.query_ids)]


def under_the_limit(score: float, positive: float, rules: Rules) -> bool:
    if rules.method == "topk-percpos":
        return score < positive - (1 - rules.percent) * abs(positive)
    if rules.method == "topk-marginpos":
        return score < positive - rules.margin
    return rules.method == "topk" or score < rules.max_score


def by_loops(case: Case, rules: Rules) -> list[list[int]]:
    chosen = []
    for query in range(len(case.scores)):
        seen, rank, columns = set(), 0, []
        for column in range(case.scores.shape[1]):
            text, document = int(case.texts[query, column]), int(case.ids[query, column])
            if not case.present[query, column] or text in seen:
                continue
            seen.add(text)
            if text in case.barred_texts[query].tolist() or document in case.barred_ids[query].tolist():
                continue
            rank += 1
            if rules.skip < rank and (rules.last is None or rank <= rules.last):
                if under_the_limit(float(case.scores[query, column]), float(case.positives[query]), rules):
                    columns.append(column)
        if rules.sampling == "random" and len(columns) > rules.negatives:
            draw = random.Random(f"{rules.seed}/mine/{case.query_ids[query]}")
            columns = sorted(draw.sample(columns, rules.negatives))
        chosen.append(columns[: rules.negatives])
    return chosen


@pytest.mark.parametrize("sampling", ["top", "random"])
@pytest.mark.parametrize("bounds", [(0, None), (2, 9)])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_against_loops(method, bounds, sampling):
    rules = Rules(method=method, max_score=0.3, negatives=3, skip=bounds[0], last=bounds[1], sampling=sampling)
    lengths = set()
    for seed in range(20):
        case = Case(seed)
        expected = by_loops(case, rules)
        assert case.chosen(rules) == expected
        lengths |= {len(columns) for columns in expected}
    assert 3 in lengths and (method == "topk" or 0 in lengths)


def test_limits_by_hand():
    positives = np.array([0.8, 0.0, -0.4], dtype=np.float64)
    assert limits(positives, Rules()) == pytest.approx([0.76, 0.0, -0.42])
    assert limits(positives, Rules(method="topk-marginpos", margin=0.1)) == pytest.approx([0.7, -0.1, -0.5])
    assert limits(positives, Rules(method="topk-abs", max_score=0.6)).tolist() == [0.6] * 3
    assert limits(positives, Rules(method="topk")).tolist() == [np.inf] * 3


def test_no_positive_aware_limit_is_above_the_positive():
    positives = np.linspace(-1, 1, 201)
    for rules in (Rules(percent=0.5), Rules(percent=1.0), Rules(method="topk-marginpos", margin=0.0)):
        limit = limits(positives, rules)
        assert (limit <= positives).all() and (np.diff(limit) > 0).all()


def test_the_limit_itself_is_too_much():
    is_barred = np.zeros((1, 2), dtype=bool)
    scores = np.array([[0.5, 0.25]], dtype=np.float32)
    assert allowed(scores, is_barred, np.array([0.5]), Rules()).tolist() == [[False, True]]


def test_what_is_drawn_follows_the_seed_and_the_query_and_not_its_place():
    is_allowed = np.ones((4, 50), dtype=bool)
    rules = Rules(sampling="random", negatives=5)
    names = ["a", "b", "c", "d"]
    drawn = dict(zip(names, map(tuple, choose(is_allowed, rules, names)), strict=True))
    again = dict(zip(names[::-1], map(tuple, choose(is_allowed, rules, names[::-1])), strict=True))
    other = choose(is_allowed, Rules(sampling="random", negatives=5, seed=1), names)
    assert drawn == again and len(set(drawn.values())) == 4
    assert all(tuple(columns) != drawn[name] for name, columns in zip(names, other, strict=True))


def test_who_lacks_candidates():
    # Query 0 has two that may be negatives, query 1 has three, query 2 none but has seen all of its ranks.
    is_barred = np.array([[True, False, False, False]] * 2 + [[False] * 4])
    is_allowed = np.array([[False, False, True, True], [False, True, True, True], [False] * 4])
    rules = Rules(negatives=3, last=4)
    assert lacks_candidates(is_barred, is_allowed, rules).tolist() == [True, False, False]
    drawn = Rules(negatives=3, last=4, sampling="random")
    assert lacks_candidates(is_barred, is_allowed, drawn).tolist() == [True, True, False]
