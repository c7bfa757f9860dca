"""Constants of the time model from the published rows of one family: least squares with a prior, and their spread."""

from __future__ import annotations

import math
from collections import Counter
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
HOST_LAYER = (0.00033, 0.00017, 0.00066)
"""Seconds of a layer's forward calls, not in the fit since no row is bound by the host: chosen, some forty calls at
8 us, from half to twice as much."""
NINE_IN_TEN = 1.645
"""Standard deviations on both sides that hold nine in ten of a normal distribution."""


def fit(rows: list[Row], expected_error: float = 0.05) -> tuple[dict[str, float], dict[str, float], float]:
    """Fit the constants to rows; the rows of one run count as one.

    Gauss-Newton on logarithms for the least
    `sum (log error / expected_error)^2 / rows of its run + sum ((x - prior) / deviation)^2`.

    Returns:
        values; standard deviations of their logarithms; root mean square of the logarithms of the errors.
    """
    names = list(PRIORS)
    start = np.array([math.log(PRIORS[name][0]) for name in names])
    deviation = np.array([PRIORS[name][1] for name in names])
    counts = Counter(_run(row) for row in rows)
    weight = np.sqrt([1 / counts[_run(row)] for row in rows])

    def logarithms(x: np.ndarray) -> np.ndarray:
        return np.log1p(errors(rows, dict(zip(names, np.exp(x).tolist(), strict=True))))

    x = start.copy()
    for _ in range(10):
        here = logarithms(x)
        slopes = [(logarithms(x + 1e-3 * unit) - here) / 1e-3 for unit in np.eye(len(x))]
        rows_of = np.stack(slopes, 1) * weight[:, None] / expected_error
        matrix = np.vstack([rows_of, np.diag(1 / deviation)])
        wanted = np.concatenate([-here * weight / expected_error, (start - x) / deviation])
        x = x + np.clip(np.linalg.lstsq(matrix, wanted, rcond=None)[0], -0.3, 0.3)
    spread = np.sqrt(np.diag(np.linalg.inv(matrix.T @ matrix)))
    rms = float(np.sqrt((weight**2 * logarithms(x) ** 2).sum() / (weight**2).sum()))
    return dict(zip(names, np.exp(x).tolist(), strict=True)), dict(zip(names, spread.tolist(), strict=True)), rms


def _run(row: Row) -> tuple:
    return row.name, row.source, row.fp8, row.lora is None, row.layout.tp, row.layout.chunks


def write(rows: list[Row], path: Path = hardware.FOLDER / "fitted.yaml") -> None:
    """Fit the rows of the fitted family, and store the constants with the range of nine in ten."""
    fitted = [row for row in rows if row.is_fitted]
    values, spread, rms = fit(fitted)
    lines = [
        "# Written by `tools/scaling/validate.py --fit`; do not edit. low to high holds nine in ten.",
        f'source: "{len(fitted)} published step times of the family {FITTED_FAMILY} on {FITTED_DEVICE.upper()}s '
        '(tools/scaling/published.yaml); host_layer is chosen, see validate_fit.py"',
        "constants:",
    ]
    for name, value in values.items():
        wide = math.exp(NINE_IN_TEN * spread[name])
        lines.append(f"  {name}: {{value: {value:.4g}, low: {value / wide:.4g}, high: {value * wide:.4g}}}")
    lines.append("  host_layer: {{value: {:.4g}, low: {:.4g}, high: {:.4g}}}".format(*HOST_LAYER))
    wide = math.exp(NINE_IN_TEN * rms)
    lines.append(f"  unexplained: {{value: 1.0, low: {1 / wide:.4g}, high: {wide:.4g}}}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
