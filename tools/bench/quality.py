"""Quality beside the default choice, and beside the paper: does this trainer learn what sentence-transformers learns,
and which of NV-Embed's findings (Tables 2 and 4) show at small scale?

Run from the root of the repository, one thread:
    export PYTHONPATH=. OMP_NUM_THREADS=1
    python tools/bench/quality.py runs/quality-paper --json quality.json --plot docs/quality
    python tools/bench/quality.py runs/quality-smoke --smoke    # a few steps of both trainers, on this package's code

The data are those of examples/quickstart/run.sh: taken from its folder, or made. What is finished is not run again, so
the same command goes on where it was cut off; it runs seed by seed, and reports what is there at its end.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nvembed_mcore.data.python_docs import build_python_docs
from nvembed_mcore.data.tokenizer import load_tokenizer, write_mistral_tokenizer
from tools.bench.quality_recipes import Recipe, orders, poolings
from tools.bench.quality_runs import ROOT, Study, all_of, found_recipe, train_recipe
from tools.bench.quality_side import Pairing, found_pairing, train_both
from tools.bench.quality_table import (
    claims_table,
    orders_table,
    poolings_table,
    recipe_figures,
    side_figures,
    side_table,
)
from tools.scaling.quality import make_data

PARTS = ("side", "poolings", "stages")
CACHED_STEPS = 20
SMOKE = Pairing(steps=3, batch=8, cached_steps=1)
SMOKE_BOUND = 1e-5
"""Largest relative difference of the first losses and gradient norms that --smoke accepts."""
FIGURES = """
Means are over seeds (weights and order of the records), `_half_width` is half of the 95 % interval by Student's t, and
differences are paired by seed; `_holds_zero` says whether their interval holds 0. Quality is that of 3,000 held-out
docstrings of modules that no training record comes from:

  ndcg_at_10, recall_at_10, mrr_at_10    they search their own code among all held-out code
  accuracy      logistic regression on training docstrings names the topic (package and module) of held-out ones
  v_measure     of k-means on the held-out docstrings, against their topics

side: one model by both trainers, the same weights, records, batches, prompt, limits, AdamW, schedule and clipping.
  side_ours_*, side_peer_*          this trainer, SentenceTransformerTrainer with MultipleNegativesRankingLoss
  side_repacked_*                   this trainer with packs of an eighth: the same arithmetic, other rounding
  side_initial_*                    the weights that all begin with
  side_ours_minus_NAME_*            paired differences; side_seed_deviation_*: of this trainer's seeds, for comparison
  side_NAME_first_loss_difference, _first_norm_difference    relative, of step 1, from this trainer's; the worst seed
  side_NAME_loss_difference_10_steps, _all_steps             the largest of so many steps
  side_NAME_weights_apart           distance of the trained weights over the distance that training moved them
  side_cached_loss_difference       packs of an eighth against CachedMultipleNegativesRankingLoss, its first steps
  side_NAME_processor_seconds       of a training call; ours with tokens at hand and one checkpoint, theirs tokenises.
                                    No benchmark: docs/benchmarks.md has one, on an idle machine
poolings: Table 2. ORDER_POOLING_MASK_stageN_MEASURE after stage N; bidirectional_minus_causal_* (mean of the four
  poolings), bidirectional_minus_causal_POOLING_*, latent_minus_POOLING_* (bidirectional), after stage 2
stages: Table 4. one_in_batch, one_alone (a blend of both tasks with and without in-batch negatives), two_stages
  (search with them, then the blend without), reversed; two_stages_minus_ORDER_*, one_alone_minus_one_in_batch_*. All
  take as many steps. taught_*: likewise, but all after 100 steps of search, which stand for a model that knows text
