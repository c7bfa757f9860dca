"""Step times of gloo processes in this trainer's own study on a CPU, against the cost model with host constants that
were fitted on one layout of it.

The measurements are docs/scaling/cpu.csv, those of examples/scaling/cpu.yaml, whose texts are made, so that the model
needs no data. Constants are fitted on the points of one process; two processes, by data, tensor and pipeline
parallelism, are what they are tested on.
"""

from __future__ import annotations

import csv
import dataclasses
import statistics
import tempfile
from pathlib import Path

import numpy as np
from study_predict import workload
from study_runs import prepare
from study_spec import read_study
from validate_fit import Fit, fit, write

from nvembed_mcore.scaling import hardware
from nvembed_mcore.scaling.hardware import Cluster
from nvembed_mcore.scaling.layout import Layout
from nvembed_mcore.scaling.predict import predict
from nvembed_mcore.scaling.workload import Workload

ROOT = Path(__file__).parents[2]
STUDY, TABLE = ROOT / "examples" / "scaling" / "cpu.yaml", ROOT / "docs" / "scaling" / "cpu.csv"
PRIORS = {
    "matmul_share": (0.7, 0.3),
    "matmul_half": (50.0, 0.5),
    "memory_share": (0.5, 0.5),
    "host_layer": (0.0005, 0.7),
    "host_step": (0.01, 0.7),
}
"""What was expected before, and the standard deviation of its logarithm: little is known of a host."""
CHOSEN = {"exposed": (0.2, 0.0, 0.4)}
"""No point overlaps anything."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A point: its name, what it computes in which layout, and seconds of a step, with how far repeats are apart."""

    name: str
    workload: Workload
    layout: Layout
    seconds: float
    spread: float

    def predicted(self, cluster: Cluster) -> float:
        return predict(self.workload, self.layout, cluster, has_range=False).total


def measured() -> list[Measured]:
    """The points of the table.

    Raises:
        ValueError: the table has a point that the study has not: it was measured with another file.
    """
    with open(TABLE, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["row"] == "point"]
    with tempfile.TemporaryDirectory() as folder:
        study = dataclasses.replace(read_study(STUDY), output=Path(folder))
        configs = prepare(study)
        # A synthetic point's name does not depend on where the study writes.
        points = {point.name: point for point in study.points()}
    found = []
    for row in rows:
        if row["point"] not in points:
            raise ValueError(f"{TABLE} has {row['point']}, which {STUDY} does not describe: measure it again")
        point, config = points[row["point"]], configs[row["point"]]
        layout = dataclasses.replace(Layout.of(config, point.gpus), way=row["way"])
        work = workload(config, point, study)
        # A single repeat has no spread.
        found.append(Measured(point.name, work, layout, float(row["seconds"]), float(row["spread"] or 0)))
    return found


def report() -> dict[str, float]:
    """Print every point with its error, those of the fit first; the figures for `validate.py`."""
    points = measured()
    fitted, others = [p for p in points if p.layout.gpus == 1], [p for p in points if p.layout.gpus > 1]
    found = fit_host(fitted)
    cluster = hardware.cluster("cpu").with_constants(**found.values)
    print("Step times of this trainer over gloo: seconds measured (spread of the repeats), predicted, error")
    for name, some in (("fitted on", fitted), ("tested on", others)):
        for point in some:
            ours = point.predicted(cluster)
            print(
                f"  {name} {point.name:<70} {point.seconds:.3f} ({point.spread:.0%})  {ours:.3f} "
                f"{ours / point.seconds - 1:+.1%}"
            )
    for name, value in found.values.items():
        print(f"  {name} {value:.4g}, standard deviation of its logarithm {found.spread[name]:.2f}")
    errors = {name: _errors(some, cluster) for name, some in (("fitted", fitted), ("tested", others))}
    return {
        "median_error_seconds": statistics.median(errors["tested"]),
        "max_error_seconds": max(errors["tested"]),
        "median_error_seconds_fitted": statistics.median(errors["fitted"]),
        "rows_seconds": len(others),
        "median_spread_seconds": statistics.median(point.spread for point in points),
    }


def fit_host(points: list[Measured]) -> Fit:
    """Constants of the host by the points of one process."""
    cluster = hardware.cluster("cpu")

    def logarithms(values: dict[str, float]) -> np.ndarray:
        changed = cluster.with_constants(**values)
        return np.log([point.predicted(changed) / point.seconds for point in points])

    return fit(logarithms, np.ones(len(points)), PRIORS)


def fit_and_store() -> None:
    """Write `hardware/fitted_cpu.yaml`."""
    found = fit_host([point for point in measured() if point.layout.gpus == 1])
    source = "tools/scaling/validate_seconds.py: points of one process in docs/scaling/cpu.csv"
    write(found, CHOSEN, source, hardware.FOLDER / "fitted_cpu.yaml")


def _errors(points: list[Measured], cluster: Cluster) -> list[float]:
    return [abs(point.predicted(cluster) / point.seconds - 1) for point in points]
