"""The pictures of docs/concepts, from what the code itself decides and computes: plans, masks, draws, counts.

Run from the root of the repository: PYTHONPATH=. python tools/docs/figures.py [--json PATH]

Figures of `--json`, one each of what a picture says in words:
    packing_padded_share      share of a padded batch that is padding, of the texts that the picture shows
    packing_packs_share       share of the packs' token budget that is not used
    gather_worst              largest difference of any line of docs/gradient-proof.md
    folding_plain, folding_folded   operations a token of the latent cross attention at NV-Embed's shapes
    blend_worst               largest difference between a data set's share after the shown steps and the one asked for
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch.utils.flop_counter import FlopCounterMode

from nvembed_mcore.config import ParallelConfig, PoolingConfig
from nvembed_mcore.data.blend import Blend
from nvembed_mcore.data.packing import make_plan
from nvembed_mcore.data.python_source import SourceFile, documented_items
from nvembed_mcore.data.tokenizer import load_tokenizer, write_mistral_tokenizer
from nvembed_mcore.kernels.reference import Masks
from nvembed_mcore.loss import make_targets, score_rows
from nvembed_mcore.model.pooling import LatentAttention, Mlp
from nvembed_mcore.parallel.groups import pretend, shutdown

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "docs" / "concepts"
QUERY, DOCUMENT, WASTE, INK, PAPER = "#2b6cb0", "#2f855a", "#e2b8b0", "#222222", "#fbfbf9"
SHADES = ("#2b6cb0", "#2f855a", "#c05621", "#805ad5")
"""Data-parallel ranks."""
SETS = ("#2b6cb0", "#c05621", "#2f855a")

STYLE = {
    "font.size": 10,
    "svg.hashsalt": "nvembed_mcore",  # the same picture has the same bytes
    "figure.facecolor": PAPER,  # its own ground, so that it is legible on a dark page too
    "axes.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "text.color": INK,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="PATH", help="write the figures there")
    arguments = parser.parse_args()
    with plt.rc_context(STYLE):
        found = packing() | gradient_proof() | folding() | blend()
        gather()
        step()
        layouts()
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name, value in found.items():
        print(f"{name:24} {value:.4g}")


def save(figure: plt.Figure, name: str) -> None:
    figure.savefig(OUTPUT / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def lengths_of_texts(number: int) -> np.ndarray:
    """Tokens of real texts, queries and their documents in turn: docstrings of this package and their code."""
    folder = OUTPUT / "tokenizer"
    write_mistral_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    items = []
    for name in ("step.py", "data/packing.py", "loss.py", "data/blend.py"):
        path = ROOT / "nvembed_mcore" / name
        items += documented_items(SourceFile("nvembed_mcore", name, path), path.read_bytes())
    texts = [text for item in items for text in (item.query, item.code)]
    return np.array([min(512, len(tokenizer(text).input_ids) + 2) for text in texts[:number]])


def packing() -> dict[str, float]:
    """The plan of 32 real texts for two ranks, beside a padded batch of them."""
    lengths, budget = lengths_of_texts(32), 1100
    plan = make_plan(lengths, num_ranks=2, token_budget=budget)
    figure, (padded, packed) = plt.subplots(1, 2, figsize=(10, 3.9), width_ratios=(1, 1.7))
    for row, length in enumerate(lengths):
        padded.barh(row, lengths.max(), color=WASTE, height=0.8)
        padded.barh(row, length, color=QUERY if row % 2 == 0 else DOCUMENT, height=0.8)
    share = 1 - lengths.sum() / (len(lengths) * lengths.max())
    padded.set(title=f"padded: {share:.0%} of it is padding", xlabel="tokens", yticks=[])
    padded.invert_yaxis()
    packs = [(rank, pack) for rank, packs in enumerate(plan.packs) for pack in packs]
    for row, (_, pack) in enumerate(packs):
        packed.barh(row, budget, color=WASTE, height=0.6)
        start = 0
        for text in pack:
            color = QUERY if text % 2 == 0 else DOCUMENT
            packed.barh(row, lengths[text], left=start, color=color, height=0.6, edgecolor=PAPER, linewidth=0.7)
            start += lengths[text]
    unused = 1 - lengths.sum() / (len(packs) * budget)
    packed.set(
        title=f"packed for two ranks: nothing is padded ({unused:.0%} of the budget is free)",
        xlabel="tokens",
        yticks=range(len(packs)),
        yticklabels=[f"rank {rank}" for rank, _ in packs],
    )
    packed.invert_yaxis()
    packed.legend(
        handles=[Rectangle((0, 0), 1, 1, color=one) for one in (QUERY, DOCUMENT, WASTE)],
        labels=["query", "document", "padding, or free"],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=3,
        frameon=False,
    )
    save(figure, "packing")
    return {"packing_padded_share": share, "packing_packs_share": unused}


def part_of_columns() -> tuple[np.ndarray, list[str]]:
    """[6 rows, 11 columns]: -1 the positive, 1 a negative, 0 left out, and the columns' names, of a small batch.

    Two ranks with three queries each. Queries 2 and 5 have the same positive; query 4 is of a set without in-batch
    negatives. Embeddings are orthogonal, so a row's gradient shows which columns its loss looks at.
    """
    owner = np.array([0, 0, 1, 2, 2, 3, 3, 4, 4, 4, 5])
    hard = np.array([0, 1, 0, 0, 1, 0, 1, 0, 1, 1, 0], dtype=bool)
    documents = np.array([10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 13])[:, None]
    rows, columns = make_targets(
        query=np.arange(6),
        positive=np.flatnonzero(~hard),
        weight=np.ones(6),
        in_batch=np.arange(6) != 4,
        dataset=np.zeros(6),
        documents=documents[~hard],
        column_query=owner,
        column_hard=hard,
        column_shared=np.ones(11, dtype=bool),
        column_dataset=np.zeros(11),
        column_documents=documents,
        masks=Masks(),
    )
    unit = torch.eye(17)
    found = score_rows(unit[11:], unit[:11], rows, columns, Masks(), 1.0, with_columns=False)
    number = Counter()
    names = []
    for query, is_hard in zip(owner, hard, strict=True):
        number[query] += is_hard
        names.append(f"h{query}{'′' * (number[query] - 1)}" if is_hard else f"p{query}")
    return np.sign(found.grad_rows[:, :11].numpy().round(6)), names


def gather() -> None:
    """Which passages each query's loss looks at, and who holds them."""
    part, names = part_of_columns()
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    colors = {-1.0: DOCUMENT, 1.0: "#c7d7ea", 0.0: "#ffffff"}
    for row, column in np.ndindex(*part.shape):
        axes.add_patch(Rectangle((column, row), 0.94, 0.94, facecolor=colors[part[row, column]], edgecolor="#b8b8b0"))
    axes.set(xlim=(-0.1, part.shape[1]), ylim=(6, -0.1), aspect="equal")
    axes.set_xticks(np.arange(part.shape[1]) + 0.47, names)
    axes.set_yticks(np.arange(6) + 0.47, [f"query {row}" for row in range(6)])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.plot([5 - 0.03] * 2, [-0.1, 6], color=INK, linewidth=1.5)
    axes.plot([-0.1, part.shape[1]], [3 - 0.03] * 2, color=INK, linewidth=1.5)
    for place, rank in ((1.5, 0), (4.5, 1)):
        axes.text(part.shape[1] + 0.3, place, f"rows of rank {rank}", va="center")
    axes.text(2.5, 6.4, "from rank 0", ha="center")
    axes.text(8, 6.4, "from rank 1", ha="center")
    axes.legend(
        handles=[Rectangle((0, 0), 1, 1, facecolor=colors[one], edgecolor="#b8b8b0") for one in (-1.0, 1.0, 0.0)],
        labels=["the positive", "a negative", "left out"],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.1),
        ncols=3,
        frameon=False,
    )
    save(figure, "gather")


