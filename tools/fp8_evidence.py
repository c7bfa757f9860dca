"""What FP8 does to an embedding model: the quick start's two stages with FP8 off and on, several seeds, by emulation.

Run from the root of the repository: PYTHONPATH=. python tools/fp8_evidence.py --output FOLDER

Data, token files and mined negatives are made once and shared. Each pair of a recipe and a seed trains both stages in
its own folder, its linears rounded as TransformerEngine rounds (nvembed_mcore/model/fp8_linear.py); a finished pair is
skipped, an interrupted one goes on from its checkpoint, so the same command with more recipes or seeds adds to what is
there. Run it with one thread a process (OMP_NUM_THREADS=1) to get the same figures again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from nvembed_mcore.log import read_metrics
from nvembed_mcore.progress import show_each

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart"
FIGURES = """
Figures of --json, one object with a name a figure; RECIPE is off, tensorwise, delayed, blockwise or mxfp8:

  RECIPE_ndcg_at_10_stage1, _stage2          held-out nDCG@10 after a stage: mean over the seeds
  RECIPE_ndcg_at_10_stage1_spread, ...       its standard deviation over the seeds
  RECIPE_minus_off_stage1, _stage2           mean of the differences of nDCG@10 to `off` with the same seed
  RECIPE_minus_off_stage1_spread, ...        their standard deviation
  RECIPE_minus_off_stage1_largest, ...       the largest of them in magnitude
  RECIPE_loss_stage1, _stage2                training loss, mean over the last tenth of a stage and the seeds
  RECIPE_loss_minus_off_stage1, ...          mean of its differences to `off` with the same seed
  RECIPE_cpu_seconds                         processor time of a pair, mean over the seeds
  seeds, stage1_steps, stage2_steps
