"""Which layouts of a cluster a run fits into, which of them is the fastest, and what the others lack."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nvembed_mcore.config import RunConfig
from nvembed_mcore.config_data import ConfigError
from nvembed_mcore.scaling.balance import balance_of
from nvembed_mcore.scaling.hardware import Cluster
from nvembed_mcore.scaling.layers import Pack, embedding, head, layer
from nvembed_mcore.scaling.layout import Layout
from nvembed_mcore.scaling.memory import memory_of
from nvembed_mcore.scaling.parameters import VOCABULARY_MULTIPLE
from nvembed_mcore.scaling.pipeline import even_layers, with_host
from nvembed_mcore.scaling.predict import Prediction, no_rate, predict
from nvembed_mcore.scaling.seconds import host
from nvembed_mcore.scaling.workload import Workload

PIPELINES, BUDGETS = (1, 2, 4, 8), (4096, 8192, 16384, 32768)
TEXTS = 5000
"""Texts that are packed for a layout, at least one step's."""
LONG_TEXT = 4096
"""Tokens of a text from which on ranks may share it (context parallelism)."""


@dataclass(frozen=True)
class Rejected:
    """A layout that cannot be, or does not fit, and why."""

    layout: Layout
    reason: str


@dataclass(frozen=True)
class Plan:
    """Layouts of a number of GPUs.

    Attributes:
        fitting: predictions, the fastest first.
        rejected: the others.
        own: what the configuration itself would do, or why it cannot be.
    """

    gpus: int
    fitting: list[Prediction]
    rejected: list[Rejected]
    own: Prediction | str


