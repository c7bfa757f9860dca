"""Seconds, memory and rates of a step in a layout, with their uncertainty.

Letters: `N` texts of a global batch, `Q` queries, `M` passages, `D` embedding size, `W` data-parallel size.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from nvembed_mcore.config_data import ConfigError
from nvembed_mcore.scaling import seconds
from nvembed_mcore.scaling.balance import Balance, balance_of, plan_of
from nvembed_mcore.scaling.exchange import recomputes
from nvembed_mcore.scaling.flops import pack_flops
from nvembed_mcore.scaling.hardware import Cluster, Constant
from nvembed_mcore.scaling.layers import Pack, Pass, Terms, embedding, head, layer, scaled
from nvembed_mcore.scaling.layout import Layout
from nvembed_mcore.scaling.memory import memory_of
from nvembed_mcore.scaling.parameters import chunk_parameters
from nvembed_mcore.scaling.pipeline import walk, with_host
from nvembed_mcore.scaling.update import data_parallel
from nvembed_mcore.scaling.workload import Workload


@dataclass(frozen=True)
class Prediction:
    """What a step of a layout is expected to take.

    Attributes:
        layout: of which.
        balance: of the batch over its ranks.
        memory: bytes of the fullest rank by kind.
        memory_limit: bytes that a device has.
        seconds: by term; their sum is `total`.
        total, low, high: seconds of a step, and the range of nine in ten by the spread of the fitted constants.
        tokens: real tokens of a step.
        flops: model FLOPs of a step.
        peak: FLOP/s of all devices, data sheet, bfloat16 (float32 where that is computed).
    """

    layout: Layout
    balance: Balance
    memory: dict[str, float]
    memory_limit: float
    seconds: dict[str, float]
    total: float
    low: float
    high: float
    tokens: float
    flops: float
    peak: float

    @property
    def fits(self) -> bool:
        """Whether the fullest rank has room."""
        return bool(sum(self.memory.values()) <= self.memory_limit)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens a second of one GPU."""
        return self.tokens / (self.total * self.layout.gpus)

    @property
    def mfu(self) -> float:
        """Model FLOPs a second as a share of the peak."""
        return self.flops / (self.total * self.peak)

    def gpu_hours(self, steps: int) -> float:
        """Of so many steps, without evaluation, saves and failures."""
        return self.total * steps * self.layout.gpus / 3600


def predict(workload: Workload, layout: Layout, cluster: Cluster, *, has_range: bool = True) -> Prediction:
    """What a step of `workload` takes in `layout` on `cluster`.

    Args:
        has_range: whether `low` and `high` are computed, which takes ten times as long; otherwise they are `total`.

    Raises:
        ConfigError: the layers cannot be split as the layout asks, or nothing is known of a data type's products.
    """
    if reason := no_rate(workload, cluster):
        raise ConfigError(reason)
    parts = Parts(workload, layout)
    terms = parts.terms(cluster)
    total = terms.total()
    below, above = _spread(parts, cluster, total) if has_range else (0.0, 0.0)
    dtype = "float32" if workload.dtype == "float32" else "bfloat16"
    return Prediction(
        layout=layout,
        balance=parts.balance,
        memory=memory_of(workload, layout, cluster),
        memory_limit=cluster.device.memory_bytes,
        seconds=dict(terms),
        total=total,
        low=total - below,
        high=total + above,
        tokens=workload.tokens_per_step,
        flops=model_flops(workload),
        peak=layout.gpus * cluster.device.peak_flops[dtype],
    )


def no_rate(workload: Workload, cluster: Cluster) -> str | None:
    """Why nothing is known of how fast the device computes in the run's precision; None: it is known."""
    device = cluster.device
    if workload.dtype not in device.matmul_flops:
        return f"precision.dtype {workload.dtype!r}: its products on {device.name} are not in the data file"
    if workload.fp8 == "off":
        return None
    if "fp8" not in device.matmul_flops or workload.backend != "transformer_engine":
        return f"precision.fp8 {workload.fp8!r} is emulated on {device.name}, and how long that takes is not modelled"
    if workload.fp8 == "mxfp8" and device.name != "b200":
        return f"precision.fp8 'mxfp8' needs Blackwell, not {device.name}"
    return None


