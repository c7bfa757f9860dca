"""Submits a study's runs to SLURM: an array of jobs for each number of nodes, and one that writes the report."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from study_runs import Run
from study_spec import Study

SCRIPTS = Path("examples/slurm")


def submit(study: Study, runs: Sequence[Run], options: Sequence[str], tell: Callable[[str], None]) -> list[str]:
    """Submit what is not complete. Tasks of an array run one at a time, and arrays one after the other, so that no run
    shares the network with another.

    Args:
        options: for every `sbatch`; they win over ours.

    Returns:
        the jobs' numbers, that of the report last.
    """
    groups: dict[tuple[int, int], list[Run]] = defaultdict(list)
    for run in runs:
        if not run.is_complete():
            groups[shape(run, study.gpus_per_node)].append(run)
    folder = study.output / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    jobs: list[str] = []
    for (nodes, ranks), some in sorted(groups.items()):
        tasks = folder / f"runs-{nodes}x{ranks}.txt"
        tasks.write_text("".join(f"{run.config}\t{run.folder}\n" for run in some), encoding="utf-8")
        words = [
            f"--array=1-{len(some)}%1",
            f"--nodes={nodes}",
            f"--ntasks-per-node={ranks}",
            f"--gpus-per-node={ranks}",
            f"--time={max(1, round(study.minutes))}",
            f"--output={folder}/%A_%a.out",
            *([f"--dependency=afterany:{jobs[-1]}"] if jobs else []),
        ]
        jobs.append(_sbatch([*words, *options, str(SCRIPTS / "study.sbatch"), str(tasks)]))
        tell(f"{jobs[-1]} {len(some)} runs on {nodes} node(s) with {ranks} rank(s) each")
    # After failures too: the report names them.
    wait = [f"--dependency=afterany:{':'.join(jobs)}"] if jobs else []
    one = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", f"--output={folder}/report-%j.out"]
    jobs.append(_sbatch([*options, *one, *wait, str(SCRIPTS / "study_report.sbatch"), str(study.file)]))
    tell(f"{jobs[-1]} the report")
    return jobs


def shape(run: Run, gpus_per_node: int) -> tuple[int, int]:
    """Nodes, and ranks on each."""
    gpus = run.point.gpus
    return (1, gpus) if gpus <= gpus_per_node else (gpus // gpus_per_node, gpus_per_node)


def _sbatch(words: Sequence[str]) -> str:
    """The number of the new job; what sbatch says where it refuses is the error."""
    done = subprocess.run(["sbatch", "--parsable", *words], capture_output=True, text=True)  # noqa: S603, S607
    if done.returncode:
        sys.exit(f"sbatch {' '.join(words)}\n{done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]
