"""Step times that others published against the time model: constants fitted on one family, tested on all others."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from nvembed_mcore.config import LoraConfig
from nvembed_mcore.scaling import seconds
from nvembed_mcore.scaling.architecture import Architecture
from nvembed_mcore.scaling.hardware import Cluster, cluster
from nvembed_mcore.scaling.layers import Pack, Pass, Terms, embedding, layer, scaled
from nvembed_mcore.scaling.layout import Layout
from nvembed_mcore.scaling.pipeline import walk, with_host
from nvembed_mcore.scaling.update import data_parallel

DATA = Path(__file__).with_name("published.yaml")
FITTED_FAMILY, FITTED_DEVICE = "llama", "h100"


@dataclass(frozen=True)
class Row:
    """One published step time, and what was computed.

    `assumed`: what its source does not say. `recompute`: none, attention, full. `overlaps`: whether communication of
    tensor and data parallelism runs beside computing. `gradient_bytes`: of a number as it is reduced.
    """

    name: str
    family: str
    source: str
    device: str
    architecture: Architecture
    dtype: str
    fp8: str
    causal: bool
    lora: LoraConfig | None
    layout: Layout
    sequence: int
    text: int
    microbatch: int
    sequences: int
    published: float
    recompute: str
    overlaps: bool
    is_fused: bool
    assumed: list[str]
    gradient_bytes: int = 2

    @property
    def is_fitted(self) -> bool:
        return self.family == FITTED_FAMILY and self.device == FITTED_DEVICE

    @property
    def packs(self) -> int:
        return self.sequences // (self.layout.dp * self.microbatch)


def read_rows(path: Path = DATA) -> list[Row]:
    """All rows of the data file."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [
        _row(run, data["models"][run["model"]], data["sources"], *row) for run in data["runs"] for row in run["rows"]
    ]


def _row(run: dict, model: dict, sources: dict, gpus: int, sequences: int, published: float) -> Row:
    layout = Layout(
        gpus=gpus,
        **{name: run.get(name, 1) for name in ("tp", "pp", "cp", "chunks")},
        tokens_per_microbatch=run["sequence"] * run.get("microbatch", 1),
        sequence_parallel=run.get("recompute") != "full",
    )
    rank = run.get("lora")
    return Row(
        name=run["model"],
        family=model["family"],
        source=sources[run["source"]],
        device=run.get("device", "h100"),
        architecture=_architecture(model),
        dtype="bfloat16",
        fp8=run.get("fp8", "off"),
        causal=True,
        lora=LoraConfig(rank=rank, dropout=0.0, targets=["q", "k", "v"]) if rank else None,
        layout=layout,
        sequence=run["sequence"],
        text=run.get("text", run["sequence"]),
        microbatch=run.get("microbatch", 1),
        sequences=sequences,
        published=published,
        recompute=run.get("recompute", "none"),
        overlaps=run.get("overlaps", True),
        # The runs that recompute are of the time before fused attention.
        is_fused="recompute" not in run,
        assumed=run.get("assumed", []),
    )


def _architecture(model: dict[str, Any]) -> Architecture:
    return Architecture(
        vocab_size=model["vocabulary"],
        hidden_size=model["hidden"],
        intermediate_size=model["ffn"],
        num_hidden_layers=model["layers"],
        num_attention_heads=model["heads"],
        num_key_value_heads=model["groups"],
        head_dim=model["hidden"] // model["heads"],
        gated_mlp=model["gated"],
    )


def predict_row(row: Row, machine: Cluster) -> Terms:
    """Seconds of a step by term."""
    layout, sizes = row.layout, row.architecture
    pack = Pack(row.sequence * row.microbatch / layout.cp, row.text / 2, row.microbatch)
    one = layer(row, layout, machine, pack, overlaps_tp=row.overlaps, is_fused=row.is_fused)
    one = Pass(one.forward, one.backward + _again(row, one))
    stages = [one.times(sum(chunks)) for chunks in layout.stages(sizes.num_hidden_layers)]
    stages[0] += embedding(row, layout, machine, pack.tokens)
    stages[-1] += language_head(row, machine, pack.tokens)
    both = []
    for chunks, stage in zip(layout.stages(sizes.num_hidden_layers), stages, strict=True):
        hosts = [seconds.host(machine, sum(chunks), is_backward) for is_backward in (False, True)]
        both.append(
            with_host(stage.forward, hosts[0]) + with_host(stage.backward, hosts[1]) + _sends(row, machine, pack)
        )
    terms = walk(both, row.packs, layout.chunks)
    return terms + _gradients(row, machine, stages[0])


