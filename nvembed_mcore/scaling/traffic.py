"""Bytes that a rank hands to collectives and sends in one step, as `parallel.traffic.Traffic` counts them.

Of an all-gather its own part, of a reduce-scatter the whole; a hand-over between stages where it is sent; nothing in
groups of one process. On GPUs TransformerEngine moves keys and values of context-parallel ranks by calls of its own,
which are not counted there.

Letters: `T` tokens of a context-parallel rank's part of a pack, `t` those of a tensor rank, `H` hidden size, `n` texts
of the rank with the most, `D` embedding size, `W` data-parallel size, `r` rank of the adapters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nvembed_mcore.scaling.activations import Shape, shape_of
from nvembed_mcore.scaling.balance import Planned, plan_of
from nvembed_mcore.scaling.exchange import recomputes
from nvembed_mcore.scaling.parameters import buffers_of, chunk_parameters, linears

if TYPE_CHECKING:
    import numpy as np

    from nvembed_mcore.scaling.layout import Layout
    from nvembed_mcore.scaling.workload import Workload

Key = tuple[str, str]
"""Kind of the collective, and its group."""

_DIMENSIONS = {
    "data": ("dp",),
    "tensor": ("tp",),
    "pipeline": ("pp",),
    "context": ("cp",),
    "model": ("tp", "pp"),
    "data and context": ("dp", "cp"),
    "tensor and context": ("tp", "cp"),
    "all": ("dp", "tp", "pp", "cp"),
}
SHAPE_BYTES = 24
"""Stages tell each other the shape of what they send: three int64."""


def traffic_of(
    workload: Workload, layout: Layout, stage: int | None = None, dp_rank: int = 0, step: int | None = None
) -> dict[Key, float]:
    """Bytes of one step by kind and group.

    Args:
        stage: pipeline stage of the rank; None: the last.
        dp_rank: its data-parallel rank.
        step: one of the sampled steps; None: the mean over all of them.
    """
    stage = layout.pp - 1 if stage is None else stage
    steps = range(len(workload.lengths)) if step is None else [step]
    total: Counter[Key] = Counter()
    for one in steps:
        plan = plan_of(workload, layout, one)
        packs = plan.lengths(dp_rank) * workload.views
        if workload.walks == 2 and stage == 0:
            _add_between_walks(total, workload, layout, packs)
        # Every walk is as the first.
        before, total = total, Counter()
        if stage == layout.pp - 1:
            _add_scoring(total, workload, layout, plan, one)
        for number, lengths in enumerate(packs):
            forwards = 2 if layout.way == "cached" and (layout.pp > 1 or number < len(packs) - 1) else 1
            for chunk in range(layout.chunks):
                shape = shape_of(workload, layout, lengths)
                _add_layers(total, workload, layout, shape, (stage, chunk), forwards)
                _add_ends(total, workload, layout, shape, (stage, chunk), forwards)
                _add_sends(total, workload, layout, shape, (stage, chunk), forwards)
        total = before + Counter({key: workload.walks * count for key, count in total.items()})
        _add_once(total, workload, layout, stage)
    return {key: count / len(steps) for key, count in sorted(total.items()) if count}


def group_of(layout: Layout, *dimensions: str) -> str | None:
    """Name of the group over some dimensions: of those with the same ranks the first; None where it has one rank."""

    def wide(names: tuple[str, ...]) -> set[str]:
        return {name for name in names if getattr(layout, name) > 1}

    if not wide(dimensions):
        return None
    return next(name for name, some in _DIMENSIONS.items() if wide(some) == wide(dimensions))


def _add(total: Counter[Key], layout: Layout, kind: str, dimensions: tuple[str, ...], count: float) -> None:
    if (group := group_of(layout, *dimensions)) is not None:
        total[kind, group] += count


def _add_scoring(total: Counter[Key], workload: Workload, layout: Layout, plan: Planned, step: int) -> None:
    """Embeddings in float32, [n, D] of each rank; the gradients' sum [W n, D], or two numbers a row of each loss.

    That in each view; and four numbers a row of their divergence.
    """
    width, rows = workload.architecture.hidden_size * workload.views, max(1, int(plan.texts.max()))
    _add(total, layout, "all_gather", ("dp",), 4 * width * rows)
    if not recomputes(workload, plan, step):
        _add(total, layout, "reduce_scatter", ("dp",), 4 * width * rows * layout.dp)
        return
    is_positive, queries = workload.is_positive[step], workload.query[step]
    holders = plan.holders
    counts = Counter(holders[queries[is_positive]].tolist())
    most = [max(counts.values())]
    if workload.loss.symmetric:
        counts = Counter(holders[is_positive[: len(holders)]].tolist())
        most.append(max(counts.values()))
    losses = 1 + len(workload.loss.matryoshka_dims)
    numbers = 2 if workload.views == 1 else 2 * 2 + 4
    _add(total, layout, "all_gather", ("dp",), 4 * numbers * sum(most) * losses)


def _add_between_walks(total: Counter[Key], workload: Workload, layout: Layout, packs: Sequence[np.ndarray]) -> None:
    """With FGM, on the first stage: the squares of each sequence's gradient, float64, summed over who has parts of its
    tokens; and in the first walk the gradient to what a frozen table embeds, which nothing else asks for."""
    dimensions = ("tp", "cp") if layout.splits_tokens else ("cp",)
    for lengths in packs:
        shape = shape_of(workload, layout, lengths)
        _add(total, layout, "all_reduce", dimensions, 8 * shape.texts)
        if workload.lora:
            kind = "reduce_scatter" if layout.splits_tokens else "all_reduce"
            whole = workload.element * shape.tokens * workload.architecture.hidden_size
            _add(total, layout, kind, ("tp",), whole)


def _add_once(total: Counter[Key], workload: Workload, layout: Layout, stage: int) -> None:
    """Gradients and weights by Megatron's buffers, gradients that tensor ranks sum, and the scalars of a step."""
    ranks, summed = layout.dp * layout.cp, 0
    for chunk in range(layout.chunks):
        for buffer in buffers_of(workload, layout, stage, chunk):
            kind = "reduce_scatter" if layout.distributed_optimizer else "all_reduce"
            _add(total, layout, kind, ("dp", "cp"), 4 * buffer.padded)
            if layout.distributed_optimizer:
                width = 4 if buffer.is_float32 else workload.element
                _add(total, layout, "all_gather", ("dp", "cp"), width * buffer.padded / ranks)
        parameters = chunk_parameters(workload, layout, stage, chunk)
        summed += sum(one.numel for one in parameters if one.is_trained and one.is_summed)
    _add(total, layout, "all_reduce", ("tp",), 4 * summed)
    # Loss (and its parts), accuracy and tokens; the last stage's temperature with them; the gradient's norm.
    scalars = 4 + (workload.views - 1) + (workload.walks - 1)
    _add(total, layout, "all_reduce", ("dp",), scalars * 8)
    if layout.pp > 1:
        _add(total, layout, "broadcast", ("pp",), (scalars + 1) * 8)
    _add(total, layout, "all_reduce", _DIMENSIONS["all" if layout.distributed_optimizer else "model"], 4)
    if workload.fp8 == "delayed" and workload.backend == "local":
        layers = sum(layout.stages(workload.architecture.num_hidden_layers)[stage])
        for dimensions in (("tp",), ("dp", "cp")):
            _add(total, layout, "all_reduce", dimensions, 4 * 3 * 4 * layers)


