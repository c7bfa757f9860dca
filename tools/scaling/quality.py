"""How good a model becomes: nDCG@10 against negatives, width, tokens and temperature, on the quick start's data.

Run from the root of the repository, one thread a process:
    export PYTHONPATH=. OMP_NUM_THREADS=1
    python tools/scaling/quality.py train OUTPUT                  all runs; several processes share them
    python tools/scaling/quality.py report OUTPUT --to docs/scaling    table, fits and plots of what is there

Each point is a run of `nvembed train` with a configuration of its own, evaluated on the 3,000 held-out queries. The
data are those of examples/quickstart/run.sh: taken from its folder, or made. A finished run is skipped and one that
somebody else has is left to him, so the same command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from nvembed_mcore.progress import show_each
from nvembed_mcore.run_lock import RunInUseError, lock
from tools.scaling.quality_points import (
    AXES,
    Folders,
    Run,
    architecture_of,
    deal,
    identity_of,
    plan,
    read_result,
    record_count,
    rows_of,
    tree_of,
)

ROOT = Path(__file__).parent.parent.parent
SEEDS = dict.fromkeys(AXES, 3) | {"negatives_alone": 2, "negatives_equal_steps": 2, "rate": 1}
"""Seeds of each axis where --seeds does not say otherwise."""
FIGURES = """
Figures of --json and columns of the table, one row for each axis and run:

  axis            negatives: the batch grows, equal queries seen, rate as column lr.
                  negatives_alone: one batch size, the records dealt into parts, a query meets its own part alone.
                  negatives_equal_steps: the batch grows at equal steps, so a larger one sees more queries.
                  tokens: runs of several lengths, each with its own schedule.
                  tokens_on_the_way: evaluations inside the longest of them. width, temperature.
                  rate: factors on the learning rate, at a batch of 256 (4 passes) and of 4,096 (8 passes).
  negatives       in-batch negatives of a query (mean); batch, parts: queries in a step, and parts of the records
  lr              peak learning rate; linear warm-up over a tenth of the steps, then linear decay to zero
  steps, of_steps optimizer steps done, and of the whole run
  queries_seen, tokens_seen    up to there; tokens of queries and documents
  parameters      of the model, the table of embeddings included
  ndcg_at_10, recall_at_10, recall_at_100, mrr_at_10    on the held-out queries, among all held-out documents
  loss            training loss, mean over the last 5 steps; not comparable between numbers of negatives
  seconds         of the training steps

  --json: ndcg_of_AXIS_X, mean over seeds; form_of_AXIS, the formula of the fitted curve; PARAMETER_of_AXIS, with _low
  and _high (95 %, bootstrap over seeds); residual_of_AXIS, of the means (root mean square); left_out_of_AXIS, the same
  of each point about the curve through the others; seed_deviation_of_AXIS; is_borne_of_AXIS, whether the residual is
  within two of these; points, the rows of the table.
"""


def main() -> None:
    """`train` or `report`."""
    options = _options()
    folders = Folders(Path(options.output).resolve(), Path(options.quickstart).resolve())
    seeds = SEEDS if options.seeds is None else dict.fromkeys(AXES, options.seeds)
    if options.command == "train":
        make_data(folders.quickstart)
        for run in show_each(list(plan(options.axes, seeds)), "study", "runs"):
            train(run, folders)
    else:
        report(options, folders, seeds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=FIGURES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["train", "report"])
    parser.add_argument("output", help="folder for the runs, a few MB each")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES, help="default: all")
    parser.add_argument("--seeds", type=int, help=f"of each axis; default: {SEEDS}")
    parser.add_argument(
        "--quickstart", default="runs/quickstart", help="folder with the quick start's data, or for it"
    )
    parser.add_argument(
        "--to", metavar="FOLDER", help="report: quality.csv and quality-*.png go there (default OUTPUT)"
    )
    parser.add_argument("--json", metavar="PATH", help="report: write the figures there")
    options = parser.parse_args()
    if options.seeds is not None and options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    return options


def make_data(quickstart: Path) -> None:
    """The quick start's tokenizer and data, as it makes them, unless they are there."""
    if (quickstart / "data" / "train.jsonl").exists():
        return
    program = [sys.executable, "-m", "nvembed_mcore", "data"]
    tokenizer = str(quickstart / "tokenizer")
    docs = [
        "python-docs",
        str(quickstart / "data"),
        "--tokenizer",
        tokenizer,
        "--held-out",
        "3000",
        "--negatives",
        "2",
    ]
    packages = ["--packages", "stdlib", "numpy", "torch", "transformers"]
    for words in (["tokenizer", tokenizer], [*docs, *packages]):
        subprocess.run([*program, *words], check=True)  # noqa: S603


