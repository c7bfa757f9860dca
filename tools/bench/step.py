"""Whole training steps of the trainer against those of sentence-transformers: speed, memory, loss, what is learned.

Both train the same weights on the same batches of the quick start's pairs, documents cut at 512 tokens, in float32 on
a CPU. Run from the root of the repository:

    PYTHONPATH=. python tools/bench/step.py [--wider 4] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from sides import Side
from workload import MAX_DOCUMENT_TOKENS, Workload

FIGURES = """
A step is forward, loss, backward, clipping and AdamW on tokenised texts. Rates count real tokens. Every side is a
process of its own; in a repeat each makes --steps steps, one at a time in turns with the others, on the same pairs. A
ratio is our rate over the other's in the same repeat, the median of all repeats, with the least and the most
beside it.

  plain_ratio              our `retain` against MultipleNegativesRankingLoss
  plain_ratio_to_best      ... whose batches are dealt by length: the pairs of the repeat's batches, longest first
  plain_ratio_to_loop      ... against a padded loop over the exported model
  cached_ratio             our `cached` against CachedMultipleNegativesRankingLoss as it comes (32 texts a mini-batch)
  cached_ratio_to_best     ... with the pairs of a batch sorted by length, and the fastest mini-batch of those tried
  SIDE_tokens_per_second   medians of all repeats
  SIDE_seconds             of a step, likewise
  SIDE_peak_bytes          high-water mark of the process's resident memory, libraries (0.5 GB or more) included
  first_loss_difference    largest difference of any side's first loss from that of our `retain`
  untrained_ndcg           nDCG@10 of the initial weights on the held-out set
  ours_ndcg, peer_ndcg     ... after --quality-steps steps on the same batches in the same order
  ndcg_difference          of the two
"""

PLAIN = {
    "ours": ("ours", dict(way="retain")),
    "peer": ("peer", dict(cached=False)),
    "peer_best": ("peer", dict(cached=False, grouped=True)),
    "loop": ("loop", {}),
}
CACHED = {
    "ours_cached": ("ours", dict(way="cached")),
    "peer_cached": ("peer", dict(cached=True)),
    "peer_cached_best": ("peer", dict(cached=True, sort=True)),
}
RATIOS = {
    "plain_ratio": ("ours", "peer"),
    "plain_ratio_to_best": ("ours", "peer_best"),
    "plain_ratio_to_loop": ("ours", "loop"),
    "cached_ratio": ("ours_cached", "peer_cached"),
    "cached_ratio_to_best": ("ours_cached", "peer_cached_best"),
}
MINI_BATCHES = [dict(size=size, tokens=None) for size in (8, 16, 32, 64)]
MINI_BATCHES += [dict(size=None, tokens=tokens) for tokens in (1024, 2048, 4096, 8192)]
TRIES = 2

Figures = dict[str, float]


def fastest_mini_batch(workload: Workload) -> dict[str, int | None]:
    """Of `MINI_BATCHES`, the one with which the peer's cached loss is fastest on the first batch."""
    kind, settings = CACHED["peer_cached_best"]
    seconds = []
    with Side(kind, workload, **settings) as side:
        side.ask("step", number=0, window=[])
        for mini_batch in MINI_BATCHES:
            side.ask("mini_batch", **mini_batch)
            seconds.append(min(side.ask("step", number=0, window=[])["seconds"] for _ in range(TRIES)))
    return MINI_BATCHES[seconds.index(min(seconds))]


def race(sides: dict[str, Side], repeats: int, steps: int) -> tuple[dict[str, list[float]], Figures, Figures]:
    """Rates of each side in each repeat, seconds of its median step, and its first loss; steps are taken in turns."""
    window = list(range(steps))
    first = {name: side.ask("step", number=0, window=window)["loss"] for name, side in sides.items()}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    turns = itertools.cycle(range(len(sides)))
    for repeat in range(repeats):
        print(f"repeat {repeat + 1} of {repeats}: {', '.join(sides)}", file=sys.stderr, flush=True)
        window = [1 + repeat * steps + place for place in range(steps)]
        done: dict[str, list[dict]] = {name: [] for name in sides}
        for number in window:
            names, begin = list(sides), next(turns)
            for name in names[begin:] + names[:begin]:
                done[name].append(sides[name].ask("step", number=number, window=window))
        for name, answers in done.items():
            seconds[name] += [answer["seconds"] for answer in answers]
            tokens = sum(answer["tokens"] for answer in answers)
            rates[name].append(tokens / sum(answer["seconds"] for answer in answers))
    return rates, {name: median(values) for name, values in seconds.items()}, first


