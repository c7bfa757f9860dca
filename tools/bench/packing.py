"""How evenly the plan of one step spreads 1,152 MS-MARCO-like texts, what it pads, and what it costs.

Run from the root of the repository: PYTHONPATH=. python tools/bench/packing.py
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from nvembed_mcore.data.packing import Text, make_pack, make_plan

TEXTS, TAIL_MULTIPLE = 1152, 16
TOKEN_BUDGET, SMALL_BUDGET = 16_384, 1024
CASES = [(str(ranks), ranks, TOKEN_BUDGET) for ranks in (1, 8, 16, 32, 64, 128, 256)]
CASES += [("1_many_packs", 1, SMALL_BUDGET)]

FIGURES = f"""
Each figure is over --batches batches of {TEXTS:,} texts whose lengths are drawn log-normal (mean 105, 95th percentile
180 tokens, cut at 512). W is the number of data-parallel ranks, with packs of at most {TOKEN_BUDGET:,} tokens;
`1_many_packs` is one rank with packs of at most {SMALL_BUDGET:,}, more than a hundred of them.

  slowest_over_mean_W  tokens of the fullest rank over the mean of all ranks, without tails: the factor by which a step
                       takes longer than with a perfect spread. The worst batch.
  pad_fraction_W       tokens that only fill tails over all tokens of all packs, with packs as
                       make_pack(multiple={TAIL_MULTIPLE}) makes them. The worst batch.
  milliseconds_W       wall-clock time of one call of make_plan. The median.
"""


def batch_lengths(seed: int) -> np.ndarray:
    """Tokens of each text of one batch, int64 [TEXTS]."""
    return np.random.default_rng(seed).lognormal(4.586, 0.369, TEXTS).astype(np.int64).clip(3, 512)


def measure(seed: int, num_ranks: int, token_budget: int) -> tuple[float, float, float]:
    """(slowest over mean, pad fraction, milliseconds) of one batch."""
    lengths = batch_lengths(seed)
    begin = time.perf_counter()
    plan = make_plan(lengths, num_ranks, token_budget)
    milliseconds = 1e3 * (time.perf_counter() - begin)
    tokens = plan.tokens_per_rank(lengths)
    texts = [Text(np.zeros(length, np.int32), 0) for length in lengths]
    packs = [make_pack([texts[number] for number in pack], TAIL_MULTIPLE) for packs in plan.packs for pack in packs]
    padded = sum(len(pack.token_ids) for pack in packs)
    return float(tokens.max() / tokens.mean()), float(1 - tokens.sum() / padded), milliseconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=FIGURES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=200, help="batches, drawn from seeds 0, 1, ... (default: 200)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all figures to PATH as one flat object")
    arguments = parser.parse_args()
    figures: dict[str, float] = {}
    print(f"{'ranks':>14} {'slowest/mean':>14} {'pad fraction':>14} {'ms':>8}")
    for name, num_ranks, token_budget in CASES:
        results = [measure(seed, num_ranks, token_budget) for seed in range(arguments.batches)]
        slowest, pad, milliseconds = (list(column) for column in zip(*results, strict=True))
        figures[f"slowest_over_mean_{name}"] = max(slowest)
        figures[f"pad_fraction_{name}"] = max(pad)
        figures[f"milliseconds_{name}"] = float(np.median(milliseconds))
        print(f"{name:>14} {max(slowest):14.4f} {max(pad):14.4f} {np.median(milliseconds):8.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
