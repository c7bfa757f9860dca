"""Memory that the cost model says a rank holds, against what torch's allocator gave out in steps of the trainer."""

from __future__ import annotations

from collections.abc import Sequence

from real_cases import GPU, cases
from real_steps import Case, Measured, run

from nvembed_mcore.scaling.memory import rank_memory

Row = dict[str, float | str]


def memory_rows(some: Sequence[Case], measured: dict[str, list[Measured]]) -> list[Row]:
    """A row for each case and pipeline stage: bytes measured on its fullest rank, bytes of the model, the error."""
    rows: list[Row] = []
    for case in some:
        for stage in range(case.pp):
            fullest = max(
                (one for one in measured[case.name] if one.pp_rank == stage), key=lambda one: one.static + one.work
            )
            kinds = rank_memory(case.workload, case.layout, stage)
            found, model = fullest.static + fullest.work, sum(kinds.values())
            held = kinds["weights"] + kinds["gradients"] + kinds["optimizer"]
            rows.append(
                {
                    "case": f"{case.name}, stage {stage}" if case.pp > 1 else case.name,
                    "measured": found,
                    "model": model,
                    "error": abs(model - found) / found,
                    "measured_work": fullest.work,
                    "model_work": model - held,
                    "measured_static": fullest.static,
                    "model_static": held,
                    "gather_and_loss": kinds["gather_and_loss"],
                }
            )
    return rows


def show_memory(rows: list[Row]) -> None:
    """Print every row."""
    print(f"{'memory of a rank, MB':44}{'measured':>10}{'model':>10}{'error':>8}   of it work: measured, model")
    for row in rows:
        sizes = "".join(f"{row[name] / 1e6:10.2f}" for name in ("measured", "model"))
        work = " ".join(f"{row[name] / 1e6:10.2f}" for name in ("measured_work", "model_work"))
        print(f"{row['case']:44}{sizes}{row['error']:8.1%}   {work}")


def report(most: int = 4) -> dict[str, float]:
    """Measure, print every row, and return the figures. Where there is a GPU, steps on it are measured too.

    Args:
        most: processes of the largest layout.
    """
    from nvembed_mcore import device

    rows = memory_rows(cases(most), run(cases(most)))
    show_memory(rows)
    figures = {"max_error_memory": max(row["error"] for row in rows), "rows_memory": float(len(rows))}
    if device.has_cuda():
        on_gpu = memory_rows(GPU, run(tuple(GPU)))
        show_memory(on_gpu)
        figures["max_error_memory_gpu"] = max(row["error"] for row in on_gpu)
    return figures