def speed(workload: Workload, repeats: int, steps: int) -> dict[str, Any]:
    """Figures of the two races: without and with a cache of embeddings."""
    mini_batch = fastest_mini_batch(workload)
    rates: dict[str, list[float]] = {}
    first: Figures = {}
    figures: dict[str, Any] = {f"peer_best_mini_batch_{name}": value for name, value in mini_batch.items()}
    for group in (PLAIN, CACHED):
        with ExitStack() as stack:
            sides = {
                name: stack.enter_context(Side(kind, workload, **settings)) for name, (kind, settings) in group.items()
            }
            if "peer_cached_best" in sides:
                sides["peer_cached_best"].ask("mini_batch", **mini_batch)
            found, seconds, losses = race(sides, repeats, steps)
            rates |= found
            first |= losses
            figures |= {f"{name}_tokens_per_second": median(values) for name, values in found.items()}
            figures |= {f"{name}_seconds": value for name, value in seconds.items()}
            figures |= {f"{name}_peak_bytes": side.ask("memory") for name, side in sides.items()}
    for name, (ours, other) in RATIOS.items():
        ratios = [one / two for one, two in zip(rates[ours], rates[other], strict=True)]
        figures |= {name: median(ratios), f"{name}_least": min(ratios), f"{name}_most": max(ratios)}
    # The batches of this side are others.
    same_batch = [loss for name, loss in first.items() if name != "peer_best"]
    figures["first_loss_difference"] = max(abs(loss - first["ours"]) for loss in same_batch)
    return figures


def quality(workload: Workload) -> dict[str, Any]:
    """nDCG@10 before and after the workload's steps."""
    from nvembed_mcore.evaluation.exported import ExportedEncoder, evaluate_beir

    def ndcg(export: str) -> float:
        encoder = ExportedEncoder(export, instruction=None, max_length=MAX_DOCUMENT_TOKENS, device="cpu")
        return evaluate_beir(encoder, workload.held_out)["ndcg_at_10"]

    figures = {"quality_batch_size": workload.batch_size, "untrained_ndcg": ndcg(str(workload.initial))}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("ours", "peer"):
            kind, settings = PLAIN[name]
            output = f"{folder}/{name}"
            with Side(kind, workload, **settings) as side:
                for number in range(workload.steps):
                    loss = side.ask("step", number=number, window=[])["loss"]
                side.ask("save", output=output)
            figures |= {f"{name}_ndcg": ndcg(output), f"{name}_last_loss": loss}
    return figures | {"ndcg_difference": abs(figures["ours_ndcg"] - figures["peer_ndcg"])}


def conditions(workload: Workload) -> dict[str, Any]:
    """What a figure is worth nothing without."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)  # noqa: S607
    packages = ("torch", "transformers", "sentence-transformers", "megatron-core")
    return {
        "hardware": f"{processor}, {os.cpu_count()} cores, {memory / 1e9:.0f} GB",
        "threads": workload.threads,
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
        "commit": commit.stdout.strip(),
        "wider": workload.wider,
        "batch_size": workload.batch_size,
    }


def show(figures: dict[str, Any]) -> None:
    """Print a table of the sides, then what is left."""
    sides = [name for name in (*PLAIN, *CACHED) if f"{name}_seconds" in figures]
    columns = ("tokens_per_second", "seconds", "peak_bytes")
    for name in sides:
        rate, seconds, peak = (figures[f"{name}_{column}"] for column in columns)
        print(f"{name:18} {rate:9,.0f} real tokens/s {seconds:8.3f} s a step {peak / 1e9:6.2f} GB")
    for name, value in figures.items():
        if name not in {f"{side}_{column}" for side in sides for column in columns}:
            print(f"{name:28} {f'{value:.4g}' if isinstance(value, float) else value}")


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=FIGURES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="runs/bench-step", help="for data, weights and caches; used again")
    parser.add_argument("--wider", type=int, default=1, help="factor on the quick start's widths (default: 1)")
    parser.add_argument("--batch-size", type=int, default=64, help="pairs of a batch (default: 64)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side (default: all cores)")
    parser.add_argument("--repeats", type=int, default=7, help="default: 7")
    parser.add_argument("--steps", type=int, default=4, help="of a side in a repeat (default: 4)")
    parser.add_argument("--quality-steps", type=int, default=200, help="default: 200")
    parser.add_argument("--quality-batch-size", type=int, default=128, help="pairs of their batches (default: 128)")
    parser.add_argument("--no-speed", action="store_true", help="leave the races out")
    parser.add_argument("--no-quality", action="store_true", help="leave nDCG@10 out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures to FILE as one flat object")
    return parser.parse_args(arguments)


def main() -> None:
    chosen = options()
    workload = Workload(
        folder=chosen.folder,
        wider=chosen.wider,
        batch_size=chosen.batch_size,
        steps=chosen.quality_steps,
        threads=chosen.threads,
    )
    workload.prepare()
    shutil.rmtree(workload.initial, ignore_errors=True)
    with Side("ours", workload, way="retain") as side:
        side.ask("save", output=str(workload.initial))
    figures = conditions(workload)
    if not chosen.no_speed:
        figures |= speed(workload, chosen.repeats, chosen.steps)
    if not chosen.no_quality:
        figures |= quality(dataclasses.replace(workload, batch_size=chosen.quality_batch_size))
    show(figures)
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
