"""By plan, not by measurement: NV-Embed's stages and a larger-batch recipe from 8 to 4,608 H200s.

Run from the root of the repository: PYTHONPATH=. python tools/scaling/figures.py --to docs/scaling

Asks `nvembed plan` for the fastest layout of every scenario and number of GPUs, writes them as plan.csv and draws
plan-strong.png, plan-efficiency.png, plan-weak.png, plan-terms.png and plan-memory.png. No GPU is needed or used.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RECIPE = ROOT / "examples" / "recipes" / "nv_embed_v2"
MISTRAL = ROOT / "examples" / "recipes" / "mistral_7b_v0_1.json"
GPUS = (8, 16, 32, 64, 128, 256, 512, 1152, 2304, 4608)
SEQUENCES_OF_A_QUERY = 9
"""Itself, its positive and seven hard negatives."""
BATCH = 128
LARGER_BATCH = 8192
QUERIES_PER_GPU = 16
"""Of the weak scaling: those of a batch of 128 on 8 GPUs."""
WEIGHTS = {"LoRA": (), "full": ("--model.lora.rank", "0")}
PRECISIONS = {"BF16": (), "FP8": ("--precision.fp8", "tensorwise")}
FIGURES = """
Columns of plan.csv, one row for each scenario, kind and number of GPUs; --json has the same rows as a list `rows`, and
for each scenario and kind `end_of_STUDY_STAGE_KIND`, the largest number of GPUs at half of its efficiency or better:

  study           strong: 128 queries (1,152 sequences) a step; larger: 8,192 queries; weak: 16 queries a GPU
  stage           of NV-Embed
  weights, precision    LoRA (rank 16) or full; BF16 or FP8 (tensorwise)
  queries, gpus
  tp, pp, cp, dp, way, tokens_per_microbatch    the fastest layout that fits; empty where none does (see `why`)
  seconds, low, high    of a step; the range of nine in ten by the spread of the fitted constants
  tokens_per_second_per_gpu, mfu
  efficiency      tokens_per_second_per_gpu over that of the smallest number of GPUs of the same study and kind
  t_TERM          seconds of a step by term (`nvembed plan --explain` has the formulas)
  m_KIND          bytes of the fullest rank by kind
"""

Row = dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    """One question to `nvembed plan`."""

    study: str
    stage: int
    weights: str
    precision: str
    queries: int
    gpus: tuple[int, ...]

    @property
    def words(self) -> list[str]:
        """Its command, without device and output."""
        numbers = ",".join(str(number) for number in self.gpus)
        options = ["--gpus", numbers, "--top", "1", "--architecture", str(MISTRAL)]
        fields = ["--batch_size", str(self.queries), *WEIGHTS[self.weights], *PRECISIONS[self.precision]]
        return ["plan", str(RECIPE / f"stage{self.stage}.yaml"), *options, *fields]


def scenarios(gpus: tuple[int, ...] = GPUS) -> Iterator[Scenario]:
    """All questions; a number of GPUs of the weak scaling is a question of its own."""
    for weights in WEIGHTS:
        for precision in PRECISIONS:
            for stage in (1, 2):
                yield Scenario("strong", stage, weights, precision, BATCH, gpus)
            yield Scenario("larger", 1, weights, precision, LARGER_BATCH, tuple(one for one in gpus if one >= 64))
            for number in gpus:
                yield Scenario("weak", 1, weights, precision, QUERIES_PER_GPU * number, (number,))


def main() -> None:
    """Ask, write, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=FIGURES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", default="docs/scaling", metavar="FOLDER", help="default docs/scaling")
    parser.add_argument("--device", default="h200", help="as for nvembed plan (default h200)")
    parser.add_argument("--gpus", nargs="+", type=int, default=GPUS, help=f"default {GPUS}")
    parser.add_argument("--json", metavar="PATH", help="write the figures there")
    options = parser.parse_args()
    rows = [row for one in scenarios(tuple(options.gpus)) for row in ask(one, options.device)]
    add_efficiency(rows)
    to = Path(options.to)
    to.mkdir(parents=True, exist_ok=True)
    write_csv(rows, to / "plan.csv")
    from tools.scaling.figures_plot import draw

    draw(rows, to)
    found = ends(rows)
    for name, value in found.items():
        print(f"{name:40} {value}")
    print(f"{len(rows)} rows in {to / 'plan.csv'}, plots beside it")
    if options.json:
        Path(options.json).write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


def ask(scenario: Scenario, device: str) -> list[Row]:
    """A row for each number of GPUs of a scenario."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        words = [*scenario.words, "--device", device, "--json", str(path)]
        program = [sys.executable, "-m", "nvembed_mcore", *words]
        done = subprocess.run(program, capture_output=True, text=True)  # noqa: S603
        if done.returncode:
            sys.exit(f"error: nvembed {' '.join(words)}\n{done.stderr}")
        (stage,) = json.loads(path.read_text(encoding="utf-8"))["stages"]
    return [row_of(scenario, plan) for plan in stage["plans"]]


def row_of(scenario: Scenario, plan: dict[str, Any]) -> Row:
    """The fastest layout of a plan, or why there is none."""
    row: Row = {name: getattr(scenario, name) for name in ("study", "stage", "weights", "precision", "queries")}
    row["gpus"] = plan["gpus"]
    if not plan["layouts"]:
        reasons = {one["reason"] for one in plan["rejected"]}
        return row | {"why": min(reasons, default="no layout")}
    best = plan["layouts"][0]
    row |= {name: best["layout"][name] for name in ("tp", "pp", "cp", "dp", "way", "tokens_per_microbatch")}
    row |= {"seconds": best["seconds"], "low": best["seconds_low"], "high": best["seconds_high"]}
    row |= {name: best[name] for name in ("tokens_per_second_per_gpu", "mfu", "microbatches", "fullest_over_mean")}
    row |= {f"t_{term}": value for term, value in best["seconds_by_term"].items()}
    return row | {f"m_{kind}": value for kind, value in best["memory"].items()}


def kind_of(row: Row) -> tuple[str, int, str, str]:
    return row["study"], row["stage"], row["weights"], row["precision"]


def add_efficiency(rows: list[Row]) -> None:
    """Tokens a second and GPU over those of the smallest number of GPUs of the same kind."""
    smallest: dict[tuple, Row] = {}
    for row in sorted(rows, key=lambda row: row["gpus"]):
        if "seconds" in row:
            first = smallest.setdefault(kind_of(row), row)
            row["efficiency"] = row["tokens_per_second_per_gpu"] / first["tokens_per_second_per_gpu"]


def ends(rows: list[Row]) -> dict[str, int]:
    """Of each kind the most GPUs that keep half of the efficiency."""
    found: dict[str, int] = {}
    for row in rows:
        if row.get("efficiency", 0) >= 0.5:
            study, stage, weights, precision = kind_of(row)
            name = f"end_of_{study}_stage{stage}_{weights}_{precision}"
            found[name] = max(found.get(name, 0), row["gpus"])
    return found


def write_csv(rows: list[Row], path: Path) -> None:
    names = [*dict.fromkeys(name for row in rows for name in row)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        rounded = ({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()} for row in rows)
        writer.writerows(rounded)


if __name__ == "__main__":
    main()