def _add_layers(
    total: Counter[Key], workload: Workload, layout: Layout, shape: Shape, place: tuple[int, int], forwards: int
) -> None:
    """Of a chunk's layers: tensor-parallel linears and adapters, and keys and values of context-parallel ranks.

    Under sequence parallelism a column-parallel linear gathers its input (t H), a row-parallel one scatters its output
    (T H), both also backward; a trained column-parallel weight gathers its input again. Otherwise all-reduces of T H:
    behind a row-parallel linear forward, before a column-parallel one backward.
    """
    stage, chunk = place
    sizes, element = workload.architecture, workload.element
    layers = layout.stages(sizes.num_hidden_layers)[stage][chunk]
    whole, part = (element * tokens * sizes.hidden_size * layers for tokens in (shape.tokens, shape.split))
    if layout.splits_tokens:
        again = 2 if workload.lora is None else 0
        _add(total, layout, "all_gather", ("tp",), part * (2 * forwards + 2 + again))
        _add(total, layout, "reduce_scatter", ("tp",), whole * (2 * forwards + 2))
        if workload.lora and stage == 0 and chunk == 0:
            # Nothing behind the frozen embedding needs a gradient.
            _add(total, layout, "reduce_scatter", ("tp",), -whole / layers)
    else:
        first = 1 if workload.lora and stage == 0 and chunk == 0 else 0
        _add(total, layout, "all_reduce", ("tp",), whole * (2 * forwards + 2) - first * whole / layers)
    if workload.lora:
        _add_adapters(total, workload, layout, shape, layers, forwards)
    keys = element * shape.tokens * 2 * sizes.num_key_value_heads * sizes.head_dim / layout.tp * layers
    if workload.backend == "local":
        _add(total, layout, "all_gather", ("cp",), keys * forwards)
        _add(total, layout, "reduce_scatter", ("cp",), keys * layout.cp)