"""

Part = tuple[str, Sequence[Any], Callable[[Any, Study], Any], Callable[[Any, Study], Any]]


def main() -> None:
    """Run what is missing, then report."""
    options = _options()
    study = Study(Path(options.output).resolve(), Path(options.quickstart).resolve())
    if options.smoke:
        _report(smoke(study.output), options)
        return
    make_data(study.quickstart)
    for seed in range(1, options.seeds + 1):
        for wanted, run in _work(options.only, seed):
            for one in wanted:
                run(one, study)
    report(study, options)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=FIGURES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", help="folder for runs and results, a few MB a run")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="default: all three")
    parser.add_argument("--seeds", type=int, default=3, help="of each part (default 3)")
    parser.add_argument(
        "--quickstart", default="runs/quickstart", help="folder with the quick start's data, or for it"
    )
    parser.add_argument("--smoke", action="store_true", help="only check that both trainers begin alike, in seconds")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all figures there, as one flat object")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="also write *.png and tables.md there")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    return options


def _pairing(seed: int) -> Pairing:
    return Pairing(seed=seed, cached_steps=CACHED_STEPS if seed == 1 else 0)


def _work(only: Sequence[str], seed: int) -> list[tuple[Sequence[Any], Callable[[Any, Study], Any]]]:
    recipes = [*(poolings(seed) if "poolings" in only else ()), *(orders(seed) if "stages" in only else ())]
    side = [_pairing(seed)] if "side" in only else []
    return [(side, train_both), ([*dict.fromkeys(recipes)], train_recipe)]


def report(study: Study, options: argparse.Namespace) -> None:
    """Figures, tables and pictures of what is finished."""
    from tools.bench.quality_plot import plot_orders, plot_poolings, plot_side

    seeds = range(1, options.seeds + 1)
    work = [_work(options.only, seed) for seed in seeds]
    pairings = all_of([one for part in work for one in part[0][0]], lambda one: found_pairing(one, study))
    recipes: dict[Recipe, Any] = all_of(
        [one for part in work for one in part[1][0]], lambda one: found_recipe(one, study)
    )
    side = {pairing.seed: result for pairing, result in pairings.items()}
    figures = (side_figures(side) if side else {}) | recipe_figures(recipes)
    tables = {}
    if side:
        tables["Both trainers"] = side_table(figures)
    if "poolings" in options.only:
        tables["Poolings and masks (Table 2)"] = poolings_table(figures)
    if "stages" in options.only:
        tables["Stages (Table 4)"] = orders_table(figures)
    if recipes:
        tables["Differences"] = claims_table(figures)
    text = "\n".join(f"## {title}\n\n{table}" for title, table in tables.items())
    print(text)
    if options.plot:
        options.plot.mkdir(parents=True, exist_ok=True)
        (options.plot / "tables.md").write_text(text, encoding="utf-8")
        if side:
            plot_side(side, options.plot / "side.png")
        if "poolings" in options.only:
            plot_poolings(recipes, options.plot / "poolings.png")
        if "stages" in options.only:
            plot_orders(recipes, options.plot / "stages.png")
    _report(figures, options)


def _report(figures: dict[str, Any], options: argparse.Namespace) -> None:
    for name, value in figures.items():
        print(f"{name:64} {f'{value:.5g}' if isinstance(value, float) else value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def smoke(output: Path) -> dict[str, Any]:
    """Figures of a few steps by both trainers, on the code of this package.

    Raises:
        SystemExit: the first losses or gradient norms differ by more than `SMOKE_BOUND`.
    """
    quickstart = output / "quickstart"
    if not (quickstart / "tokenizer").is_dir():
        write_mistral_tokenizer(quickstart / "tokenizer")
    tokenizer = load_tokenizer(quickstart / "tokenizer")
    packages = {"data": ROOT / "nvembed_mcore" / "data"}
    build_python_docs(quickstart / "data", tokenizer, packages=packages, held_out=20, negatives=2)
    figures = side_figures({1: train_both(SMOKE, Study(output, quickstart))})
    names = ("side_peer_first_loss_difference", "side_peer_first_norm_difference", "side_cached_loss_difference")
    if bad := [f"{name} {figures[name]:.2e}" for name in names if not figures[name] <= SMOKE_BOUND]:
        raise SystemExit(f"error: the trainers begin differently, by more than {SMOKE_BOUND:g}: {', '.join(bad)}")
    return figures


if __name__ == "__main__":
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    main()
