"""Terms of time: how long one operation takes on a device, or one message on a link.

Each is a formula of a few lines with at most two fitted constants (`hardware.Constants`). `layers.py` says which
operations a layer or a head consists of.
"""

from __future__ import annotations

from nvembed_mcore.scaling.hardware import Cluster, Device, Link

ELEMENT = {"bfloat16": 2, "float32": 4, "tf32": 4, "fp8": 1}
"""Bytes of a number."""
READINGS = {"delayed": 1, "tensorwise": 2, "blockwise": 2, "mxfp8": 1}
"""How often a bfloat16 number is read to become FP8: twice where the largest is looked for before."""
ADAM_BYTES = 30.0
"""Of one parameter in an optimizer step: gradient, master weight and two moments read in float32, all but the gradient
written, the bfloat16 weight written."""
AVERAGE_BYTES = 12.0
"""Of one, where the weights are averaged: master weight and average read, the average written."""


def matmul(cluster: Cluster, dtype: str, rows: float, inputs: float, outputs: float) -> float:
    """Seconds of a product [rows, inputs] x [inputs, outputs].

    `2 m k n / (R e)` with the rate `R` = `matmul_flops` x `matmul_share` and the efficiency
    `e = m / (m + h) x k / (k + h) x n / (n + h)`: edges of tiles and waves cost as much as `h` more rows or columns.
    `h` is `matmul_half x matmul_flops / reference_flops`: in the time of an edge a fast type does more. Not faster
    than its operands cross the memory.
    """
    device, constants = cluster.device, cluster.constants
    fastest = device.matmul_flops[dtype]
    half = constants.matmul_half.value * fastest / device.reference_flops
    efficiency = 1.0
    for size in (rows, inputs, outputs):
        efficiency *= size / (size + half) if size else 1.0
    moved = ELEMENT[dtype] * (rows * inputs + inputs * outputs) + _result_bytes(dtype) * rows * outputs
    computing = 2 * rows * inputs * outputs / (fastest * constants.matmul_share.value * efficiency)
    return max(computing, moved / device.memory_bandwidth)


def _result_bytes(dtype: str) -> int:
    return 2 if dtype == "fp8" else ELEMENT[dtype]


def memory(cluster: Cluster, moved: float) -> float:
    """Seconds in which `moved` bytes are read and written by kernels that do little else: norms, activations."""
    return moved / (cluster.device.memory_bandwidth * cluster.constants.memory_share.value)


def quantise(cluster: Cluster, recipe: str, numbers: float, copies: int) -> float:
    """Seconds until `numbers` bfloat16 numbers are FP8, in rows and for a weight's gradient also in columns.

    2 bytes a reading and 1 byte for each of the `copies`; nothing without a recipe.
    """
    return memory(cluster, (2 * READINGS[recipe] + copies) * numbers) if recipe != "off" else 0.0


def attention(device: Device, flops: float, keys: float, is_backward: bool) -> float:
    """Seconds of fused attention: `flops / (R s / (s + h))` with `s` the mean number of keys that a query sees.

    The backward pass counts 2.5 times the forward's FLOPs, since it computes the scores again.
    """
    rate, half = device.attention_flops[is_backward], device.attention_half[is_backward]
    return flops / (rate * keys / (keys + half)) if flops else 0.0


def attention_in_memory(cluster: Cluster, dtype: str, flops: float, scores: float) -> float:
    """Seconds of attention that writes its scores: two products, and five passes over `scores` numbers.

    Scaling and mask, softmax and dropout each read and write; torch's and Megatron's unfused forms are like that.
    """
    rate = cluster.device.matmul_flops[dtype] * cluster.constants.matmul_share.value
    return flops / rate + memory(cluster, 5 * ELEMENT[dtype] * scores)


def host(cluster: Cluster, layers: float, is_backward: bool) -> float:
    """Seconds until the host has queued so many layers; a backward pass has twice the kernels of a forward pass."""
    return layers * cluster.constants.host_layer.value * (2 if is_backward else 1)


def adam(cluster: Cluster, parameters: float, averages: bool = False) -> float:
    """Seconds of an optimizer step over `parameters` numbers of one rank, and of averaging them."""
    return memory(cluster, (ADAM_BYTES + AVERAGE_BYTES * averages) * parameters)


def ring(cluster: Cluster, moved: float, ranks: int, per_node: int) -> float:
    """Seconds of an all-gather or a reduce-scatter of `moved` bytes in all over a group; an all-reduce is two.

    `alpha (n - 1) + moved (n - 1) / n / B`: a ring of `n` ranks, of which `per_node` stand in each node. Between nodes
    each of these has a port of its own, so `B` is `per_node` ports, at most the link inside a node; hops between
    nodes have the network's latency, the others that of the link. Small messages are slow by their latency alone.
    """
    if ranks == 1 or not moved:
        return 0.0
    per_node = min(per_node, ranks)
    nodes = -(-ranks // per_node)
    inside, between = cluster.intra_node, cluster.inter_node
    bandwidth = inside.bandwidth if nodes == 1 else min(inside.bandwidth, per_node * between.bandwidth)
    if per_node == 1:
        bandwidth = between.bandwidth
    far = nodes - 1 if nodes > 1 else 0
    latency = far * between.latency + (ranks - 1 - far) * inside.latency
    return latency + moved * (ranks - 1) / ranks / bandwidth


def send(link: Link, moved: float) -> float:
    """Seconds of a message from one device to another."""
    return link.latency + moved / link.bandwidth


def visible(cluster: Cluster, communication: float, computing: float, is_overlapped: bool) -> float:
    """Seconds by which communication lengthens a step while something else is computed.

    All of it where nothing overlaps. Otherwise the share `exposed`, and what the computing is too short to hide.
    """
    if not is_overlapped:
        return communication
    share = cluster.constants.exposed.value
    return max(share * communication, communication - computing)
