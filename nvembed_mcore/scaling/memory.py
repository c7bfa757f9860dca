"""Bytes that the fullest rank of a layout holds at its fullest moment, by kind."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from nvembed_mcore.scaling import activations
from nvembed_mcore.scaling.balance import Planned, plan_of
from nvembed_mcore.scaling.exchange import recomputes
from nvembed_mcore.scaling.layout import Layout
from nvembed_mcore.scaling.parameters import buffers_of, chunk_parameters, linears

if TYPE_CHECKING:
    from nvembed_mcore.scaling.hardware import Cluster
    from nvembed_mcore.scaling.workload import Workload

FRAGMENTATION = 0.05
"""Of all that torch allocates on a GPU, what it reserves besides and cannot use. Chosen, not measured."""
NCCL_BYTES = 1.0e9
"""Buffers of NCCL's communicators on a GPU, where there is more than one. Chosen, not measured."""
BLOCK_SCORES = {"cpu": 1 << 23, "cuda": 1 << 27}
LEAST_ROWS = 64
"""As in `loss`, which this room does not import."""


def memory_of(workload: Workload, layout: Layout, cluster: Cluster) -> dict[str, float]:
    """Bytes by kind on the fullest rank, whose sum is to fit the device.

    `weights` (FP8 copies included), `gradients` (float32 buffers), `optimizer` (main weights, moments and averages),
    `activations` (graphs that are kept, and what the pass needs besides), `gather_and_loss` (embeddings, scores and
    their gradients at that moment), `fragmentation` (on a GPU: what the allocator wastes, and NCCL's buffers).
    """
    is_gpu = cluster.device.name != "cpu"
    # A stage between the second and the last has as many layers as the second one, and keeps fewer packs.
    ranks = [rank_memory(workload, layout, stage) for stage in sorted({0, min(1, layout.pp - 1), layout.pp - 1})]
    fullest = max(ranks, key=lambda kinds: sum(kinds.values()))
    waste = FRAGMENTATION * sum(fullest.values()) + (NCCL_BYTES if layout.gpus > 1 else 0.0)
    return fullest | {"fragmentation": waste if is_gpu else 0.0}


def rank_memory(workload: Workload, layout: Layout, stage: int) -> dict[str, float]:
    """Bytes by kind of a stage's fullest rank, at the fullest moment of all sampled steps, without `fragmentation`:
    what torch's allocator gives out."""
    held = static(workload, layout, stage)
    moments = [
        moment
        for step in range(len(workload.lengths))
        for moment in _moments(workload, layout, stage, step, held["gradients"])
    ]
    activation, scores = max(moments, key=sum)
    return held | {"activations": activation, "gather_and_loss": scores}


def static(workload: Workload, layout: Layout, stage: int) -> dict[str, float]:
    """Weights, gradients and optimizer state of a rank of a stage, in bytes."""
    ranks = layout.dp * layout.cp if layout.distributed_optimizer else 1
    weights = gradients = optimizer = 0.0
    for chunk in range(layout.chunks):
        parameters = chunk_parameters(workload, layout, stage, chunk)
        for buffer in buffers_of(workload, layout, stage, chunk):
            held = buffer.padded if layout.distributed_optimizer else buffer.numel
            weights += held * (4 if buffer.is_float32 else workload.element)
            gradients += 4 * held
            # Two moments, float32 weights where the model's are not, and perhaps an average.
            held_by_number = (8 if buffer.is_float32 else 12) + 4 * workload.averages
            optimizer += held_by_number * buffer.numel / ranks
        weights += workload.element * sum(one.numel for one in parameters if not one.is_trained)
    return dict(weights=weights + fp8_copies(workload, layout, stage), gradients=gradients, optimizer=optimizer)


