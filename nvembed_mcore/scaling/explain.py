"""Where each second of a prediction goes, and by which formula."""

from __future__ import annotations

from dataclasses import dataclass

from nvembed_mcore.scaling.hardware import Cluster
from nvembed_mcore.scaling.predict import Prediction
from nvembed_mcore.scaling.workload import Workload

FLOPS = """\
Model FLOPs of a step, forward and backward (scaling/flops.py), without what is computed twice:
  linears    6 T L (2 A d H + 2 G d H + 3 F H)          with adapters 4 for 6, and 6 T L r (in + out) of each
  attention  12 L A d sum(s^2)                           causal: s (s + 1) / 2 for s^2
  head       latent: 6 T (2 H Ah R + 12 H^2) + 24 R H Ah w a pack
T tokens, s tokens of a text, L layers, H hidden size, F feed-forward width, A heads, G key/value groups, d head width,
r rank, R latents, Ah heads of the head, w their width."""

FORMULAS = {
    "matmul": "linears: 2 m k n / (matmul_flops x matmul_share x m/(m+h) k/(k+h) n/(n+h)); forward, dX, trained dW",
    "quantise": "FP8 casts: (2 readings + copies) bytes a number / (memory_bandwidth x memory_share)",
    "attention": "4 T keys A d / TP FLOPs forward, 2.5 times backward, at rate x keys / (keys + half)",
    "elementwise": "norms, residuals, rotation, SwiGLU: bytes read and written / (memory_bandwidth x memory_share)",
    "adapters": "two skinny products a linear, and e (3 in + 4 out) bytes forward, e (7 in + 2 out) backward, a token",
    "embedding": "table rows read, gradients added",
    "head": "latent: folded products [T, H] x [H, A R] and back, GEGLU, and the fold once a pack",
    "tensor_parallel": "rings of e T H bytes, 4 a layer and direction (6 to train all weights); of e T r an adapter",
    "context_parallel": "keys and values gathered, gradients scattered: 2 e T cp G d / TP bytes, beside attention",
    "pipeline_parallel": "e T H / TP bytes to the next stage, once a chunk and direction",
    "bubble": "(sum of the other stages) / chunks: before the first pack and behind the last one",
    "host": "host_step, and what queueing layers' calls (host_layer, twice that backward) takes longer than they do",
    "again": "forward passes done again: way 'cached' all packs but one, with pipeline stages all",
    "imbalance": "the fullest rank waited for by the mean one: seconds of its packs x (1 - mean tokens / its tokens)",
    "gather": "embeddings gathered (4 N D bytes), their gradients summed (as many; not where ranks recompute them)",
    "loss": "InfoNCE: 3 products (4 with recomputation) of 2 (Q / W) M D FLOPs; more with symmetric, matryoshka_dims",
    "grad_reduce": "reduce-scatter of 4 bytes a trained parameter; beside the last backward pass the share `exposed`",
    "optimizer": "30 bytes a trained parameter / W, / (memory_bandwidth x memory_share)",
    "param_gather": "all-gather of e bytes a trained parameter; beside the first forward pass the share `exposed`",
}


@dataclass(frozen=True)
class Line:
    """A term of a step's time: its seconds, its share of the step, its formula."""

    term: str
    seconds: float
    share: float
    formula: str


def explain(prediction: Prediction) -> list[Line]:
    """Terms of a step, the largest first."""
    lines = [
        Line(term, value, value / prediction.total, FORMULAS[term])
        for term, value in prediction.seconds.items()
        if value
    ]
    return sorted(lines, key=lambda line: -line.seconds)


def figures_used(workload: Workload, cluster: Cluster) -> list[str]:
    """The device's rates and the fitted constants, one a line."""
    device = cluster.device
    types = {workload.dtype} | ({"fp8"} if workload.fp8 != "off" else set())
    lines = [f"matmul_flops {dtype} {device.matmul_flops[dtype] / 1e12:.4g} TFLOP/s" for dtype in sorted(types)]
    lines.append(f"memory_bandwidth {device.memory_bandwidth / 1e9:,.0f} GB/s")
    for link in (cluster.intra_node, cluster.inter_node):
        lines.append(f"{link.name} {link.bandwidth / 1e9:.1f} GB/s, {1e6 * link.latency:.1f} us a hop")
    for name, one in vars(cluster.constants).items():
        lines.append(f"{name} {one.value:.4g} ({one.low:.4g} to {one.high:.4g})")
    return lines