def train(run: Run, folders: Folders) -> None:
    """Train a run unless its result is there or another process is at it.

    Raises:
        ValueError: the folder holds the result of another configuration.
    """
    if finished(run, folders) is not None:
        return
    claims = folders.output / "claims" / run.name
    claims.mkdir(parents=True, exist_ok=True)
    try:
        claim = lock(claims, patience=0)
    except RunInUseError:
        return
    with claim:
        # Another process may have finished it since.
        if finished(run, folders) is None:
            _train(run, folders)


def _train(run: Run, folders: Folders) -> None:
    from nvembed_mcore.cli import main as nvembed

    deal(folders, run.parts)
    tree, architecture = tree_of(run, folders, record_count(folders.records)), _architecture(run)
    folder = folders.run(run)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "architecture.json").write_text(json.dumps(architecture, indent=1) + "\n", encoding="utf-8")
    # JSON is YAML.
    (folder / "run.yaml").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    print(f"$ nvembed train {folder / 'run.yaml'}", flush=True)
    if status := nvembed(["train", str(folder / "run.yaml")]):
        sys.exit(status)
    result = read_result(folder) | {"identity": identity_of(run, folders, architecture)}
    result["parameters"] = _parameters(folder / "architecture.json", tree["model"]["pooling"])
    (folder / "result.json.new").write_text(json.dumps(result), encoding="utf-8")
    (folder / "result.json.new").replace(folder / "result.json")
    shutil.rmtree(folder / "checkpoints")
    print(f"{run.name}: nDCG@10 {result['evaluations'][-1]['ndcg_at_10']:.4f}", flush=True)


def _architecture(run: Run) -> dict[str, Any]:
    mistral = json.loads((ROOT / "examples" / "quickstart" / "mistral.json").read_text(encoding="utf-8"))
    return architecture_of(run, mistral)


def _parameters(architecture: Path, pooling: dict[str, Any]) -> int:
    from nvembed_mcore.checkpoint.names import name_table
    from nvembed_mcore.config import PoolingConfig
    from nvembed_mcore.model.mistral import read_mistral_config

    table = name_table(read_mistral_config(architecture), PoolingConfig(**pooling))
    return sum(math.prod(entry.shape) for entry in table)


def finished(run: Run, folders: Folders) -> dict[str, Any] | None:
    """A run's result, or None.

    Raises:
        ValueError: it is that of another configuration or of other data.
    """
    path = folders.run(run) / "result.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    expected = identity_of(run, folders, _architecture(run))
    if result["identity"] != expected:
        raise ValueError(
            f"{path} is of a run with configuration {result['identity']}, this study's would be {expected}; "
            "remove its folder or give another OUTPUT"
        )
    return result


def report(options: argparse.Namespace, folders: Folders, seeds: dict[str, int]) -> None:
    """Table, fits and plots of the runs that are finished."""
    from tools.scaling.quality_fit import summary
    from tools.scaling.quality_plot import plot

    results = {run: finished(run, folders) for run in plan(options.axes, seeds)}
    found = {run: result for run, result in results.items() if result is not None}
    if not found:
        sys.exit(f"error: no run of {len(results)} is finished in {folders.output}; train some first")
    rows = [*rows_of(options.axes, seeds, found)]
    to = Path(options.to or options.output)
    to.mkdir(parents=True, exist_ok=True)
    with (to / "quality.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    figures = summary(rows)
    for name, value in figures.items():
        print(f"{name:44} {value}")
    plot(rows, to)
    print(f"{len(found)} of {len(results)} runs are finished; table and plots are in {to}")
    if options.json:
        Path(options.json).write_text(json.dumps(figures | {"points": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