def fp8_copies(workload: Workload, layout: Layout, stage: int) -> float:
    """FP8 forms of the layers' linears beside the weights: rows and columns a byte each; emulated, one rounded copy.

    They are there during a step in every case, and of frozen weights always.
    """
    if workload.fp8 == "off":
        return 0.0
    layers = sum(layout.stages(workload.architecture.num_hidden_layers)[stage])
    numbers = layers * sum(one.inputs * one.outputs for one in linears(workload.architecture, layout.tp))
    width = 2.0 if workload.backend == "transformer_engine" else float(workload.element)
    return width * numbers * (1 + 1 / 32 if workload.fp8 == "mxfp8" else 1)


@dataclass(frozen=True)
class _Graph:
    """What a chunk of a stage keeps of a pack, and what its backward pass needs besides at its fullest, in bytes."""

    kept: float
    work: float


def _graph(workload: Workload, layout: Layout, stage: int, chunk: int, lengths: np.ndarray) -> _Graph:
    split = _split(layout)
    shape = _shape(workload, split, lengths.tobytes())
    is_first, is_last = stage == 0 and chunk == 0, stage == layout.pp - 1 and chunk == layout.chunks - 1
    layers = layout.stages(workload.architecture.num_hidden_layers)[stage][chunk]
    # FGM asks what even a frozen table embeds for its gradient.
    ends_here = is_first and workload.walks == 1
    kept = (layers - ends_here) * _layer(workload, split, shape, False)
    kept += ends_here * _layer(workload, split, shape, True)
    kept += activations.outside_layers(workload, layout, shape, is_first=is_first, is_last=is_last)
    if layout.pp > 1 and not is_last:
        # What goes to the next stage stays until its gradient comes back; what came is the first norm's input.
        kept += workload.element * shape.split * workload.architecture.hidden_size
    behind_head = kept
    if is_last:
        behind_head -= activations.head(workload, layout, shape) + activations.last_norm(workload, shape)
    fullest = behind_head + activations.layer_work(workload, layout, shape)
    if is_last:
        fullest = max(fullest, kept + activations.head_work(workload, layout, shape))
    return _Graph(kept, fullest - kept)


@lru_cache(maxsize=4096)
def _split(layout: Layout) -> Layout:
    """A layout that splits a layer in the same way: all that what a layer keeps of a pack depends on."""
    return Layout(gpus=layout.tp * layout.cp, tp=layout.tp, cp=layout.cp, sequence_parallel=layout.sequence_parallel)


@lru_cache(maxsize=8192)
def _shape(workload: Workload, split: Layout, lengths: bytes) -> activations.Shape:
    return activations.shape_of(workload, split, np.frombuffer(lengths, dtype=np.int64))


@lru_cache(maxsize=8192)
def _layer(workload: Workload, split: Layout, shape: activations.Shape, is_first: bool) -> float:
    return activations.layer(workload, split, shape, is_first=is_first)


def _moments(workload: Workload, layout: Layout, stage: int, step: int, gradients: float) -> list[tuple[float, float]]:
    """Activations and scores at the moments of a sampled step that may be the fullest, over data-parallel ranks."""
    plan, found, is_last = plan_of(workload, layout, step), [], stage == layout.pp - 1
    for rank in {int(numbers.argmax()) for numbers in (plan.filled, plan.largest, plan.texts, plan.queries)}:
        graphs = [
            [_graph(workload, layout, stage, chunk, lengths) for chunk in range(layout.chunks)]
            for lengths in plan.lengths(rank) * workload.views
        ]
        embeddings = 4.0 * int(plan.texts[rank]) * workload.architecture.hidden_size if is_last else 0.0
        embeddings *= workload.views
        if layout.pp > 1:
            backward, scoring = _in_flight(layout, stage, graphs), 0.0
        elif layout.way == "cached":
            backward, scoring = max(one.kept + one.work for (one,) in graphs), graphs[-1][0].kept
        else:
            scoring = sum(one.kept for (one,) in graphs)
            backward = scoring + graphs[-1][0].work
        moved = _kept_of_tokens(workload, layout, plan, rank) if stage == 0 else 0.0
        found.append((moved + backward, 2 * embeddings))
        if is_last:
            found.append((moved + scoring, embeddings + scores(workload, layout, plan, rank, step)))
    found.append((_at_the_end(workload, layout, stage, gradients), 0.0))
    return found


