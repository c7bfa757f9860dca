"""Measures how training scales: one YAML file in, a table and a report out.

    python tools/scaling/study.py show STUDY.yaml       its points, and what is complete
    python tools/scaling/study.py run STUDY.yaml        on this machine, then the report
    python tools/scaling/study.py submit STUDY.yaml [SBATCH OPTIONS]
                                                        to SLURM (examples/slurm), with the report behind the runs
    python tools/scaling/study.py collect STUDY.yaml    table and report of what is complete

from the root of the repository, with the package installed. examples/scaling/README.md says what a study's file may
hold, and has some beside it. Run or submit it again, and only what is missing or failed is run; a point that the file
describes differently is another point. A run that fails is named with the end of its log and does not stop the others.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from study_local import run_all
from study_report import write_report
from study_runs import check_inputs, prepare, runs_of
from study_slurm import submit
from study_spec import Study, StudyError, read_study
from study_table import COLUMNS, Row, points_of, rows_of, write_table


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def show(study: Study) -> None:
    runs = runs_of(study)
    for point in study.points():
        repeats = [run for run in runs if run.point.name == point.name]
        complete = sum(run.is_complete() for run in repeats)
        print(f"{complete} of {len(repeats)}  {point.name}")
    if study.left_out:
        print(f"{study.left_out} combinations left out: their layout does not divide their GPUs")


def collect(study: Study) -> dict[str, Any]:
    """Write table and report; returns their figures, flat."""
    configs = prepare(study)
    runs = runs_of(study)
    rows = rows_of(study, runs)
    if study.cluster is not None:
        from study_predict import add_predictions

        add_predictions(study, rows, configs)
    failed = [run for run in runs if run.was_tried() and not run.is_complete()]
    figures = {"points": len(points_of(rows)), "runs": len(runs), "runs_complete": len(rows) - len(points_of(rows))}
    figures |= {"runs_failed": len(failed)}
    if rows:
        write_table(rows, study.output)
    command = f"python tools/scaling/study.py run {shlex.quote(str(study.file))}"
    for file in write_report(study, points_of(rows), runs, study.output, command):
        tell(f"wrote {file}")
    return figures | _flat(points_of(rows))


def _flat(rows: list[Row]) -> dict[str, Any]:
    names = ("seconds", "seconds_p95", "tokens_per_second_per_gpu", "efficiency", "communication_share", "mfu")
    names += ("memory_bytes", "predicted_seconds", "predicted_memory_bytes")
    return {f"{row['point']}_{name}": row.get(name) for row in rows for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"figures of the table:\n{COLUMNS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("show", "run", "submit", "collect"))
    parser.add_argument("study", type=Path, help="a YAML file")
    parser.add_argument("--json", type=Path, help="write the figures of all points there")
    arguments, options = parser.parse_known_args()
    if options and arguments.what != "submit":
        parser.error(f"not known: {' '.join(options)}")
    try:
        study = read_study(arguments.study)
        if arguments.what == "show":
            show(study)
            return 0
        configs = prepare(study)
        if arguments.what != "collect":
            check_inputs(study, configs)
    except StudyError as error:
        print(f"study: {error}", file=sys.stderr)
        return 78
    runs = runs_of(study)
    if arguments.what == "submit":
        submit(study, runs, options, print)
        return 0
    # Not the default, which would leave the processes of a run behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = run_all(runs, study.minutes, tell) if arguments.what == "run" else []
    figures = collect(study)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
