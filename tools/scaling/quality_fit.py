"""Curves through the means over seeds: which form the points bear, its parameters, and how far seeds move them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

X_OF = {
    "negatives": "negatives",
    "negatives_alone": "negatives",
    "negatives_equal_steps": "negatives",
    "tokens": "tokens_seen",
    "width": "width",
    "temperature": "temperature",
}
MORE_IS_BETTER = ("tokens", "width")
"""Axes on which no form with a best value is tried: their largest value is not past one."""
RESAMPLES = 1000
_EXPONENTS = np.geomspace(0.02, 4, 200)

Params = dict[str, float]


@dataclass(frozen=True)
class Form:
    """A family of curves.

    Attributes:
        text: the formula.
        fit: (x, y), float64 [n] each -> parameters of least squares.
        curve: (x [n], parameters) -> y [n].
        fewest: points that it needs, one more than it has parameters.
    """

    text: str
    fit: Callable[[np.ndarray, np.ndarray], Params]
    curve: Callable[[np.ndarray, Params], np.ndarray]
    fewest: int


def _fit_log(x: np.ndarray, y: np.ndarray) -> Params:
    slope, constant = np.polyfit(np.log2(x), y, 1)
    return {"a": float(constant), "b": float(slope)}


def _fit_power(x: np.ndarray, y: np.ndarray) -> Params:
    """For each exponent the rest is linear; the best of a fine grid."""
    scale = float(np.exp(np.log(x).mean()))
    powers = (x / scale) ** -_EXPONENTS[:, None]
    centred, target = powers - powers.mean(1, keepdims=True), y - y.mean()
    slopes = (centred @ target) / (centred**2).sum(1)
    errors = ((target - slopes[:, None] * centred) ** 2).sum(1)
    best = int(errors.argmin())
    limit = y.mean() - slopes[best] * powers[best].mean()
    exponent = float(_EXPONENTS[best])
    return {"limit": float(limit), "a": float(-slopes[best] * scale**exponent), "exponent": exponent}


def _fit_parabola(x: np.ndarray, y: np.ndarray) -> Params:
    square, slope, constant = np.polyfit(np.log2(x), y, 2)
    middle = -slope / (2 * square) if square else 0.0
    top = constant - square * middle**2
    # Beyond the largest float there is no best.
    return {"best": float(2.0 ** np.clip(middle, -60, 60)), "top": float(top), "curvature": float(-square)}


FORMS = {
    "log": Form("y = a + b log2(x)", _fit_log, lambda x, p: p["a"] + p["b"] * np.log2(x), 3),
    "power": Form("y = limit - a x^-exponent", _fit_power, lambda x, p: p["limit"] - p["a"] * x ** -p["exponent"], 4),
    "parabola": Form(
        "y = top - curvature log2(x / best)^2",
        _fit_parabola,
        lambda x, p: p["top"] - p["curvature"] * np.log2(x / p["best"]) ** 2,
        4,
    ),
}


@dataclass(frozen=True)
class Fit:
    """A curve through the points of an axis.

    Attributes:
        form: name of its form: of those that the points bear, the one that tells each point best from the others
            (leave one out); where they bear none, the nearest.
        parameters: of all points.
        low, high: of each parameter, 95 % of the resamples; empty where no value has two seeds.
        residual: root mean square of the means about the curve.
        left_out: root mean square of the means about the curves of the others.
        deviation: of the seeds about the means (`seed_deviation`).
        band: (low, high) of the curve at x.
    """

    form: str
    parameters: Params
    low: Params
    high: Params
    residual: float
    left_out: float
    deviation: float | None
    band: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray] | None]

    def curve(self, x: np.ndarray) -> np.ndarray:
        return FORMS[self.form].curve(x, self.parameters)

    @property
    def is_borne(self) -> bool:
        """Whether the means are no farther from the curve than two deviations between seeds, as far as one knows."""
        return _bears(self.residual, self.deviation)


Levels = list[tuple[float, list[float]]]
"""(x, the values of its seeds), in order of x."""


def levels_of(rows: Iterable[dict[str, Any]], axis: str) -> Levels:
    """The points of an axis. Numbers of tokens differ a little from seed to seed: their mean."""
    groups: dict[tuple, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row["axis"] == axis:
            key = tuple(row[name] for name in ("batch", "parts", "width", "steps", "temperature"))
            groups[key].append((row[X_OF[axis]], row["ndcg_at_10"]))
    return sorted((float(np.mean([x for x, _ in group])), [y for _, y in group]) for group in groups.values())


def seed_deviation(levels: Levels) -> float | None:
    """Standard deviation between seeds, pooled over the points; None where no point has two."""
    freedom = sum(len(values) - 1 for _, values in levels)
    if freedom == 0:
        return None
    return float(np.sqrt(sum(((np.array(v) - np.mean(v)) ** 2).sum() for _, v in levels) / freedom))


def fit(levels: Levels, axis: str) -> Fit | None:
    """A curve of one of the forms of an axis, with intervals by resampling residuals of the seeds.

    Residuals about the means are pooled over the points (a point has two or three) and stretched by
    sqrt(n / (n - 1)); a resample draws new means from them. None with fewer than 3 points.

    Raises:
        ValueError: an x is not above zero, or a value is no number.
    """
    x, y = np.array([at for at, _ in levels]), np.array([np.mean(values) for _, values in levels])
    if (x <= 0).any() or not np.isfinite(y).all():
        raise ValueError(f"points must have x above 0 and finite values, got {levels}")
    errors = {
        name: _left_out(form, x, y)
        for name, form in FORMS.items()
        if len(x) >= form.fewest and not (name == "parabola" and axis in MORE_IS_BETTER)
    }
    if not errors:
        return None
    deviation = seed_deviation(levels)
    fitted = {name: FORMS[name].fit(x, y) for name in errors}
    fitted = {name: one for name, one in fitted.items() if _has_its_best_inside(one, x)}
    residuals = {name: _rms(FORMS[name].curve(x, one) - y) for name, one in fitted.items()}
    borne = [name for name in fitted if _bears(residuals[name], deviation)]
    name = min(borne, key=errors.__getitem__) if borne else min(residuals, key=residuals.__getitem__)
    form, parameters = FORMS[name], fitted[name]
    resampled = [form.fit(x, one) for one in _resamples(levels, y)]
    low, high = (
        {key: float(np.percentile([one[key] for one in resampled], q)) for key in parameters} if resampled else {}
        for q in (2.5, 97.5)
    )

    def band(at: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        curves = [form.curve(at, one) for one in resampled]
        return tuple(np.percentile(curves, [2.5, 97.5], axis=0)) if curves else None

    return Fit(name, parameters, low, high, residuals[name], errors[name], deviation, band)


def _has_its_best_inside(parameters: Params, x: np.ndarray) -> bool:
    """Of a parabola; points on one side of it say nothing of where it turns."""
    return "best" not in parameters or (parameters["curvature"] > 0 and x[0] <= parameters["best"] <= x[-1])


def _bears(residual: float, deviation: float | None) -> bool:
    return deviation is None or residual <= 2 * deviation


def _rms(gaps: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(gaps))))


def _left_out(form: Form, x: np.ndarray, y: np.ndarray) -> float:
    gaps = []
    for one in range(len(x)):
        others = np.arange(len(x)) != one
        gaps.append(float(form.curve(x[one : one + 1], form.fit(x[others], y[others]))[0] - y[one]))
    return _rms(np.array(gaps))


def _resamples(levels: Levels, means: np.ndarray) -> list[np.ndarray]:
    several = [np.array(values) for _, values in levels if len(values) > 1]
    if not several:
        return []
    pool = np.concatenate([(v - v.mean()) * np.sqrt(len(v) / (len(v) - 1)) for v in several])
    numbers, random = [len(values) for _, values in levels], np.random.default_rng(0)
    return [means + [random.choice(pool, number).mean() for number in numbers] for _ in range(RESAMPLES)]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Flat figures of every axis: means, form, parameters with intervals, residual, deviation of seeds."""
    figures: dict[str, Any] = {}
    for axis in X_OF:
        levels = levels_of(rows, axis)
        for x, values in levels:
            figures[f"ndcg_of_{axis}_{x:g}"] = round(float(np.mean(values)), 4)
        found = fit(levels, axis) if levels else None
        if found is None:
            continue
        figures[f"form_of_{axis}"] = FORMS[found.form].text
        for name, value in found.parameters.items():
            figures[f"{name}_of_{axis}"] = value
            if found.low:
                figures[f"{name}_of_{axis}_low"] = found.low[name]
                figures[f"{name}_of_{axis}_high"] = found.high[name]
        figures[f"residual_of_{axis}"] = found.residual
        figures[f"left_out_of_{axis}"] = found.left_out
        figures[f"seed_deviation_of_{axis}"] = found.deviation
        figures[f"is_borne_of_{axis}"] = found.is_borne
    return figures
