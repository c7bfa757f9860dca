"""The runs of the quality study: which there are, the configuration of each, and what a finished one measured."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nvembed_mcore.log import read_metrics

BATCH, WIDTH, TEMPERATURE, LR = 256, 64, 0.05, 8e-3
"""What a run has where its axis does not say otherwise. `LR` is the peak rate at this batch and width."""
RATES = (0.5, 1.0, 2.0)
MAX_QUERY_TOKENS, MAX_DOCUMENT_TOKENS = 24, 32
NEGATIVES = (64, 256, 1024, 4096, 8192)
PARTS, BATCH_IN_PARTS = (128, 32, 8, 1), 2048
WIDTHS = (64, 128, 256, 512)
PASSES = (1, 2, 4, 8, 16)
TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2)
PASSES_OF_NEGATIVES, PASSES_OF_WIDTH, PASSES_OF_TEMPERATURE = 8, 1, 4
WARMUP = 0.1


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run; runs that are equal are trained once, whatever axes they are on.

    Attributes:
        batch: queries in a step.
        parts: the records are dealt into so many data sets and a query meets negatives of its own alone: 1 leaves all.
        width: hidden size of the model.
        passes: over the training records.
        temperature: of the loss.
        rate: factor on the learning rate that the rule gives.
        seed: of weights and order.
    """

    batch: int = BATCH
    parts: int = 1
    width: int = WIDTH
    passes: float = PASSES_OF_NEGATIVES
    temperature: float = TEMPERATURE
    rate: float = 1.0
    seed: int = 1

    def __post_init__(self) -> None:
        for name, multiple in (("batch", 1), ("parts", 1), ("width", 64), ("seed", 1)):
            value = getattr(self, name)
            if value < 1 or value % multiple:
                raise ValueError(f"{name} must be a multiple of {multiple} from {multiple} on, got {value}")
        if self.batch < 2 * self.parts:
            raise ValueError(f"a batch of {self.batch} in {self.parts} parts leaves a query without negatives")
        for name in ("passes", "temperature", "rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    @property
    def name(self) -> str:
        shape = f"batch{self.batch}-parts{self.parts}-width{self.width}"
        rate = f"-rate{self.rate:g}" if self.rate != 1 else ""
        return f"{shape}-passes{self.passes:g}-t{self.temperature:g}{rate}-seed{self.seed}"

    @property
    def negatives(self) -> int:
        """In-batch negatives of a query (in parts: on average)."""
        return self.batch // self.parts - 1

    @property
    def lr(self) -> float:
        """With the square root of the batch up to `BATCH`, then no further, and with one over that of the width.

        At 0.02 a batch of 4,096 does not learn until the schedule has brought the rate below 0.01 (axis `rate`).
        """
        return self.rate * LR * math.sqrt(min(self.batch, BATCH) / BATCH) * math.sqrt(WIDTH / self.width)

    def steps(self, records: int) -> int:
        """Optimizer steps: as near to `passes` as whole batches come."""
        return max(1, round(self.passes * records / self.batch))


AXES = ("negatives", "negatives_alone", "negatives_equal_steps", "tokens", "width", "temperature", "rate")
"""Three of negatives: the batch grows at equal queries seen; the batch stays and the records are in parts; the batch
grows at an equal number of steps, so that a larger one sees more."""


def runs_of(axis: str, seed: int) -> list[Run]:
    """The runs of an axis for one seed, in order of its values."""
    if axis == "negatives":
        return [Run(batch=number, seed=seed) for number in NEGATIVES]
    if axis == "negatives_alone":
        return [Run(batch=BATCH_IN_PARTS, parts=parts, seed=seed) for parts in PARTS]
    if axis == "negatives_equal_steps":
        # Of 4,096 it is the run above.
        return [Run(batch=number, passes=PASSES_OF_NEGATIVES * number / 4096, seed=seed) for number in NEGATIVES]
    if axis == "tokens":
        return [Run(passes=number, seed=seed) for number in PASSES]
    if axis == "width":
        return [Run(width=width, passes=PASSES_OF_WIDTH, seed=seed) for width in WIDTHS]
    if axis == "temperature":
        return [Run(temperature=value, passes=PASSES_OF_TEMPERATURE, seed=seed) for value in TEMPERATURES]
    if axis == "rate":
        small, large = Run(passes=PASSES_OF_TEMPERATURE, seed=seed), Run(batch=4096, seed=seed)
        return [replace(run, rate=rate) for run in (small, large) for rate in RATES]
    raise ValueError(f"no axis {axis!r}; there are {', '.join(AXES)}")


def plan(axes: Iterable[str], seeds: dict[str, int]) -> list[Run]:
    """All runs once, seed by seed, so that a study that is cut short has whole seeds.

    Args:
        seeds: axis -> number of its seeds.
    """
    axes = [*axes]
    numbered = (run for seed in range(1, max(seeds.values()) + 1) for axis in axes if seed <= seeds[axis]
                for run in runs_of(axis, seed))  # fmt: skip
    return [*dict.fromkeys(numbered)]


def architecture_of(run: Run, quickstart: dict[str, Any]) -> dict[str, Any]:
    """The quick start's `mistral.json` at this width, with one layer and heads of 32."""
    heads = run.width // 32
    shape = {"hidden_size": run.width, "intermediate_size": 2 * run.width, "num_attention_heads": heads}
    return quickstart | shape | {"num_key_value_heads": heads // 2, "head_dim": 32, "num_hidden_layers": 1}


@dataclass(frozen=True)
class Folders:
    """Where things are.

    Attributes:
        output: of the study.
        quickstart: `tokenizer` and `data` of the quick start.
    """

    output: Path
    quickstart: Path

    @property
    def records(self) -> Path:
        return self.quickstart / "data" / "train.jsonl"

    def run(self, run: Run) -> Path:
        return self.output / "runs" / run.name

    def parts(self, number: int) -> list[Path]:
        """The files of the training records in so many parts."""
        if number == 1:
            return [self.records]
        return [self.output / "parts" / str(number) / f"{part:03d}.jsonl" for part in range(number)]


def deal(folders: Folders, number: int) -> None:
    """Write the records in parts, in turn, so that neighbours (code of one file) are in different ones."""
    paths = folders.parts(number)
    if paths[-1].exists():
        return
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    lines = folders.records.read_text(encoding="utf-8").splitlines(keepends=True)
    for part, path in enumerate(paths):
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text("".join(lines[part::number]), encoding="utf-8")
        aside.replace(path)


def tree_of(run: Run, folders: Folders, records: int) -> dict[str, Any]:
    """The run's YAML file, as a tree."""
    steps = run.steps(records)
    longest = run == Run(passes=PASSES[-1], seed=run.seed)
    data = {
        "tokenizer": str(folders.quickstart / "tokenizer"),
        "cache_dir": str(folders.output / "tokens"),
        "max_query_tokens": MAX_QUERY_TOKENS,
        "max_document_tokens": MAX_DOCUMENT_TOKENS,
        "datasets": [{"path": str(path), "num_negatives": 0} for path in folders.parts(run.parts)],
    }
    pooling = {"kind": "latent", "num_latents": 32, "num_heads": 4, "head_width": 32, "initializer_range": 0.02}
    return {
        "run_dir": str(folders.run(run)),
        "seed": run.seed,
        "steps": steps,
        "batch_size": run.batch,
        "data": data,
        "model": {"config": str(folders.run(run) / "architecture.json"), "pooling": pooling},
        # A process that somebody stops for a while is not lost.
        "parallel": {"timeout_minutes": 1e6},
        # Graphs of a large batch are GBs, and several processes share the memory.
        "step": {"tokens_per_microbatch": 8192, "way": "auto" if run.batch <= 2048 else "cached"},
        "loss": {"temperature": run.temperature, "in_batch_from": "batch" if run.parts == 1 else "dataset"},
        "optim": {"lr": run.lr, "warmup_steps": max(1, round(WARMUP * steps))},
        "checkpoint": {"every_steps": steps},
        "eval": {
            "path": str(folders.quickstart / "data" / "heldout"),
            "every_steps": max(1, steps // 8) if longest else 0,
        },
        "log": {"tensorboard": False, "progress": False},
    }


@functools.cache
def record_count(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def identity_of(run: Run, folders: Folders, architecture: dict[str, Any]) -> str:
    """Names what a run trains, wherever its folders are; a result under another name is another run's."""
    whole = json.dumps([tree_of(run, folders, record_count(folders.records)), architecture], sort_keys=True)
    for place, name in ((folders.output, "OUTPUT"), (folders.quickstart, "QUICKSTART")):
        whole = whole.replace(str(place), name)
    data = (folders.quickstart / "data" / "statistics.json").read_text(encoding="utf-8")
    return hashlib.sha256((whole + data).encode()).hexdigest()[:16]


Row = dict[str, Any]


def rows_of(axes: Iterable[str], seeds: dict[str, int], found: dict[Run, dict[str, Any]]) -> Iterator[Row]:
    """The tidy table: a row for each axis and finished run of it, and one for each evaluation inside the longest."""
    for axis in axes:
        for seed in range(1, seeds[axis] + 1):
            for run in runs_of(axis, seed):
                if run in found:
                    yield _row(axis, run, found[run], found[run]["evaluations"][-1])
            longest = Run(passes=PASSES[-1], seed=seed)
            for line in found[longest]["evaluations"][1:] if axis == "tokens" and longest in found else ():
                yield _row("tokens_on_the_way", longest, found[longest], line)


def _row(axis: str, run: Run, result: dict[str, Any], scores: dict[str, float]) -> Row:
    step = int(scores["step"])
    done = result["lines"][:step]
    return {
        "axis": axis,
        "negatives": run.negatives,
        "width": run.width,
        "temperature": run.temperature,
        "seed": run.seed,
        "batch": run.batch,
        "parts": run.parts,
        "lr": round(run.lr, 6),
        "rate": run.rate,
        "steps": step,
        "of_steps": len(result["lines"]),
        "queries_seen": step * run.batch,
        "tokens_seen": int(sum(line["real_tokens"] for line in done)),
        "parameters": result["parameters"],
        "ndcg_at_10": round(scores["ndcg_at_10"], 6),
        "recall_at_10": round(scores["recall_at_10"], 6),
        "recall_at_100": round(scores["recall_at_100"], 6),
        "mrr_at_10": round(scores["mrr_at_10"], 6),
        "loss": round(sum(line["loss"] for line in done[-5:]) / len(done[-5:]), 6),
        "seconds": round(sum(line["seconds"] for line in done), 2),
    }


def read_result(folder: Path) -> dict[str, Any]:
    """Evaluations and training lines of a run that is done."""
    lines = read_metrics(folder / "metrics.jsonl")
    steps = [
        {name: line[name] for name in ("step", "loss", "real_tokens", "seconds")} for line in lines if "loss" in line
    ]
    return {"evaluations": [line for line in lines if "loss" not in line], "lines": steps}
