"""What a step does once, however many packs it has: reduce gradients, update, gather weights.

Letters: `W` data-parallel size.
"""

from __future__ import annotations

from collections import Counter

from nvembed_mcore.scaling import seconds
from nvembed_mcore.scaling.hardware import Cluster
from nvembed_mcore.scaling.layers import Terms
from nvembed_mcore.scaling.layout import Layout


def data_parallel(
    cluster: Cluster,
    layout: Layout,
    *,
    parameters: float,
    gradient_bytes: float,
    weight_bytes: float,
    backward: float,
    forward: float,
    overlaps: tuple[bool, bool],
    averages: bool = False,
) -> Terms:
    """Seconds of it for a rank's trained parameters.

    With the distributed optimizer a reduce-scatter, an update of 1 / W of them and an all-gather; otherwise an
    all-reduce and an update of all. Data-parallel and context-parallel ranks are one group here.

    Args:
        parameters: trained numbers of the rank.
        gradient_bytes, weight_bytes: as they are sent.
        backward, forward: seconds beside which they may be sent: those of one pack.
        overlaps: whether they are, gradients and weights.
        averages: whether the weights are averaged.
    """
    ranks = layout.dp * layout.cp
    per_node = max(1, cluster.device.gpus_per_node // layout.tp)
    share = ranks if layout.distributed_optimizer else 1
    rings = 1 if layout.distributed_optimizer else 2
    reduce = rings * seconds.ring(cluster, gradient_bytes, ranks, per_node)
    gather = seconds.ring(cluster, weight_bytes, ranks, per_node) if layout.distributed_optimizer else 0.0
    return Counter(
        grad_reduce=seconds.visible(cluster, reduce, backward, overlaps[0]),
        optimizer=seconds.adam(cluster, parameters / share, averages),
        param_gather=seconds.visible(cluster, gather, forward, overlaps[1]),
    )
