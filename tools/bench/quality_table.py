"""Means with intervals, and the tables: ours at small scale beside the paper's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tools.bench.quality_measure import MEASURES
from tools.bench.quality_recipes import MASKS, ORDERS, POOLINGS, Recipe, orders, poolings
from tools.bench.quality_runs import Result

FIRST_STEPS = 10
"""Steps whose losses are compared one by one."""
SIDE_MEASURES = MEASURES[:3]
TITLES = {
    "ndcg_at_10": "nDCG@10",
    "recall_at_10": "recall@10",
    "mrr_at_10": "MRR@10",
    "accuracy": "classification",
    "v_measure": "clustering",
}
POOLING_TITLES = {
    "last": "`</s>`",
    "mean": "mean",
    "latent": "latent attention",
    "self_attention": "self-attention",
}
ORDER_TITLES = {
    "one_in_batch": "one stage, in-batch negatives",
    "one_alone": "one stage, without",
    "two_stages": "two stages",
    "reversed": "two stages, reversed",
}
PAPER_POOLINGS = {
    ("last", "bidirectional"): (57.70, 58.39, 67.85),
    ("last", "causal"): (56.42, 56.59, 66.50),
    ("mean", "bidirectional"): (58.42, 58.71, 68.97),
    ("mean", "causal"): (57.55, 57.88, 68.13),
    ("latent", "bidirectional"): (59.00, 59.36, 69.32),
    ("latent", "causal"): (57.65, 58.33, 68.47),
    ("self_attention", "bidirectional"): (57.89, 58.64, 69.10),
    ("self_attention", "causal"): (57.21, 57.71, 68.16),
}
"""Table 2: retrieval (15 tasks) after stage 1 and after stage 2, and all 56 tasks after stage 2."""
PAPER_ORDERS = {
    "one_in_batch": (61.25, 70.83),
    "one_alone": (61.37, 71.94),
    "two_stages": (62.65, 72.31),
    "reversed": (61.91, 71.85),
}
"""Table 4: retrieval (15 tasks) and all 56 tasks."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with half of its 95 % interval.

    Attributes:
        value: the mean.
        half: Student's t times the standard error; not a number for one seed.
        seeds: how many.
    """

    value: float
    half: float
    seeds: int

    def text(self, digits: int = 3, sign: str = "") -> str:
        half = f" ± {self.half:.{digits}f}" if self.seeds > 1 else ""
        return f"{self.value:{sign}.{digits}f}{half}"

    @property
    def holds_zero(self) -> bool:
        """Whether 0 is in the interval (that of one seed is unknown, and holds everything)."""
        return not abs(self.value) > self.half


def mean_of(values: Iterable[float]) -> Mean:
    """Mean and t interval.

    Raises:
        ValueError: there is no value.
    """
    from scipy.stats import t

    found = np.array([*values], np.float64)
    if not len(found):
        raise ValueError("a mean needs at least one value, got none")
    if len(found) == 1:
        return Mean(float(found[0]), float("nan"), 1)
    error = found.std(ddof=1) / np.sqrt(len(found))
    return Mean(float(found.mean()), float(t.ppf(0.975, len(found) - 1) * error), len(found))


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> Mean:
    """Mean of the differences `one - other` over the seeds that both have; each seed is a pair."""
    return mean_of(one[seed] - other[seed] for seed in sorted(one.keys() & other.keys()))


def by_seed(found: Mapping[Recipe, Result], like: Recipe, stage: int, measure: str) -> dict[int, float]:
    """Seed -> what the runs measured after a stage that are as `like` but for their seed."""
    return {
        recipe.seed: result["stages"][stage][measure]
        for recipe, result in found.items()
        if replace(recipe, seed=like.seed) == like
    }


# --------------------------------------------------------------------------------------------------- the two trainers


def side_figures(found: Mapping[int, Result]) -> dict[str, Any]:
    """Flat figures of the side-by-side runs.

    Args:
        found: seed -> result of `quality_side.train_both`.
    """
    figures: dict[str, Any] = {"side_seeds": len(found)}
    for measure in SIDE_MEASURES:
        of = {name: {s: r["quality"][name][measure] for s, r in found.items()} for name in _first(found)["quality"]}
        for name in of:
            figures |= _flat(f"side_{name}_{measure}", mean_of(of[name].values()))
        for name in ("peer", "repacked"):
            difference = paired(of["ours"], of[name])
            figures |= _flat(f"side_ours_minus_{name}_{measure}", difference)
            figures[f"side_ours_minus_{name}_{measure}_holds_zero"] = difference.holds_zero
        if len(found) > 1:
            figures[f"side_seed_deviation_{measure}"] = float(np.std([*of["ours"].values()], ddof=1))
    for name in ("peer", "repacked"):
        losses = [_apart(r["ours"]["losses"], r[name]["losses"]) for r in found.values()]
        norms = [_apart(r["ours"]["norms"], r[name]["norms"]) for r in found.values()]
        figures[f"side_{name}_first_loss_difference"] = max(float(one[0]) for one in losses)
        figures[f"side_{name}_first_norm_difference"] = max(float(one[0]) for one in norms)
        figures[f"side_{name}_loss_difference_{FIRST_STEPS}_steps"] = max(float(x[:FIRST_STEPS].max()) for x in losses)
        figures[f"side_{name}_loss_difference_all_steps"] = max(float(one.max()) for one in losses)
        figures[f"side_{name}_weights_apart"] = max(r["changed"][name] for r in found.values())
    cached = [
        _apart(r["repacked"]["losses"], r["peer_cached"]["losses"]) for r in found.values() if "peer_cached" in r
    ]
    if cached:
        figures["side_cached_steps"] = len(cached[0])
        figures["side_cached_loss_difference"] = max(float(one.max()) for one in cached)
    for name in ("ours", "peer"):
        figures[f"side_{name}_processor_seconds"] = float(np.mean([r[name]["seconds"] for r in found.values()]))
    figures["side_tokens"] = _first(found)["ours"]["tokens"]
    return figures


def _apart(one: Sequence[float], other: Sequence[float]) -> np.ndarray:
    """Relative differences of the steps that both took."""
    both = min(len(one), len(other))
    return np.abs(np.array(one[:both]) / np.array(other[:both]) - 1)


def _first(found: Mapping[int, Result]) -> Result:
    return next(iter(found.values()))


def side_table(figures: Mapping[str, Any]) -> str:
    """Markdown: quality of both, and how far apart they are."""
    lines = ["| | nDCG@10 | recall@10 | MRR@10 |", "|---|---|---|---|"]
    rows = {
        "initial": "untrained",
        "ours": "this trainer",
        "peer": "sentence-transformers",
        "repacked": "smaller packs",
    }
    for name, title in rows.items():
        lines.append(_row(title, [_shown(figures, f"side_{name}_{one}", 4) for one in SIDE_MEASURES]))
    for name in ("peer", "repacked"):
        cells = [_shown(figures, f"side_ours_minus_{name}_{one}", 4, "+") for one in SIDE_MEASURES]
        lines.append(_row(f"this trainer - {rows[name]}", cells))
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------- the paper's tables


def recipe_figures(found: Mapping[Recipe, Result]) -> dict[str, Any]:
    """Flat figures: each recipe's measures after each stage, and the differences that the paper's claims are about."""
    figures: dict[str, Any] = {}
    for like in dict.fromkeys([*poolings(1), *orders(1)]):
        for stage in range(len(like.stages)):
            for measure in MEASURES:
                values = by_seed(found, like, stage, measure)
                if values:
                    name = f"{_start(like.taught)}{like.order}_{like.pooling}_{like.mask}_stage{stage + 1}_{measure}"
                    figures |= _flat(name, mean_of(values.values()))
    return figures | _claims(found)


def _claims(found: Mapping[Recipe, Result]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for measure in MEASURES:
        masks = {mask: _over_poolings(found, mask, measure) for mask in MASKS}
        pairs = {"bidirectional_minus_causal": (masks["bidirectional"], masks["causal"])}
        each = {(pooling, mask): by_seed(found, Recipe(pooling=pooling, mask=mask), 1, measure)
                for pooling in POOLINGS for mask in MASKS}  # fmt: skip
        for pooling in POOLINGS:
            pairs[f"bidirectional_minus_causal_{pooling}"] = (each[pooling, MASKS[0]], each[pooling, MASKS[1]])
        for pooling in (one for one in POOLINGS if one != "latent"):
            pairs[f"latent_minus_{pooling}"] = (each["latent", MASKS[0]], each[pooling, MASKS[0]])
        for taught in (False, True):
            last = {order: by_seed(found, Recipe(order=order, taught=taught), -1, measure) for order in ORDERS}
            for order in [*ORDERS][::-1]:
                if order != "two_stages":
                    pairs[f"{_start(taught)}two_stages_minus_{order}"] = (last["two_stages"], last[order])
            pairs[f"{_start(taught)}one_alone_minus_one_in_batch"] = (last["one_alone"], last["one_in_batch"])
        for name, (one, other) in pairs.items():
            if one.keys() & other.keys():
                difference = paired(one, other)
                figures |= _flat(f"{name}_{measure}", difference)
                figures[f"{name}_{measure}_holds_zero"] = difference.holds_zero
    return figures


def _start(taught: bool) -> str:
    return "taught_" if taught else ""


def _over_poolings(found: Mapping[Recipe, Result], mask: str, measure: str) -> dict[int, float]:
    """Seed -> mean over the poolings, of the seeds that have all of them."""
    each = [by_seed(found, Recipe(pooling=pooling, mask=mask), 1, measure) for pooling in POOLINGS]
    seeds = set.intersection(*(set(one) for one in each))
    return {seed: float(np.mean([one[seed] for one in each])) for seed in seeds}


def poolings_table(figures: Mapping[str, Any]) -> str:
    """Markdown: Table 2, ours and the paper's."""
    lines = [
        "| pooling, mask | nDCG@10, stage 1 | nDCG@10, stage 2 | classification | clustering "
        "| paper: retrieval, stage 1 | retrieval, stage 2 | all 56 tasks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (pooling, mask), paper in PAPER_POOLINGS.items():
        name = f"two_stages_{pooling}_{mask}"
        keys = [f"{name}_stage1_ndcg_at_10", *(f"{name}_stage2_{one}" for one in ("ndcg_at_10", *MEASURES[3:]))]
        cells = [_shown(figures, key) for key in keys] + [f"{value:.2f}" for value in paper]
        lines.append(_row(f"{POOLING_TITLES[pooling]}, {mask}", cells))
    return "\n".join(lines) + "\n"


def orders_table(figures: Mapping[str, Any]) -> str:
    """Markdown: Table 4, ours and the paper's."""
    lines = [
        "| stages | from random weights: nDCG@10 | classification | clustering "
        "| after 100 steps of search: nDCG@10 | classification | clustering | paper: retrieval | all 56 tasks |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for order, paper in PAPER_ORDERS.items():
        cells = []
        for taught in (False, True):
            stages = len(Recipe(order=order, taught=taught).stages)
            name = f"{_start(taught)}{order}_latent_bidirectional_stage{stages}"
            cells += [_shown(figures, f"{name}_{one}") for one in ("ndcg_at_10", *MEASURES[3:])]
        lines.append(_row(ORDER_TITLES[order], cells + [f"{value:.2f}" for value in paper]))
    return "\n".join(lines) + "\n"


def claims_table(figures: Mapping[str, Any]) -> str:
    """Markdown: differences after the last stage, paired by seed; bold where the interval leaves out 0."""
    lines = ["| difference | nDCG@10 | classification | clustering |", "|---|---|---|---|"]
    suffix = "_ndcg_at_10_holds_zero"
    for name in [key.removesuffix(suffix) for key in figures if key.endswith(suffix) and not key.startswith("side_")]:
        cells = []
        for measure in ("ndcg_at_10", *MEASURES[3:]):
            text = _shown(figures, f"{name}_{measure}", sign="+")
            cells.append(text if figures.get(f"{name}_{measure}_holds_zero", True) else f"**{text}**")
        lines.append(_row(_title(name), cells))
    return "\n".join(lines) + "\n"


def _title(name: str) -> str:
    """`bidirectional_minus_causal_mean` -> `bidirectional - causal, mean`."""
    is_taught, name = name.startswith(_start(True)), name.removeprefix(_start(True))
    one, _, other = name.partition("_minus_")
    titles = POOLING_TITLES | ORDER_TITLES
    if one == MASKS[0]:
        pooling = other.removeprefix(MASKS[1]).removeprefix("_")
        return f"{one} - {MASKS[1]}, {titles.get(pooling, 'mean of the poolings')}"
    after = " (after 100 steps of search)" if is_taught else ""
    return f"{titles[one]} - {titles[other]}{after}"


def _flat(name: str, mean: Mean) -> dict[str, Any]:
    half = {f"{name}_half_width": mean.half} if mean.seeds > 1 else {}
    return {f"{name}_mean": mean.value, **half, f"{name}_seeds": mean.seeds}


def _shown(figures: Mapping[str, Any], name: str, digits: int = 3, sign: str = "") -> str:
    if f"{name}_mean" not in figures:
        return "not run"
    half = figures.get(f"{name}_half_width", float("nan"))
    return Mean(figures[f"{name}_mean"], half, figures[f"{name}_seeds"]).text(digits, sign)


def _row(title: str, cells: Sequence[str]) -> str:
    return f"| {title} | {' | '.join(cells)} |"
