"""Constants of the time model by least squares with a prior, with their spread, and the file that keeps them."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from validate_published import FITTED_DEVICE, FITTED_FAMILY, Row, errors

from nvembed_mcore.scaling import hardware

PRIORS = {
    "matmul_share": (0.85, 0.1),
    "matmul_half": (100.0, 0.5),
    "memory_share": (0.75, 0.2),
    "exposed": (0.2, 0.7),
}
"""What was expected before, and the standard deviation of its logarithm. Products in a step have neither the shapes
nor the coolness of the fastest one; edges of tiles are 64 to 256 long; norms reach 3.7 of 4.8 TB/s on an H200
(cudnn-frontend); of overlapped communication a part is never hidden."""
CHOSEN = {"host_layer": (0.00033, 0.00017, 0.00066), "host_step": (0.01, 0.005, 0.03)}
"""Value, low and high of what no row says, since none is bound by the host: forty calls of 8 us a layer; the plan of
a step, its packs and the optimizer's calls."""
NINE_IN_TEN = 1.645
"""Standard deviations on both sides that hold nine in ten of a normal distribution."""


@dataclass(frozen=True)
class Fit:
    """Values; standard deviations of their logarithms; root mean square of the logarithms of predicted / measured."""

    values: dict[str, float]
    spread: dict[str, float]
    rms: float


def fit(
    logarithms: Callable[[dict[str, float]], np.ndarray],
    weights: np.ndarray,
    priors: dict[str, tuple[float, float]],
    expected_error: float = 0.05,
) -> Fit:
    """Least `sum w (log error / expected_error)^2 + sum ((x - prior) / deviation)^2`, by Gauss-Newton on logarithms.

    Args:
        logarithms: constants -> log(predicted / measured) of each row.
        weights: of each row; rows of one run should have 1 together.
    """
    names = list(priors)
    start = np.array([math.log(priors[name][0]) for name in names])
    deviation = np.array([priors[name][1] for name in names])
    root = np.sqrt(weights)

    def at(x: np.ndarray) -> np.ndarray:
        return logarithms(dict(zip(names, np.exp(x).tolist(), strict=True)))

    x = start.copy()
    for _ in range(10):
        here = at(x)
        slopes = np.stack([(at(x + 1e-3 * unit) - here) / 1e-3 for unit in np.eye(len(x))], 1)
        matrix = np.vstack([slopes * root[:, None] / expected_error, np.diag(1 / deviation)])
        wanted = np.concatenate([-here * root / expected_error, (start - x) / deviation])
        x = x + np.clip(np.linalg.lstsq(matrix, wanted, rcond=None)[0], -0.3, 0.3)
    spread = np.sqrt(np.diag(np.linalg.inv(matrix.T @ matrix)))
    rms = float(np.sqrt((weights * at(x) ** 2).sum() / weights.sum()))
    by_name = (dict(zip(names, values.tolist(), strict=True)) for values in (np.exp(x), spread))
    return Fit(*by_name, rms)


def write(found: Fit, chosen: dict[str, tuple[float, float, float]], source: str, path: Path) -> None:
    """Store constants with the range of nine in ten."""
    lines = [
        "# Written by `tools/scaling/validate.py --fit`; do not edit. low to high holds nine in ten.",
        f'source: "{source}"',
        "constants:",
    ]
    wide = {name: math.exp(NINE_IN_TEN * deviation) for name, deviation in found.spread.items()}
    ends = {name: (value, value / wide[name], value * wide[name]) for name, value in found.values.items()} | chosen
    unexplained = math.exp(NINE_IN_TEN * found.rms)
    ends["unexplained"] = (1.0, 1 / unexplained, unexplained)
    for name, (value, low, high) in ends.items():
        lines.append(f"  {name}: {{value: {value:.4g}, low: {low:.4g}, high: {high:.4g}}}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    hardware.cluster.cache_clear()


def fit_rows(rows: list[Row]) -> Fit:
    """Fit published rows; those of one run count as one."""
    counts = Counter(_run(row) for row in rows)
    weights = np.array([1 / counts[_run(row)] for row in rows])
    return fit(lambda constants: np.log1p(errors(rows, constants)), weights, PRIORS)


def fit_published(rows: list[Row]) -> None:
    """Fit the published rows of one family, and store the constants of the GPUs."""
    fitted = [row for row in rows if row.is_fitted]
    source = (
        f"{len(fitted)} published step times of the family {FITTED_FAMILY} on {FITTED_DEVICE.upper()}s "
        f"(tools/scaling/published.yaml); {' and '.join(CHOSEN)} are chosen (tools/scaling/validate_fit.py)"
    )
    write(fit_rows(fitted), CHOSEN, source, hardware.FOLDER / "fitted.yaml")


def each_family(rows: list[Row]) -> dict[str, float]:
    """Median absolute error of all other families, with constants fitted on each family's rows on one device."""
    figures = {}
    for family in sorted({row.family for row in rows}):
        found = fit_rows([row for row in rows if row.family == family and row.device == FITTED_DEVICE])
        others = errors([row for row in rows if row.family != family], found.values)
        figures[f"median_error_fitted_on_{family}"] = statistics.median(map(abs, others))
    return figures


def _run(row: Row) -> tuple:
    return row.name, row.source, row.fp8, row.lora is None, row.layout.tp, row.layout.chunks