def _add_adapters(
    total: Counter[Key], workload: Workload, layout: Layout, shape: Shape, layers: int, forwards: int
) -> None:
    """What crosses tensor ranks between the two products of an adapter, [T, r of each projection]."""
    for linear in linears(workload.architecture, layout.tp):
        targets = [target for target in linear.rows if target in workload.lora.targets]
        width = workload.element * workload.lora.rank * len(targets) * layers
        whole, part = width * shape.tokens, width * shape.split
        if not layout.splits_tokens:
            _add(total, layout, "all_reduce", ("tp",), whole * (forwards if linear.is_row_parallel else 1))
        elif linear.is_row_parallel:
            _add(total, layout, "reduce_scatter", ("tp",), whole * forwards)
            _add(total, layout, "all_gather", ("tp",), part)
        else:
            _add(total, layout, "all_gather", ("tp",), part * forwards)
            _add(total, layout, "reduce_scatter", ("tp",), whole)


def _add_ends(
    total: Counter[Key], workload: Workload, layout: Layout, shape: Shape, place: tuple[int, int], forwards: int
) -> None:
    """The embedding's sum over tensor ranks, and what the head sums over ranks or gathers."""
    hidden, element, pooling = workload.architecture.hidden_size, workload.element, workload.pooling
    if place == (0, 0):
        whole = element * shape.tokens * hidden
        if layout.splits_tokens:
            _add(total, layout, "reduce_scatter", ("tp",), whole * forwards)
            if workload.lora is None:
                _add(total, layout, "all_gather", ("tp",), element * shape.split * hidden)
        else:
            _add(total, layout, "all_reduce", ("tp",), whole * forwards)
    if place != (layout.pp - 1, layout.chunks - 1):
        return
    if pooling.kind == "self_attention":
        if layout.splits_tokens:
            _add(total, layout, "all_gather", ("tp",), element * shape.split * hidden * forwards)
        inner = 2 * pooling.num_heads * (pooling.head_width or hidden)
        _add(total, layout, "all_gather", ("cp",), element * shape.tokens * inner * forwards)
        _add(total, layout, "reduce_scatter", ("cp",), element * shape.tokens * inner * layout.cp)
    rows = shape.texts * (workload.architecture.num_hidden_layers if pooling.kind == "multi_layer" else 1)
    if layout.splits_tokens and pooling.kind != "self_attention":
        _add(total, layout, "all_reduce", ("tp",), 4 * rows * hidden * forwards)
    _add(total, layout, "all_reduce", ("cp",), 4 * rows * hidden * forwards)


def _add_sends(
    total: Counter[Key], workload: Workload, layout: Layout, shape: Shape, place: tuple[int, int], forwards: int
) -> None:
    """Hidden states [t, H] to the next stage and their gradients to the one before, each behind its shape; with
    multi-layer pooling the summaries of the layers so far stand behind them."""
    if layout.pp == 1:
        return
    stage, chunk = place
    layers = layout.stages(workload.architecture.num_hidden_layers)
    # Chunk by chunk the pack walks through all stages.
    before = sum(sum(one[:chunk]) for one in layers) + sum(one[chunk] for one in layers[:stage])
    behind = before + layers[stage][chunk]

    def sent(so_far: int) -> float:
        rows = so_far * shape.texts if workload.pooling.kind == "multi_layer" else 0
        return workload.element * (shape.split + rows) * workload.architecture.hidden_size + SHAPE_BYTES

    if place != (layout.pp - 1, layout.chunks - 1):
        _add(total, layout, "send", ("pp",), sent(behind) * forwards)
    if place != (0, 0):
        _add(total, layout, "send", ("pp",), sent(before))