def few_steps(workload: Workload) -> Workload:
    """The same with so many of the sampled steps as hold some thousand texts: each layout packs all of them."""
    steps = max(1, TEXTS // max(1, workload.lengths.shape[1]))
    kept = {name: getattr(workload, name)[:steps] for name in ("lengths", "query", "is_positive")}
    return replace(workload, **kept)


def plan(workload: Workload, config: RunConfig, gpus: int, cluster: Cluster, top: int = 10) -> Plan:
    """All layouts of `gpus` devices for a step, ranked.

    Args:
        config: its switches hold for all layouts.
        top: so many of the fastest get a range of uncertainty.
    """
    fitting, rejected = [], []
    for layout in candidates(workload, Layout.switches(config, gpus), cluster):
        try:
            if reason := why_not(workload, layout, cluster):
                raise ConfigError(reason)
            check_run(config, layout)
            found = predict(workload, layout, cluster, has_range=False)
        except ConfigError as error:
            rejected.append(Rejected(layout, str(error)))
            continue
        if found.fits:
            fitting.append(found)
        else:
            rejected.append(Rejected(layout, _too_large(found)))
    fitting.sort(key=lambda one: one.total)
    fitting[:top] = [predict(workload, one.layout, cluster) for one in fitting[:top]]
    return Plan(gpus, fitting, rejected, _own(workload, config, gpus, cluster))


def _own(workload: Workload, config: RunConfig, gpus: int, cluster: Cluster) -> Prediction | str:
    """The configuration's own layout, or why it cannot be."""
    try:
        layout = Layout.of(config, gpus)
        if reason := why_not(workload, layout, cluster):
            return reason
        if config.step.way == "auto":
            layout = auto_way(workload, layout, cluster)
        return predict(workload, layout, cluster)
    except ConfigError as error:
        return str(error)


def auto_way(workload: Workload, layout: Layout, cluster: Cluster) -> Layout:
    """The layout with the way that `step.way: auto` takes in it (docs/design.md, The step)."""
    if layout.pp > 1:
        return replace(layout, way="cached")
    if workload.views * balance_of(workload, layout).microbatches == 1:
        return replace(layout, way="single")
    kept = replace(layout, way="retain")
    needed = sum(memory_of(workload, kept, cluster).values())
    return kept if needed <= cluster.device.memory_bytes else replace(layout, way="cached")


def candidates(workload: Workload, switches: Layout, cluster: Cluster) -> Iterator[Layout]:
    """Layouts worth a prediction: powers of two of each size, ways of stepping, even and balanced stages.

    Reducing and gathering beside computing costs nothing where there is more than one data-parallel rank, so all have
    it.
    """
    contexts = [1] if workload.max_length < LONG_TEXT else [1, 2, 4, 8]
    sizes = [(tp, cp, pp) for tp in (1, 2, 4, 8) for cp in contexts for pp in PIPELINES]
    overlaps = dict(overlap_grad_reduce=True, overlap_param_gather=switches.distributed_optimizer)
    for tp, cp, pp in sizes:
        if switches.gpus % (tp * cp * pp):
            continue
        base = replace(switches, tp=tp, cp=cp, pp=pp, **overlaps)
        if why_not(workload, base, cluster):
            yield base  # to be rejected once, and not for each budget
            continue
        for packed in _budgets(workload, base):
            yield from _ways(workload, packed) if pp == 1 else _pipelines(workload, packed, cluster)


def _budgets(workload: Workload, base: Layout) -> Iterator[Layout]:
    """The layout with token budgets that give other numbers of packs."""
    known = set()
    for budget in sorted({*BUDGETS, base.tokens_per_microbatch}):
        packed = replace(base, tokens_per_microbatch=budget)
        packs = balance_of(workload, packed).microbatches
        if packs not in known:
            known.add(packs)
            yield packed


def _ways(workload: Workload, base: Layout) -> Iterator[Layout]:
    if workload.views * balance_of(workload, base).microbatches == 1:
        yield replace(base, way="single")
    else:
        yield replace(base, way="retain")
        yield base


def _pipelines(workload: Workload, base: Layout, cluster: Cluster) -> Iterator[Layout]:
    """Even stages, plain and interleaved by two, and stages cut so that embedding and head count as layers.

    In layers as long as the host needs for them, where that is longer.
    """
    share = workload.tokens_per_step / base.dp / base.cp
    pack = Pack(min(base.tokens_per_microbatch, share), workload.tokens_per_step / len(workload.texts(0)))
    one = layer(workload, base, cluster, pack)
    passes = with_host(one.forward, host(cluster, 1, False)), with_host(one.backward, host(cluster, 1, True))
    seconds = sum(terms.total() for terms in passes)
    at_ends = embedding(workload, base, cluster, pack.tokens), head(workload.pooling, workload, base, cluster, pack)
    first, last = ((end.forward.total() + end.backward.total()) / seconds for end in at_ends)
    layers = workload.architecture.num_hidden_layers
    for chunks in (1, 2):
        if layers % (base.pp * chunks) == 0:
            yield replace(base, chunks=chunks)
        in_first, in_last = even_layers(layers, base.pp, chunks, first, last)
        if in_first is not None:
            yield replace(base, chunks=chunks, layers_in_first_stage=in_first, layers_in_last_stage=in_last)


def why_not(workload: Workload, layout: Layout, cluster: Cluster) -> str | None:
    """What makes a layout impossible or senseless before anything is computed; None: nothing."""
    sizes, texts = workload.architecture, len(workload.texts(0))
    if reason := no_rate(workload, cluster):
        return reason
    if layout.tp > cluster.device.gpus_per_node:
        return f"tp {layout.tp} is more than the {cluster.device.gpus_per_node} devices of a node"
    for what, size in (
        ("num_attention_heads", sizes.num_attention_heads),
        ("num_key_value_heads", sizes.num_key_value_heads),
        ("intermediate_size", sizes.intermediate_size),
        ("the padding of the vocabulary", VOCABULARY_MULTIPLE),
    ):
        if size % layout.tp:
            return f"tp {layout.tp} does not divide {what} ({size})"
    if workload.fp8 != "off" and workload.backend == "transformer_engine":
        for what, size in _fp8_sizes(workload, layout.tp).items():
            if size % workload.alignment:
                return f"{what} on a tensor rank is {size}, FP8 needs multiples of {workload.alignment}"
    if layout.dp > texts:
        return f"{layout.dp} data-parallel ranks for {texts} texts a step: grow batch_size, or use fewer GPUs"
    if layout.way == "single" and (packs := balance_of(workload, layout).microbatches) > 1:
        return f"step.way 'single' needs one pack a rank, the batch needs {packs}"
    return None


def check_run(config: RunConfig, layout: Layout) -> None:
    """Whether a configuration may have this layout, by its own rules.

    Raises:
        ConfigError: what `train` would say of it.
    """
    parallel = replace(
        config.parallel,
        **{
            name: getattr(layout, name) for name in ("tp", "pp", "cp", "layers_in_first_stage", "layers_in_last_stage")
        },
        **{name: getattr(layout, name) for name in ("overlap_grad_reduce", "overlap_param_gather", "bucket_size")},
        chunks_per_stage=layout.chunks,
    )
    step = replace(config.step, way=layout.way, tokens_per_microbatch=layout.tokens_per_microbatch)
    replace(config, parallel=parallel, step=step)


def _fp8_sizes(workload: Workload, tp: int) -> dict[str, int]:
    """Sizes that FP8 kernels take in multiples only, as `model.mistral.check_fp8` has them."""
    sizes = workload.architecture
    heads, groups = sizes.num_attention_heads, sizes.num_key_value_heads
    return {
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size // tp,
        "the width of all heads": heads * sizes.head_dim // tp,
        "the width of queries, keys and values": (heads + 2 * groups) * sizes.head_dim // tp,
    }


def _too_large(found: Prediction) -> str:
    needed, largest = sum(found.memory.values()), max(found.memory, key=found.memory.__getitem__)
    return (
        f"needs {needed / 1e9:.1f} of {found.memory_limit / 1e9:.1f} GB a GPU, {found.memory[largest] / 1e9:.1f} of "
        f"it for {largest.replace('_', ' ')}"
    )
