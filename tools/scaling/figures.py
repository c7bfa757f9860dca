"""By plan, not by measurement: NV-Embed's stages and a larger-batch recipe from 8 to 4,608 H200s.

Run from the root of the repository: PYTHONPATH=. python tools/scaling/figures.py --to docs/scaling

Asks for the fastest layout of every scenario and number of GPUs, as `nvembed plan` does; writes them as plan.csv and
draws plan-strong.png, plan-efficiency.png, plan-weak.png, plan-terms.png and plan-memory.png. Needs no GPU.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

from nvembed_mcore.cli.run_config import read_run_config
from nvembed_mcore.config import RunConfig
from nvembed_mcore.progress import show_each
from nvembed_mcore.scaling.architecture import Architecture
from nvembed_mcore.scaling.hardware import cluster
from nvembed_mcore.scaling.lengths import sample_lengths
from nvembed_mcore.scaling.plan import Plan, few_steps, plan
from nvembed_mcore.scaling.predict import Prediction, predict
from nvembed_mcore.scaling.workload import Workload

ROOT = Path(__file__).parent.parent.parent
RECIPE = ROOT / "examples" / "recipes" / "nv_embed_v2"
MISTRAL = ROOT / "examples" / "recipes" / "mistral_7b_v0_1.json"
GPUS = (8, 32, 128, 256, 512, 1152, 2304, 4608)
BATCH, LARGER_BATCH = 128, 8192
FEWEST_OF_LARGER = 128
QUERIES_PER_GPU = 16
"""Of the weak scaling: those of a batch of 128 on 8 GPUs."""
WEIGHTS = {"LoRA": (), "full": ("--model.lora.rank", "0")}
PRECISIONS = {"BF16": (), "FP8": ("--precision.fp8", "tensorwise")}
FIGURES = """
Columns of plan.csv, one row for each scenario, kind and number of GPUs; --json has the same rows as a list `rows`, and
for each of them `end_of_STUDY_STAGE_KIND`, the largest number of GPUs at half of its efficiency or better:

  study           strong: 128 queries (1,152 sequences) a step, lengths of MS MARCO; longest: the same with 512 tokens
                  in every text; larger: 8,192 queries; weak: 16 queries a GPU in the layout that is fastest on 8
  stage           of NV-Embed-v2
  weights, precision    LoRA (rank 16) or full; BF16 or FP8 (tensorwise)
  queries, gpus
  tp, pp, cp, dp, way, tokens_per_microbatch    the fastest layout that fits; empty where none does (see `why`)
  seconds, low, high    of a step; the range of nine in ten by the spread of the fitted constants
  tokens_per_second_per_gpu    real tokens
  mfu             model FLOPs over the data sheet's bfloat16 peak
  microbatches    packs of a rank
  fits            whether memory suffices; false only in the weak study, whose layout is given
  efficiency      tokens_per_second_per_gpu over that of the smallest number of GPUs of the same study and kind
  t_TERM          seconds of a step by term (`nvembed plan --explain` has the formulas)
  m_KIND          bytes of the fullest rank by kind
"""

Row = dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    """A step of one kind on several numbers of GPUs."""

    study: str
    stage: int
    weights: str
    precision: str
    queries: int
    gpus: tuple[int, ...]

    def work(self) -> tuple[RunConfig, Workload]:
        """The recipe's configuration for this scenario, and the work of its step."""
        words = [str(RECIPE / f"stage{self.stage}.yaml"), "--batch_size", str(self.queries)]
        config = read_run_config([*words, *WEIGHTS[self.weights], *PRECISIONS[self.precision]])
        lengths = sample_lengths(config, "longest" if self.study == "longest" else "ms_marco")
        return config, few_steps(Workload.of(config, Architecture.read(MISTRAL), lengths))


def scenarios(gpus: tuple[int, ...] = GPUS) -> Iterator[Scenario]:
    """All of them; each number of GPUs of the weak scaling is one of its own, and those of a kind are in order."""
    for weights in WEIGHTS:
        for precision in PRECISIONS:
            for stage in (1, 2):
                yield Scenario("strong", stage, weights, precision, BATCH, gpus)
            yield Scenario("longest", 1, weights, precision, BATCH, gpus)
            many = tuple(number for number in gpus if number >= FEWEST_OF_LARGER)
            yield Scenario("larger", 1, weights, precision, LARGER_BATCH, many)
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
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at work side by side (default: cores)")
    parser.add_argument("--json", metavar="PATH", help="write the figures there")
    options = parser.parse_args()
    by_kind: dict[tuple, list[Scenario]] = {}
    for one in scenarios(tuple(sorted(options.gpus))):
        by_kind.setdefault((one.study, one.stage, one.weights, one.precision), []).append(one)
    with ProcessPoolExecutor(options.processes) as pool:
        found = pool.map(answers, by_kind.values(), repeat(options.device))
        rows = [row for some in show_each(found, "plan", "kinds of scenarios", len(by_kind)) for row in some]
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
        rows = [{name: value for name, value in row.items() if name != "layout"} for row in rows]
        Path(options.json).write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


def answers(of_a_kind: list[Scenario], device: str) -> list[Row]:
    """The rows of a study's scenarios of one kind."""
    rows: list[Row] = []
    for one in of_a_kind:
        rows += ask(one, device, rows)
    return rows


def ask(scenario: Scenario, device: str, before: list[Row]) -> Iterator[Row]:
    """A row for each number of GPUs of a scenario. The weak one keeps the layout that it has `before`."""
    machine = cluster(device)
    config, workload = scenario.work()
    kind = {name: getattr(scenario, name) for name in ("study", "stage", "weights", "precision", "queries")}
    kept = next((row["layout"] for row in before if "layout" in row), None)
    for gpus in scenario.gpus:
        row = kind | {"gpus": gpus}
        if scenario.study == "weak" and kept is not None:
            yield row | columns(predict(workload, replace(kept, gpus=gpus), machine))
            continue
        found = plan(workload, config, gpus, machine, top=1)
        yield row | (columns(found.fitting[0]) if found.fitting else {"why": why(found)})


def columns(best: Prediction) -> Row:
    """What the table says of a layout."""
    layout = best.layout
    row = {name: getattr(layout, name) for name in ("tp", "pp", "cp", "dp", "way", "tokens_per_microbatch")}
    row |= {"layout": layout, "seconds": best.total, "low": best.low, "high": best.high}
    row |= {"tokens_per_second_per_gpu": best.tokens_per_second, "mfu": best.mfu}
    row |= {"microbatches": best.balance.microbatches, "fits": best.fits}
    row |= {f"t_{term}": value for term, value in best.seconds.items() if value}
    return row | {f"m_{kind}": value for kind, value in best.memory.items()}


def why(found: Plan) -> str:
    """Why no layout of a number of GPUs fits."""
    return min((one.reason for one in found.rejected), default="there is no layout")


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
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "layout"]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        rounded = ({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()} for row in rows)
        writer.writerows(rounded)


if __name__ == "__main__":
    main()
