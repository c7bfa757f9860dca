"""The paper's ablations at small scale: which recipes there are, and the configuration of each of their stages.

Tables 2 and 4 of NV-Embed (arXiv 2405.17428). A recipe is one or two stages of `nvembed train` from random weights.
What stands first takes the higher rate, whatever it trains on, and all recipes of a table take as many steps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.bench.quality_measure import IDENTIFY, RETRIEVE

POOLINGS = ("last", "mean", "latent", "self_attention")
MASKS = ("bidirectional", "causal")
ORDERS = {
    "one_in_batch": ("blend_in_batch",),
    "one_alone": ("blend",),
    "two_stages": ("retrieval", "blend"),
    "reversed": ("blend", "retrieval"),
}
"""What the stages of a recipe train on: `retrieval` with in-batch negatives alone; `blend`, retrieval and topics in
the same batches, with one hard negative each and none of the batch's; `blend_in_batch`, the same with both."""
STEPS, BATCH, TEMPERATURE = 200, 128, 0.05
"""Optimizer steps of the whole recipe; queries in a step."""
RATES, WARMUP = (8e-3, 2e-3), 0.1
"""Peak rate of what comes first, and of all that comes after; linear warm-up over a part of a stage's steps."""
TAUGHT_STEPS = 100
"""Steps of search before a recipe that does not begin with random weights."""
MAX_QUERY_TOKENS, MAX_DOCUMENT_TOKENS = 40, 32
HIDDEN, LAYERS, HEAD = 64, 1, 32
POOLING = {"num_latents": 32, "num_heads": 4, "head_width": 16, "initializer_range": 0.02}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One model; the recipe of both tables (two stages, latent, bidirectional) is trained once.

    Attributes:
        order: of `ORDERS`.
        pooling, mask: of `POOLINGS` and `MASKS`.
        taught: whether it begins after `TAUGHT_STEPS` steps of search, which stand for a model that knows text; else
            with random weights.
        seed: of weights and order.
    """

    order: str = "two_stages"
    pooling: str = "latent"
    mask: str = "bidirectional"
    taught: bool = False
    seed: int = 1

    @property
    def name(self) -> str:
        start = "-taught" if self.taught else ""
        return f"{self.order}-{self.pooling}-{self.mask}{start}-seed{self.seed}"

    @property
    def stages(self) -> tuple[tuple[str, int], ...]:
        """What each stage trains on, and its steps."""
        contents = ORDERS[self.order]
        stages = tuple((content, STEPS // len(contents)) for content in contents)
        return (("retrieval", TAUGHT_STEPS), *stages) if self.taught else stages


def poolings(seed: int) -> Iterator[Recipe]:
    """Table 2."""
    for pooling in POOLINGS:
        for mask in MASKS:
            yield Recipe(pooling=pooling, mask=mask, seed=seed)


def orders(seed: int) -> Iterator[Recipe]:
    """Table 4, its part on stages, from both beginnings."""
    for taught in (False, True):
        for order in ORDERS:
            yield Recipe(order=order, taught=taught, seed=seed)


def architecture(mistral: dict[str, Any], layers: int) -> dict[str, Any]:
    """The quick start's `mistral.json`, half as wide."""
    heads = HIDDEN // HEAD
    shape = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_attention_heads": heads}
    return mistral | shape | {"num_key_value_heads": heads // 2, "head_dim": HEAD, "num_hidden_layers": layers}


def data_tree(quickstart: Path, cache: Path) -> dict[str, Any]:
    """Tokenizer and limits."""
    return {
        "tokenizer": str(quickstart / "tokenizer"),
        "cache_dir": str(cache),
        "max_query_tokens": MAX_QUERY_TOKENS,
        "max_document_tokens": MAX_DOCUMENT_TOKENS,
    }


def datasets(content: str, quickstart: Path) -> list[dict[str, Any]]:
    """The blend of a stage; shares are by records, which the paper samples uniformly."""
    in_batch = content != "blend"
    retrieval = {"path": str(quickstart / "data" / "train.jsonl"), "instruction": RETRIEVE}
    topics = {
        "path": str(quickstart / "data" / "stage2_topics.jsonl"),
        "instruction": IDENTIFY,
        "task": "classification",
    }
    used = [retrieval] if content == "retrieval" else [retrieval, topics]
    # In-batch negatives are many, and a hard one more makes the step half as long again.
    hard = 0 if content == "retrieval" else 1
    return [one | {"in_batch_negatives": in_batch, "num_negatives": hard} for one in used]


def trees(recipe: Recipe, folder: Path, quickstart: Path) -> list[dict[str, Any]]:
    """The YAML files of the recipe's stages, as trees; their runs lie in `folder`."""
    found = []
    for number, (content, steps) in enumerate(recipe.stages, 1):
        begin = {"config": str(folder / "architecture.json")}
        found.append({
            "run_dir": str(folder / f"stage{number}"),
            "stage": number,
            "seed": recipe.seed,
            "steps": steps,
            "batch_size": BATCH,
            "data": data_tree(quickstart, folder.parent.parent / "tokens")
            | {"datasets": datasets(content, quickstart)},
            "model": (begin if number == 1 else {"init_from": str(folder / f"stage{number - 1}")})
            | {"attention_mask": recipe.mask, "pooling": POOLING | {"kind": recipe.pooling}},
            "step": {"tokens_per_microbatch": 8192},
            "loss": {"temperature": TEMPERATURE},
            "optim": {"lr": RATES[min(number, 2) - 1], "warmup_steps": round(WARMUP * steps)},
            "checkpoint": {"every_steps": steps},
            # A process that somebody stops for a while is not lost.
            "parallel": {"timeout_minutes": 1e6},
            "log": {"tensorboard": False, "progress": False},
        })  # fmt: skip
    return found


def identity(parts: Any, places: dict[str, Path], data: Path) -> str:
    """Names what is trained, wherever its folders are; a result under another name is another run's.

    Args:
        parts: all that the result follows from, as JSON values.
        places: folders whose own paths do not matter, by a name that stands for them.
        data: folder of the data; its statistics name them.
    """
    whole = json.dumps(parts, sort_keys=True)
    for name, place in places.items():
        whole = whole.replace(str(place), name)
    return hashlib.sha256((whole + (data / "statistics.json").read_text(encoding="utf-8")).encode()).hexdigest()[:16]