def gradient_proof() -> dict[str, float]:
    """Every line of the proof: its largest difference from one process, against the bound."""
    text = (ROOT / "docs" / "gradient-proof.md").read_text(encoding="utf-8")
    bound = float(re.search(r"Bound: ([\d.e-]+\d)", text)[1])
    found: dict[str, list[float]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 15 and cells[0].isdigit():
            tp, pp, chunks, cp, ranks = (int(cells[index]) for index in (1, 3, 4, 5, 6))
            names = [name for name, size in (("TP", tp), ("PP", pp), ("CP", cp), ("data", ranks)) if size > 1]
            name = " x ".join(names) or "one process"
            found.setdefault(name, []).append(max(float(cell) for cell in cells[11:] if cell))
    figure, axes = plt.subplots(figsize=(8, 4))
    random = np.random.default_rng(0)
    order = sorted(found, key=lambda name: (name.count(" x ") + (name != "one process"), name))
    for row, name in enumerate(order):
        heights = row + random.uniform(-0.25, 0.25, len(found[name]))
        axes.scatter(found[name], heights, s=14, color=QUERY, alpha=0.6, linewidths=0)
    axes.axvline(bound, color="#c05621")
    axes.text(bound * 1.07, -0.3, "bound", color="#c05621")
    labels = [f"{name} ({len(found[name])})" for name in order]
    axes.set(xscale="log", xlim=(1e-7, 2e-5), yticks=range(len(order)), yticklabels=labels)
    axes.set(xlabel="largest difference of loss, clip norm, gradient and parameters from one process in float64")
    axes.invert_yaxis()
    save(figure, "gradient-proof")
    return {"gather_worst": max(max(values) for values in found.values())}


def folding() -> dict[str, float]:
    """Operations a token of the cross attention with the latents."""
    plain, folded, once = operations()
    figure, axes = plt.subplots(figsize=(8, 2.2))
    fold = f" {folded / 1e6:,.0f}, and for the fold as much again as {once / folded:,.0f} tokens, once a forward pass"
    bars = axes.barh([0, 1], [plain / 1e6, folded / 1e6], color=[WASTE, DOCUMENT], height=0.55)
    axes.bar_label(bars, [f" {plain / 1e6:,.0f}", fold])
    axes.set(yticks=[0, 1], yticklabels=["plain order", "folded"], xlabel="million operations a token", xlim=(0, 700))
    axes.invert_yaxis()
    save(figure, "folding")
    return {"folding_plain": plain, "folding_folded": folded}


def operations() -> tuple[float, float, float]:
    """Of a token in the plain order, from the shapes; of a token folded and of a fold, counted from the head."""
    hidden, latents, heads = 4096, 512, 8
    plain = 2 * (2 * hidden * heads * hidden) + 2 * (2 * heads * hidden * latents)
    with torch.device("meta"):
        head = LatentAttention(hidden, PoolingConfig(num_latents=latents, num_heads=heads))
        states, feed_forward = torch.empty(1000, hidden), Mlp(hidden)
    counted = []
    for work in (lambda: head(states, None), head.fold, lambda: feed_forward(states)):
        with FlopCounterMode(display=False) as counter:
            work()
        counted.append(counter.get_total_flops())
    whole, once, after = counted
    return plain, (whole - once - after) / len(states), once


def blend() -> dict[str, float]:
    """Twelve steps of a blend of three sets, and the shares that come of it."""
    sizes, names, batch = (4000, 1500, 500), ("4,000 records", "1,500 records", "500 records"), 32
    drawn = Blend(sizes, [None] * 3, batch, seed=1, stage=1, fingerprint="picture")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), width_ratios=(1.5, 1))
    for step in range(12):
        for place, sample in enumerate(drawn.samples(step)):
            left.add_patch(Rectangle((place, step), 0.9, 0.8, color=SETS[sample.dataset]))
    left.set(xlim=(0, batch), ylim=(12, 0), title="samples of a step, in order", ylabel="step", xticks=[])
    left.set_yticks(np.arange(0, 12, 2) + 0.4, range(0, 12, 2))
    left.spines[:].set_visible(False)
    steps = np.arange(1, 121)
    counts = np.array([drawn.drawn(int(step)) for step in steps])
    for dataset, (name, color) in enumerate(zip(names, SETS, strict=True)):
        right.plot(steps, counts[:, dataset] / (steps * batch), color=color, label=name)
        right.axhline(float(drawn.shares[dataset]), color=color, linewidth=0.8, linestyle=":")
    right.set(title="share of all samples so far", xlabel="step", ylim=(0, 0.8))
    right.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.58))
    save(figure, "blend")
    worst = max(abs(counts[-1, dataset] / (120 * batch) - float(drawn.shares[dataset])) for dataset in range(3))
    return {"blend_worst": worst}