@lru_cache(maxsize=8)
def model_flops(workload: Workload) -> float:
    """FLOPs of a step's model work (`flops.pack_flops`), in the mean over the sampled steps."""
    how = dict(causal=workload.causal, lora=workload.lora)
    steps = [workload.texts(step).tolist() for step in range(len(workload.lengths))]
    once = np.mean([pack_flops(workload.architecture, workload.pooling, one, **how) for one in steps])
    return workload.walks * workload.views * float(once)


def _spread(parts: Parts, cluster: Cluster, total: float) -> tuple[float, float]:
    """Seconds below and above `total`: each constant at its ends, independent of the others."""
    below = above = 0.0
    for name, one in vars(cluster.constants).items():
        assert isinstance(one, Constant)
        moved = [parts.terms(cluster.with_constants(**{name: end})).total() - total for end in (one.low, one.high)]
        below += min(0.0, *moved) ** 2
        above += max(0.0, *moved) ** 2
    return math.sqrt(below), math.sqrt(above)


@lru_cache(maxsize=512)
def trained_parameters(workload: Workload, layout: Layout) -> list[tuple[float, float]]:
    """Of each stage: numbers of a rank that have a gradient, and those of them that tensor ranks sum."""
    found = []
    for stage in range(layout.pp):
        chunks = range(layout.chunks)
        parameters = [one for chunk in chunks for one in chunk_parameters(workload, layout, stage, chunk)]
        trained = [one for one in parameters if one.is_trained]
        summed = sum(one.numel for one in trained if one.is_summed)
        found.append((float(sum(one.numel for one in trained)), float(summed)))
    return found


