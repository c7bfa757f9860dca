"""Run the proof grid of the contrastive step and write its table, docs/gradient-proof.md.

Run from the root of the repository: OMP_NUM_THREADS=1 PYTHONPATH=. python tools/gradient_proof.py
"""

from __future__ import annotations

import argparse
import datetime
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from tests.helpers.cases import Case
from tests.helpers.grid import BOUND, GRID, LONG_GRID, OPTIONS, OPTIONS_UNDER_R_DROP, run_grid
from tests.helpers.world import World

INTRODUCTION = """# The gradient in every layout

Each line is two optimizer steps on real processes over gloo, in float32, held against one process that has the whole
batch: Hugging Face's Mistral, the pooling head in its plain order of operations, a loss that computes one score
after the other, torch's AdamW, all in float64 (`tests/helpers/plain.py`). The batch has 7 queries (another number
where a line says so), which neither 2 nor 4 ranks divide; unequal numbers of negatives; a query with two positives;
a document that two queries share; queries with and without in-batch negatives; two data sets. Clipping is on and
active, unless a line says so.

Differences are the largest of both steps and all ranks. Loss and clip norm: relative. Gradient and parameters: the
largest difference of a tensor over the largest value of that tensor (or over 0.0001, parameters 0.001, where all are
smaller), of the worst tensor; parameters after two steps. The distributed optimizer keeps only a part of each rank's
sums, so there the gradient shows in norm and parameters. Bound: {bound:g}.

- `CP` ranks that share each text, `W` data-parallel ranks, `chunks` model chunks of a stage (interleaved where more
  than one).
- `packs` of the rank with most (microbatches).
- `reduction`: overlapped with the backward pass or after it; of the whole gradient or, with the distributed optimizer,
  of shards.

Tests of the test (`tests/distributed/test_step.py`): without the factor W, or without what other ranks say of a
passage, gradient and parameters are off by more than 1e-3.

Largest difference of all {count} lines: **{worst:.1e}**.

Written by `tools/gradient_proof.py` on {date}, commit {commit};
{processor}, Python {python}, torch {torch}, megatron-core {megatron}, transformers {transformers}.
The suite runs the same lines, those of the last table among its long tests.
"""
HEADER = """
| processes | TP | SP | PP | chunks | CP | W | way | packs | reduction | else | loss | clip norm | gradient \
| parameters |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""
COMPARED = ("loss", "norm", "gradient", "parameters")


def worst_of(results: list[dict[str, float]]) -> dict[str, float]:
    return {name: max(result[name] for result in results) for name in COMPARED}


def remarks(case: Case) -> str:
    """What is special about a case besides its layout and way."""
    options = {str(loss): name for name, loss in (OPTIONS | OPTIONS_UNDER_R_DROP).items()}
    parts = [options[str(case.loss)]] if case.loss else []
    parts += [f"{case.queries} queries"] if case.queries != Case.queries else []
    stages = {"first": case.first, "last": case.last}
    parts += [f"{layers} layer(s) in the {name} stage" for name, layers in stages.items() if layers]
    parts += [case.kind] if case.kind != Case.kind else []
    parts += ["adapters on " + ", ".join(case.targets)] if case.targets else []
    parts += [f"texts moved by {case.fgm}"] if case.fgm else []
    parts += ["no clipping"] if not case.clip else []
    parts += [f"exchange by {case.exchange.replace('_', '-')}"] if case.exchange != Case.exchange else []
    return ", ".join(parts)


def line(case: Case, results: list[dict[str, float]]) -> str:
    when = "overlapped" if case.overlap else "after"
    what = "shards" if case.distributed else "whole"
    cells = [case.world, case.tp, "on" if case.sp else "", case.pp, case.chunks, case.cp, case.ranks]
    cells += [case.way, max(int(result["microbatches"]) for result in results), f"{when}, {what}", remarks(case)]
    found = worst_of(results)
    cells += ["" if name == "gradient" and case.distributed else f"{found[name]:.1e}" for name in COMPARED]
    return "| " + " | ".join(str(cell) for cell in cells) + " |\n"


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603, S607


def processor() -> str:
    """The processor's name, where Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.machine()


def document(results: dict[Case, list[dict[str, float]]]) -> str:
    worst = max(max(worst_of(one).values()) for one in results.values())
    text = INTRODUCTION.format(
        bound=BOUND,
        count=len(results),
        worst=worst,
        date=datetime.date.today(),
        commit=git("rev-parse", "--short", "HEAD") + ("" if not git("status", "--porcelain", "-uno") else ", changed"),
        processor=processor(),
        python=platform.python_version(),
        torch=version("torch"),
        megatron=version("megatron-core"),
        transformers=version("transformers"),
    )
    for title, cases in (GRID | LONG_GRID).items():
        text += f"\n## {title}\n" + HEADER + "".join(line(case, results[case]) for case in cases)
    return text


def main() -> int:
    """Returns 1 where a line is over the bound; the table is written all the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/gradient-proof.md"), help="default: %(default)s")
    output = parser.parse_args().output
    worlds: dict[int, World] = {}
    try:
        results = run_grid(lambda size: worlds.get(size) or worlds.setdefault(size, World(size)), GRID | LONG_GRID)
    finally:
        for world in worlds.values():
            world.stop()
    output.write_text(document(results), encoding="utf-8")
    over = [str(case) for case, one in results.items() if max(worst_of(one).values()) > BOUND]
    print("\n".join(["over the bound:", *over]) if over else f"{len(results)} lines within {BOUND:g}: {output}")
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main())