STEP_WAYS = {
    "retain": "E0 E1 E2 E3 S B3 B2 B1 B0",
    "cached": "E0 E1 E2 E3 S B3 E2 B2 E1 B1 E0 B0",
}
"""The order of the work on four packs, as `step.py` has it: embed, score, backward."""
_SECONDS = {"E": 1.0, "S": 0.6, "B": 2.0}
_COLOR = {"E": QUERY, "S": "#805ad5", "B": "#c05621"}


LAYOUTS = (
    ("TP 2: four data-parallel ranks", ParallelConfig(tp=2)),
    ("TP 2, PP 2: two data-parallel ranks", ParallelConfig(tp=2, pp=2)),
    ("TP 2, CP 2: two data-parallel ranks", ParallelConfig(tp=2, cp=2)),
)


def layouts() -> None:
    """Eight GPUs in three layouts: who shares weights, stages and texts, as the process groups have it."""
    figure, axes = plt.subplots(1, len(LAYOUTS), figsize=(11, 2.2))
    for axis, (title, config) in zip(axes, LAYOUTS, strict=True):
        replicas: dict[tuple[int, ...], int] = {}
        for rank in range(8):
            groups = pretend(config, rank, 8)
            members = groups.members()
            shutdown()
            # Where the rank stands in its groups: along x by tensor, context and data rank, along y by stage.
            tp, cp, dp, pp = (members[name].index(rank) for name in ("tp", "cp", "dp", "pp"))
            color = SHADES[replicas.setdefault((dp,), len(replicas))]
            x, y = tp + config.tp * (cp + config.cp * dp) + 0.3 * dp, 1.15 * pp
            axis.add_patch(Rectangle((x, y), 0.92, 0.92, color=color))
            axis.text(x + 0.46, y + 0.46, str(rank), ha="center", va="center", color="white", fontsize=12)
        axis.set(title=title, xlim=(-0.1, 9), ylim=(2.3, -0.1), xticks=[], aspect="equal", anchor="N")
        for stage in range(config.pp if config.pp > 1 else 0):
            axis.text(4.6, 1.15 * stage + 0.46, f"stage {stage}", va="center")
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    save(figure, "layouts")