def _again(row: Row, one: Pass) -> Terms:
    """What the backward pass computes once more."""
    if row.recompute == "full":
        return one.forward
    if row.recompute == "attention":
        return Counter(attention=one.forward["attention"])
    return Counter()


def language_head(row: Row, machine: Cluster, tokens: float) -> Pass:
    """The vocabulary's product, its gradients, and cross entropy: 12 bytes a logit forward, 8 backward."""
    hidden, columns = row.architecture.hidden_size, row.architecture.vocab_size / row.layout.tp
    forward = seconds.matmul(machine, row.dtype, tokens, hidden, columns)
    backward = seconds.matmul(machine, row.dtype, tokens, columns, hidden)
    if row.lora is None:
        backward += seconds.matmul(machine, row.dtype, hidden, tokens, columns)
    logits = tokens * columns
    return Pass(
        Counter(head=forward + seconds.memory(machine, 12 * logits)),
        Counter(head=backward + seconds.memory(machine, 8 * logits)),
    )


def _sends(row: Row, machine: Cluster, pack: Pack) -> Terms:
    """Handing a pack on and its gradient back, once a chunk; beside other packs where stages are interleaved."""
    layout = row.layout
    if layout.pp == 1:
        return Counter()
    moved = 2 * pack.tokens * row.architecture.hidden_size / (layout.tp if layout.splits_tokens else 1)
    one = 2 * layout.chunks * seconds.send(machine.inter_node, moved)
    return Counter(pipeline_parallel=seconds.visible(machine, one, math.inf, layout.chunks > 1))


def _gradients(row: Row, machine: Cluster, first_stage: Pass) -> Terms:
    """Reducing gradients, the optimizer and gathering weights, of the stage with the embedding."""
    sizes, layout = row.architecture, row.layout
    width = sizes.num_attention_heads * sizes.head_dim
    weights = sizes.hidden_size * (2 * width + 2 * sizes.num_key_value_heads * sizes.head_dim)
    weights += (3 if sizes.gated_mlp else 2) * sizes.hidden_size * sizes.intermediate_size
    layers = sum(layout.stages(sizes.num_hidden_layers)[0])
    total = (layers * weights + sizes.vocab_size * sizes.hidden_size) / layout.tp
    if row.lora:
        total = layers * row.lora.rank * 4 * sizes.hidden_size
    return data_parallel(
        machine,
        layout,
        parameters=total,
        gradient_bytes=row.gradient_bytes * total,
        weight_bytes=(1 if row.fp8 != "off" else 2) * total,
        backward=scaled(first_stage.backward, 1.0).total(),
        forward=first_stage.forward.total(),
        overlaps=(row.overlaps, row.overlaps),
    )


def errors(rows: list[Row], constants: dict[str, float]) -> list[float]:
    """Relative errors with these constants."""
    machines = {row.device: cluster(row.device).with_constants(**constants) for row in rows}
    return [predict_row(row, machines[row.device]).total() / row.published - 1 for row in rows]


def summary(rows: list[Row], found: list[float]) -> dict[str, float]:
    """Medians of the absolute errors: of the fitted family, of all others, and the largest of these."""
    fitted = [abs(error) for row, error in zip(rows, found, strict=True) if row.is_fitted]
    others = [abs(error) for row, error in zip(rows, found, strict=True) if row.family != FITTED_FAMILY]
    return {
        "median_error_published": statistics.median(others),
        "median_error_fitted": statistics.median(fitted),
        "max_error_published": max(others),
        "rows_published": len(others),
        "rows_fitted": len(fitted),
    }


def report() -> dict[str, float]:
    """Print every row, and return the figures."""
    rows = read_rows()
    found = errors(rows, {})
    table = Table(
        "model", "device", "precision", "trains", "GPUs", "TP/PP/CP/v", "published", "predicted", "error", ""
    )
    for row, error in zip(rows, found, strict=True):
        layout = row.layout
        remarks = (["fitted"] if row.is_fitted else []) + row.assumed
        table.add_row(
            row.name,
            row.device,
            "bf16" if row.fp8 == "off" else "fp8",
            "adapters" if row.lora else "all" + ("" if row.recompute == "none" else f", {row.recompute} again"),
            str(layout.gpus),
            f"{layout.tp}/{layout.pp}/{layout.cp}/{layout.chunks}",
            f"{row.published:.3f} s",
            f"{row.published * (1 + error):.3f} s",
            f"{100 * error:+.1f} %",
            ", ".join(remarks),
        )
    Console(width=170).print(table)
    return summary(rows, found)