class Parts:
    """What a prediction needs that does not depend on the cluster, computed once."""

    def __init__(self, workload: Workload, layout: Layout) -> None:
        self.workload, self.layout = workload, layout
        self.balance = balance_of(workload, layout)
        self.stages = layout.stages(workload.architecture.num_hidden_layers)
        # Neither depends on how packs are cut, and many layouts of a plan differ in that alone.
        self.trained = trained_parameters(workload, replace(layout, way="cached", tokens_per_microbatch=1))

    @cached_property
    def recomputes(self) -> bool:
        """Whether a rank makes the gradients of its passages alone, from all queries (`step.gradient_exchange`)."""
        return recomputes(self.workload, plan_of(self.workload, self.layout, 0), 0)

    @cached_property
    def pack(self) -> Pack:
        """A pack of the fullest rank, on one context-parallel rank."""
        squares = float((self.workload.lengths.astype(np.float64) ** 2).sum())
        keys = squares / float(self.workload.lengths.sum())
        layout, packs = self.layout, self.balance.microbatches
        tokens = self.balance.tokens_per_rank * self.balance.imbalance / (1 - self.balance.padding)
        texts = float(np.count_nonzero(self.workload.lengths, axis=1).mean()) / layout.dp
        return Pack(tokens / packs / layout.cp, keys / 2 if self.workload.causal else keys, texts / packs)

    def terms(self, cluster: Cluster) -> Terms:
        """Seconds of a step by term. What the fullest rank takes beyond the mean one is the term `imbalance`."""
        stages = self._stages(cluster)
        walked = self._walk(stages)
        even = scaled(walked, 1 / self.balance.imbalance)
        even["imbalance"] += walked.total() - even.total()
        once = self._score(cluster) + self._update(cluster, stages)
        once["host"] += cluster.constants.host_step.value
        return scaled(even + once, cluster.constants.unexplained.value)

    def _stages(self, cluster: Cluster) -> list[Pass]:
        """Each stage's passes over a pack, with what the host and the hand-over to the next stage take."""
        work, layout, pack = self.workload, self.layout, self.pack
        one = layer(work, layout, cluster, pack, is_fused=work.backend == "transformer_engine")
        passes = [one.times(sum(chunks)) for chunks in self.stages]
        passes[0] += embedding(work, layout, cluster, pack.tokens)
        passes[-1] += head(work.pooling, work, layout, cluster, pack)
        sent = self._sent(cluster)
        return [
            Pass(
                with_host(both.forward, seconds.host(cluster, sum(chunks), False)) + sent,
                with_host(both.backward, seconds.host(cluster, sum(chunks), True)) + sent,
            )
            for chunks, both in zip(self.stages, passes, strict=True)
        ]

    def _sent(self, cluster: Cluster) -> Terms:
        """Handing a pack's states to the next stage, once a chunk; beside other packs where stages are interleaved."""
        layout = self.layout
        if layout.pp == 1:
            return Counter()
        hidden = self.workload.architecture.hidden_size
        moved = self.workload.element * self.pack.tokens * hidden / (layout.tp if layout.splits_tokens else 1)
        is_near = layout.gpus <= cluster.device.gpus_per_node
        link = cluster.intra_node if is_near else cluster.inter_node
        one = layout.chunks * seconds.send(link, moved)
        return Counter(pipeline_parallel=seconds.visible(cluster, one, math.inf, layout.chunks > 1))

    def _walk(self, stages: list[Pass]) -> Terms:
        """All packs of a rank, in each view. With one stage those that are not kept are embedded `again`; with more,
        all of them. With FGM twice."""
        packs = self.workload.views * self.balance.microbatches
        return scaled(self._walk_once(stages, packs), self.workload.walks)

    def _walk_once(self, stages: list[Pass], packs: float) -> Terms:
        layout = self.layout
        both = walk([one.forward + one.backward for one in stages], packs, layout.chunks)
        if layout.pp > 1:
            return both + Counter(again=walk([one.forward for one in stages], packs, layout.chunks).total())
        kept = 1 if layout.way == "cached" else packs
        return both + Counter(again=max(0.0, packs - kept) * stages[0].forward.total())

    def _score(self, cluster: Cluster) -> Terms:
        """Gathering embeddings, InfoNCE and its gradient, and how each text's gradient reaches its rank.

        `gather`: an all-gather of `4 N D` bytes (embeddings are float32) and, unless each rank makes its own columns'
        gradients alone, a reduce-scatter of as many. `loss`: three products of `2 (Q / W) M D` FLOPs, or four; twice
        with `symmetric`, and with `matryoshka_dims` once more in each of these widths. All of it for each view, and
        R-Drop's divergence takes as many products again; all of that in each walk.
        """
        work, layout = self.workload, self.layout
        size, texts = work.architecture.hidden_size, float(np.count_nonzero(work.lengths, axis=1).mean())
        ranks, per_node = layout.dp, max(1, cluster.device.gpus_per_node // (layout.tp * layout.cp))
        rings = 1 if self.recomputes else 2
        gather = rings * seconds.ring(cluster, 4 * texts * size * work.views, ranks, per_node)
        rows, columns = work.num_queries / layout.dp, texts - work.num_queries
        products = (4 if self.recomputes else 3) * (2 if work.loss.symmetric else 1) * work.views**2
        widths = [*work.loss.matryoshka_dims, size]
        loss = products * sum(seconds.matmul(cluster, work.dtype, rows, width, columns) for width in widths)
        return Counter(gather=gather * work.walks, loss=loss * work.walks)

    def _update(self, cluster: Cluster, stages: list[Pass]) -> Terms:
        """What a step does once for its trained parameters, on the stage that takes longest for it."""
        found = []
        for (trained, summed), both in zip(self.trained, stages, strict=True):
            terms = data_parallel(
                cluster,
                self.layout,
                parameters=trained,
                gradient_bytes=4 * trained,
                weight_bytes=self.workload.element * trained,
                backward=both.backward.total(),
                forward=both.forward.total(),
                overlaps=(self.layout.overlap_grad_reduce, self.layout.overlap_param_gather),
                averages=self.workload.averages,
            )
            terms["grad_reduce"] += 2 * seconds.ring(cluster, 4 * summed, self.layout.tp, self.layout.tp)
            found.append(terms)
        return max(found, key=Counter.total)