def step() -> None:
    """What the ways `retain` and `cached` do on four packs, and the graphs that are alive meanwhile."""
    figure, axes = plt.subplots(len(STEP_WAYS), figsize=(9, 3.6), sharex=True)
    for axis, (way, order) in zip(axes, STEP_WAYS.items(), strict=True):
        _walk_step(axis, way, order.split())
    axes[-1].legend(
        handles=[Rectangle((0, 0), 1, 1, color=color) for color in (*_COLOR.values(), "#d9d9d0")],
        labels=["embed a pack", "gather and score", "backward through it", "its graph is kept"],
        loc="upper center",
        bbox_to_anchor=(0.5, -0.05),
        ncols=4,
        frameon=False,
    )
    save(figure, "step")


def _walk_step(axis: Axes, way: str, order: list[str]) -> None:
    """One timeline: work in the upper half, living graphs as bars below it."""
    time, born, row = 0.0, {}, {pack: number for number, pack in enumerate("0123")}
    for place, word in enumerate(order):
        kind, pack = word[0], word[1:]
        axis.add_patch(Rectangle((time, 0), _SECONDS[kind] * 0.97, 1, color=_COLOR[kind]))
        axis.text(time + _SECONDS[kind] / 2, 0.5, pack, ha="center", va="center", color="white")
        time += _SECONDS[kind]
        # A graph is kept where nothing embeds the pack again before its backward pass.
        if kind == "E" and word not in order[place + 1 :]:
            born[pack] = time
        if kind == "B":
            axis.add_patch(Rectangle((born[pack], 1.3 + 0.35 * row[pack]), time - born[pack], 0.25, color="#d9d9d0"))
    axis.set(xlim=(0, 17), ylim=(2.8, -0.3), xticks=[], yticks=[0.5], yticklabels=[way])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


if __name__ == "__main__":
    main()