"""
console = Console(highlight=False, width=120)
Pair = dict[str, Any]
"""Of a recipe and a seed: `loss` and `ndcg_at_10` of each stage, and `cpu_seconds`."""


def main() -> None:
    options = _options()
    output = Path(options.output).resolve()
    _make_data(output, options)
    pairs: dict[str, dict[int, Pair]] = {recipe: {} for recipe in options.recipes}
    for seed, recipe in show_each(list(itertools.product(options.seeds, options.recipes)), "train", "pairs of stages"):
        pairs[recipe][seed] = _finished(recipe, seed, output, options)
        figures = summary(pairs)
        console.print(table(figures, pairs))
    if options.json:
        Path(options.json).write_text(json.dumps(figures | _sizes(pairs, options), indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(pairs, Path(options.plot))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=FIGURES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, help="folder for data and runs, some hundred MB a pair")
    recipes = ["off", "tensorwise", "delayed", "blockwise", "mxfp8"]
    parser.add_argument("--recipes", nargs="+", choices=recipes, default=recipes[:4], help="values of precision.fp8")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of weights, order and dropout")
    parser.add_argument(
        "--stage1-steps", type=int, help="default: those of the quick start; its schedule is stretched"
    )
    parser.add_argument("--stage2-steps", type=int, help="likewise")
    parser.add_argument("--held-out", type=int, default=3000, help="held-out queries (default 3000)")
    parser.add_argument(
        "--packages",
        nargs="+",
        default=["stdlib", "numpy", "torch", "transformers"],
        help="installed packages to read",
    )
    parser.add_argument("--json", metavar="PATH", help="write the figures there")
    parser.add_argument("--plot", metavar="PATH", help="draw loss curves, their differences and nDCG@10 there")
    options = parser.parse_args()
    if "off" not in options.recipes:
        parser.error("--recipes must have off, which the others are compared with")
    options.recipes = ["off", *(recipe for recipe in options.recipes if recipe != "off")]
    return options


def _command(*words: str) -> None:
    console.print(f"$ nvembed {' '.join(words)}")
    subprocess.run([sys.executable, "-m", "nvembed_mcore", *words], check=True)  # noqa: S603


def _once(file: Path, work: Callable[[], None]) -> None:
    """Do some work unless `file`, which says that it is done, is there."""
    if not file.exists():
        work()
        file.touch()


def _make_data(output: Path, options: argparse.Namespace) -> None:
    output.mkdir(parents=True, exist_ok=True)

    def make() -> None:
        _command("data", "tokenizer", str(output / "tokenizer"))
        docs = ["data", "python-docs", str(output / "data"), "--tokenizer", str(output / "tokenizer")]
        sizes = ["--held-out", str(options.held_out), "--negatives", "2", "--packages", *options.packages]
        _command(*docs, *sizes)

    _once(output / "data.done", make)


def _finished(recipe: str, seed: int, output: Path, options: argparse.Namespace) -> Pair:
    """A pair's figures, from its file or after training it."""
    folder = output / f"{recipe}-seed{seed}"
    result = folder / "result.json"
    if not result.exists():
        folder.mkdir(exist_ok=True)
        console.print(f"\n{recipe}, seed {seed}")
        began = _cpu_seconds()
        found = {"stage1": _train(1, recipe, seed, output, options)}
        # By the first model that is there, so that all pairs learn from the same negatives.
        mine = ["mine", str(folder / "stage1"), str(output / "data" / "train.jsonl"), str(output / "mined")]
        before = _cpu_seconds()
        _once(output / "mined.done", lambda: _command(*mine, "--negatives", "2"))
        mining = _cpu_seconds() - before
        found["stage2"] = _train(2, recipe, seed, output, options)
        found["cpu_seconds"] = round(_cpu_seconds() - began - mining)
        result.write_text(json.dumps(found), encoding="utf-8")
    return json.loads(result.read_text(encoding="utf-8"))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _train(number: int, recipe: str, seed: int, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train a stage of the quick start; its losses by step, and nDCG@10 at its end."""
    folder = output / f"{recipe}-seed{seed}"
    text = (QUICKSTART / f"stage{number}.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text.replace("runs/quickstart", str(output)))
    config |= {"run_dir": str(folder / f"stage{number}"), "seed": seed, "precision": {"fp8": recipe}}
    if number == 1:
        config["model"]["config"] = str(QUICKSTART / "mistral.json")
    else:
        config["model"]["init_from"] = str(folder / "stage1")
    if steps := getattr(options, f"stage{number}_steps"):
        config["steps"] = steps
        config["optim"]["warmup_steps"] = min(config["optim"]["warmup_steps"], steps)
    path = folder / f"stage{number}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    _command("train", str(path))
    lines = read_metrics(folder / f"stage{number}" / "metrics.jsonl")
    scores = [line["ndcg_at_10"] for line in lines if "ndcg_at_10" in line]
    return {"loss": [line["loss"] for line in lines if "loss" in line], "ndcg_at_10": scores[-1]}


def summary(pairs: dict[str, dict[int, Pair]]) -> dict[str, float]:
    """The figures over the pairs that are there; paired differences over the seeds that both have."""
    figures: dict[str, float] = {}
    for recipe, by_seed in pairs.items():
        if not by_seed:
            continue
        figures[f"{recipe}_cpu_seconds"] = statistics.mean(pair["cpu_seconds"] for pair in by_seed.values())
        for stage in ("stage1", "stage2"):
            scores = {seed: pair[stage]["ndcg_at_10"] for seed, pair in by_seed.items()}
            losses = {seed: _last_loss(pair[stage]["loss"]) for seed, pair in by_seed.items()}
            figures[f"{recipe}_ndcg_at_10_{stage}"] = statistics.mean(scores.values())
            figures[f"{recipe}_ndcg_at_10_{stage}_spread"] = _spread([*scores.values()])
            figures[f"{recipe}_loss_{stage}"] = statistics.mean(losses.values())
            if recipe != "off":
                off = {seed: pairs["off"][seed][stage] for seed in scores}
                gaps = [scores[seed] - off[seed]["ndcg_at_10"] for seed in scores]
                figures[f"{recipe}_minus_off_{stage}"] = statistics.mean(gaps)
                figures[f"{recipe}_minus_off_{stage}_spread"] = _spread(gaps)
                figures[f"{recipe}_minus_off_{stage}_largest"] = max(gaps, key=abs)
                gaps = [losses[seed] - _last_loss(off[seed]["loss"]) for seed in losses]
                figures[f"{recipe}_loss_minus_off_{stage}"] = statistics.mean(gaps)
    return figures


def _last_loss(losses: list[float]) -> float:
    return statistics.mean(losses[-max(1, len(losses) // 10) :])


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _sizes(pairs: dict[str, dict[int, Pair]], options: argparse.Namespace) -> dict[str, Any]:
    one = pairs["off"][options.seeds[0]]
    steps = {f"{stage}_steps": len(one[stage]["loss"]) for stage in ("stage1", "stage2")}
    return {"seeds": len(options.seeds), **steps}


def table(figures: dict[str, float], pairs: dict[str, dict[int, Pair]]) -> Table:
    """A row for each recipe and stage."""
    shown = Table(title="nDCG@10 on the held-out set, and training loss at the end")
    for heading in ("recipe", "stage", "seeds", "nDCG@10", "spread", "minus off", "spread", "loss", "minus off"):
        shown.add_column(heading, justify="left" if heading == "recipe" else "right")
    for recipe, by_seed in pairs.items():
        for stage in ("stage1", "stage2") if by_seed else ():
            score, gap = f"{recipe}_ndcg_at_10_{stage}", f"{recipe}_minus_off_{stage}"
            names = (score, f"{score}_spread", gap, f"{gap}_spread")
            losses = (f"{recipe}_loss_{stage}", f"{recipe}_loss_minus_off_{stage}")
            cells = [f"{figures[name]:.4f}" if name in figures else "" for name in (*names, *losses)]
            shown.add_row(recipe, stage[-1], str(len(by_seed)), *cells)
    return shown


def plot(pairs: dict[str, dict[int, Pair]], path: Path) -> None:
    """Loss by step and its difference to `off` (a line a seed), and nDCG@10 of each seed."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplot_mosaic([["loss", "score"], ["gap", "score"]], figsize=(12, 6), layout="constrained")
    for number, (recipe, by_seed) in enumerate(pairs.items()):
        colour = f"C{number}"
        for seed, pair in by_seed.items():
            losses, off = (one["stage1"]["loss"] + one["stage2"]["loss"] for one in (pair, pairs["off"][seed]))
            label = recipe if seed == next(iter(by_seed)) else None
            axes["loss"].plot(range(1, len(losses) + 1), losses, color=colour, alpha=0.6, linewidth=0.8, label=label)
            if recipe != "off":
                gaps = [one - other for one, other in zip(losses, off, strict=True)]
                axes["gap"].plot(range(1, len(gaps) + 1), gaps, color=colour, alpha=0.6, linewidth=0.8)
            for place, stage in enumerate(("stage1", "stage2")):
                at = place + 0.12 * (number - (len(pairs) - 1) / 2)
                axes["score"].plot(
                    at, pair[stage]["ndcg_at_10"], "o", color=colour, label=label if not place else None
                )
                axes["score"].annotate(str(seed), (at, pair[stage]["ndcg_at_10"]), fontsize=7, xytext=(4, 0),
                                       textcoords="offset points")  # fmt: skip
    axes["loss"].set(ylabel="training loss", title="both stages, a line for each seed")
    axes["gap"].set(ylabel="loss minus that of off", xlabel="optimizer step")
    axes["gap"].axhline(0, color="C0", linewidth=0.8)
    axes["score"].set(ylabel="held-out nDCG@10", title="by seed", xticks=[0, 1], xticklabels=["stage 1", "stage 2"])
    axes["loss"].legend()
    axes["score"].legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
