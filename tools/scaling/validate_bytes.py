"""Bytes that the cost model says a rank sends, against those that were counted in steps of the trainer."""

from __future__ import annotations

from collections.abc import Sequence

from real_cases import cases
from real_steps import Case, Measured, run

from nvembed_mcore.scaling.traffic import traffic_of

Row = dict[str, float | str]


def bytes_rows(some: Sequence[Case], measured: dict[str, list[Measured]]) -> list[Row]:
    """A row for each case, data-parallel rank and stage, of all bytes; the error is that of the worst kind and group
    that has a thousandth of the rank's bytes or more."""
    rows: list[Row] = []
    for case in some:
        if case.world == 1:
            continue
        ranks = {(one.pp_rank, one.dp_rank): one for one in measured[case.name]}
        for (stage, dp_rank), found in sorted(ranks.items()):
            model = traffic_of(case.workload, case.layout, stage, dp_rank)
            total = sum(found.traffic.values())
            errors = {
                key: abs(model.get(key, 0.0) - found.traffic.get(key, 0)) / found.traffic.get(key, total)
                for key in model.keys() | found.traffic.keys()
                if max(model.get(key, 0.0), found.traffic.get(key, 0)) >= total / 1000
            }
            worst = max(errors, key=errors.get)
            rows.append(
                {
                    "case": f"{case.name}; stage {stage}, data rank {dp_rank}",
                    "measured": total,
                    "model": sum(model.values()),
                    "error": errors[worst],
                    "worst": f"{worst[0]} over {worst[1]} ranks" if errors[worst] else "",
                }
            )
    return rows


def show_bytes(rows: list[Row]) -> None:
    """Print every row."""
    print(f"{'bytes of a rank in a step, MB':56}{'counted':>10}{'model':>10}{'error':>8}   where")
    for row in rows:
        sizes = "".join(f"{row[name] / 1e6:10.3f}" for name in ("measured", "model"))
        print(f"{row['case']:56}{sizes}{row['error']:8.2%}   {row['worst']}")


def report(most: int = 4) -> dict[str, float]:
    """Measure, print every row, and return the figures.

    Args:
        most: processes of the largest layout.
    """
    rows = bytes_rows(cases(most), run(cases(most)))
    show_bytes(rows)
    return {"max_error_bytes": max(row["error"] for row in rows), "rows_bytes": float(len(rows))}