def _kept_of_tokens(workload: Workload, layout: Layout, plan: Planned, rank: int) -> float:
    """With FGM, of all packs the gradient to the embedded tokens, [t, H] (adversarial.py)."""
    if workload.walks == 1:
        return 0.0
    tokens = sum(_shape(workload, _split(layout), lengths.tobytes()).split for lengths in plan.lengths(rank))
    return float(workload.element * workload.views * tokens * workload.architecture.hidden_size)


def _in_flight(layout: Layout, stage: int, graphs: list[list[_Graph]]) -> float:
    """Most bytes of graphs at once, and of one backward pass, while the pipeline's schedule walks through the packs.

    One forward, one backward, behind a warm-up (Megatron-Core's `get_pp_rank_microbatches`, `get_schedule_table`);
    packs go in groups of as many as there are stages through the chunks.
    """
    packs, pp, chunks = len(graphs), layout.pp, layout.chunks
    order = [
        (pack, chunk)
        for first in range(0, packs, pp if chunks > 1 else packs)
        for chunk in range(chunks)
        for pack in range(first, min(packs, first + pp if chunks > 1 else packs))
    ]
    warm_up = pp - stage - 1 if chunks == 1 else (pp - stage - 1) * 2 + (chunks - 1) * pp
    most = held = 0.0
    for number in range(len(order) + warm_up):
        if number < len(order):
            pack, chunk = order[number]
            held += graphs[pack][chunk].kept
        if number >= warm_up:
            pack, chunk = order[number - warm_up]
            graph = graphs[pack][chunks - 1 - chunk]
            most = max(most, held + graph.work)
            held -= graph.kept
    return most


def _at_the_end(workload: Workload, layout: Layout, stage: int, gradients: float) -> float:
    """Behind the last pack: gloo's reduce-scatter works on a copy of the gradients; NCCL needs none."""
    is_copied = workload.device_type == "cpu" and layout.distributed_optimizer
    table = activations.embedding_grad(workload, layout) if stage == 0 else 0.0
    return max(gradients if is_copied else 0.0, table)


def scores(workload: Workload, layout: Layout, plan: Planned, rank: int, step: int) -> float:
    """Bytes of scoring at its fullest, on a data-parallel rank of the last stage (score.py, loss.py), in float32.

    Embeddings of all texts (N D) and of this rank (n D); the gradient and a buffer that it is added up in, of all
    texts or, where each rank makes its own, of this rank's; the anchors and their gradient; the gradient of the
    columns; and a block of scores. On CUDA in bfloat16 also the embeddings in it, and a block's gradient. R-Drop has
    all of these but the block twice.
    """
    width, texts, owned = workload.architecture.hidden_size, len(plan.sizes), int(plan.texts[rank])
    own, is_positive = recomputes(workload, plan, step), workload.is_positive[step]
    pairs, columns = int(is_positive.sum()), texts - workload.num_queries
    mine = int(np.isin(workload.query[step][is_positive], plan.owned(rank)).sum())
    is_half = workload.device_type == "cuda" and workload.dtype == "bfloat16"
    gradient = owned if own else texts
    rows = texts * (1.5 if is_half else 1) + owned + 2 * gradient + 2 * mine
    if own:
        rows += pairs + owned
        block = _block(workload.device_type, pairs, owned)
    else:
        rows += columns
        block = _block(workload.device_type, mine, columns)
    return 4.0 * width * rows * workload.views + (6 if is_half else 4) * block


def _block(device_type: str, rows: int, columns: int) -> float:
    """Scores of one block."""
    height = max(LEAST_ROWS, BLOCK_SCORES[device_type] // max(1, columns))
    return float(max(1, min(height, rows)) * columns)
