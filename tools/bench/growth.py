"""Time and memory of a whole training step on the CPU for 1, 2, 4 and 8 times the batch, by way of stepping.

Run from the root of the repository: PYTHONPATH=. python tools/bench/growth.py --plot growth.png
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # memory is the resident set

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import MistralConfig

from nvembed_mcore.build import build_model
from nvembed_mcore.config import DataConfig, DatasetConfig, ModelConfig, PoolingConfig, RunConfig, StepConfig
from nvembed_mcore.data.batch import Batch, Sample, make_batch
from nvembed_mcore.data.packing import Text
from nvembed_mcore.metrics import PhaseTimer
from nvembed_mcore.optim import build_optimizer
from nvembed_mcore.parallel.groups import initialize, shutdown
from nvembed_mcore.progress import show_each
from nvembed_mcore.step import ContrastiveStep
from tools.bench.loss import mark_memory, resident

WAYS = ("single", "retain", "cached")
FACTORS = (1, 2, 4, 8)
QUERIES, TOKENS_PER_PACK = 8, 2048
COLORS = {"single": "#7a5195", "retain": "#c8502d", "cached": "#2f6db5"}
MARKERS = {"single": "s", "retain": "o", "cached": "D"}
VOCABULARY = 8192
MODEL = MistralConfig(
    hidden_size=256,
    intermediate_size=640,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=VOCABULARY,
    max_position_embeddings=512,
    sliding_window=None,
)
POOLING = PoolingConfig(kind="latent", num_latents=64, num_heads=4, head_width=64)

FIGURES = f"""
A Mistral of {MODEL.num_hidden_layers} layers of width {MODEL.hidden_size} with latent attention, float32, one process.
A query has a positive and a hard negative; queries have 20 to 60 tokens, passages 60 to 400. Factor 1 is {QUERIES}
queries. `single` holds the batch in one pack; `retain` and `cached` in packs of {TOKENS_PER_PACK:,} tokens, of which
`retain` keeps all graphs and `cached` none. Each point is a process of its own.

  WAY_FACTOR_seconds   of a step, optimizer included: median of --repeats steps
  WAY_FACTOR_bytes     the most that the first step of this batch held beyond weights, gradients and moments
  FACTOR_tokens        real tokens of the batch
"""


def make_texts(factor: int) -> Batch:
    random = np.random.default_rng(0)

    def text(shortest: int, longest: int) -> Text:
        count = int(random.integers(shortest, longest + 1))
        return Text(random.integers(0, VOCABULARY, count).astype(np.int32), 0)

    samples = []
    for query in range(QUERIES * factor):
        ids = np.array([2 * query, 2 * query + 1])
        samples.append(Sample(text(20, 60), [text(60, 400), text(60, 400)], ids, ids[:1], in_batch=True))
    return make_batch(samples)


def build_step(way: str) -> ContrastiveStep:
    """The trainer's step with random weights, as `train` would build it."""
    config = RunConfig(
        run_dir="unused",
        steps=1,
        data=DataConfig(tokenizer="unused", datasets=[DatasetConfig(path="unused")]),
        model=ModelConfig(config="unused", pooling=POOLING),
        step=StepConfig(way=way, tokens_per_microbatch=10**9 if way == "single" else TOKENS_PER_PACK),
    )
    groups = initialize(config.parallel)
    chunks = build_model(config, MODEL, groups)
    optimizer = build_optimizer(config.optim, chunks)
    return ContrastiveStep(chunks, optimizer, groups, step=config.step, loss=config.loss, seed=config.seed)


def measure(way: str, factor: int, repeats: int) -> tuple[float, int]:
    """Seconds and bytes of a step. To be run in a process of its own."""
    step, batch = build_step(way), make_texts(factor)
    few = make_batch([Sample(batch.texts[0], batch.texts[-2:], np.arange(2), np.arange(1), in_batch=True)])
    step(few, 1, PhaseTimer())  # allocates the moments
    before = mark_memory()
    step(batch, 2, PhaseTimer())
    used, seconds = resident("VmHWM") - before, []
    for number in range(repeats):
        begin = time.perf_counter()
        step(batch, 3 + number, PhaseTimer())
        seconds.append(time.perf_counter() - begin)
    shutdown()
    return statistics.median(seconds), used


def measure_apart(way: str, factor: int, repeats: int) -> tuple[float, int]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, way, factor, repeats).result()


def plot(figures: dict[str, float], path: Path) -> None:
    """Memory and seconds over the tokens of the batch."""
    figure = Figure(figsize=(10, 4.5), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    memory, seconds = figure.subplots(1, 2)
    draw(memory, figures, "bytes", 1e6)
    draw(seconds, figures, "seconds", 1.0)
    memory.set(title="Memory of a step beyond the model's own", ylabel="peak, MB")
    seconds.set(title="Time of a step", ylabel="seconds")
    figure.savefig(path, format="png")


def draw(axes: Axes, figures: dict[str, float], what: str, unit: float) -> None:
    tokens = [figures[f"{factor}_tokens"] / 1e3 for factor in FACTORS]
    for way in WAYS:
        values = [figures[f"{way}_{factor}_{what}"] / unit for factor in FACTORS]
        axes.plot(tokens, values, color=COLORS[way], marker=MARKERS[way], label=way)
    axes.set_xlabel("tokens of the batch, thousands")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=FIGURES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each point (default: 3)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all figures to PATH as one flat object")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="also draw them into a PNG")
    arguments = parser.parse_args()
    figures: dict[str, float] = {f"{factor}_tokens": int(make_texts(factor).lengths.sum()) for factor in FACTORS}
    print(f"{'way':>8} {'queries':>8} {'tokens':>8} {'seconds':>9} {'MB':>9}")
    for way, factor in show_each(list(itertools.product(WAYS, FACTORS)), "measure", "points"):
        seconds, used = measure_apart(way, factor, arguments.repeats)
        figures[f"{way}_{factor}_seconds"], figures[f"{way}_{factor}_bytes"] = seconds, used
        tokens = figures[f"{factor}_tokens"]
        print(f"{way:>8} {QUERIES * factor:8} {tokens:8,} {seconds:9.3f} {used / 1e6:9.1f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        plot(figures, arguments.plot)


if __name__ == "__main__":
    main()
