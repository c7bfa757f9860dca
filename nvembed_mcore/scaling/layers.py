"""What the parts of a model take for one pack on one rank, by term: layers, embedding and pooling heads.

Letters: `T` tokens of a pack on this rank, `H` hidden size, `F` feed-forward width, `A` query heads, `G` key/value
groups, `d` head width, `R` latents, `w` width of a head of the pooling head, `e` bytes of a number.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Protocol

from nvembed_mcore.config import LoraConfig, PoolingConfig
from nvembed_mcore.scaling import seconds
from nvembed_mcore.scaling.architecture import Architecture
from nvembed_mcore.scaling.hardware import Cluster
from nvembed_mcore.scaling.layout import Layout
from nvembed_mcore.scaling.parameters import Linear, linears

Terms = Counter[str]
"""Seconds by term. Terms of communication end in `_parallel`."""


class Work(Protocol):
    """What the layers need to know of what is trained; a `Workload` has it."""

    architecture: Architecture
    dtype: str
    fp8: str
    causal: bool
    lora: LoraConfig | None


@dataclass(frozen=True)
class Pack:
    """A pack as one context-parallel rank computes it, on all its tensor ranks together.

    Attributes:
        tokens: T.
        keys: how many keys a query sees in the mean, over tokens: `sum(s^2) / sum(s)`, half of it under a causal mask.
        texts: texts in it.
    """

    tokens: float
    keys: float
    texts: float = 1.0


@dataclass(frozen=True)
class Pass:
    """Seconds of a forward and of a backward pass, by term."""

    forward: Terms
    backward: Terms

    def __add__(self, other: Pass) -> Pass:
        return Pass(self.forward + other.forward, self.backward + other.backward)

    def times(self, number: float) -> Pass:
        """So many of them."""
        return Pass(scaled(self.forward, number), scaled(self.backward, number))


def scaled(terms: Terms, number: float) -> Terms:
    """Each term so many times."""
    return Counter({name: value * number for name, value in terms.items()})


def layer(
    work: Work, layout: Layout, cluster: Cluster, pack: Pack, *, overlaps_tp: bool = False, is_fused: bool = True
) -> Pass:
    """One transformer layer.

    Args:
        overlaps_tp: whether tensor-parallel communication runs beside the products (ours does not).
        is_fused: whether core attention keeps its scores on the chip.
    """
    forward, backward = Counter(), Counter()
    for linear in linears(work.architecture, layout.tp):
        _add_linear(work, cluster, pack.tokens, linear, forward, backward)
        if work.lora:
            _add_adapter(work, layout, cluster, pack.tokens, linear, forward, backward)
    _add_attention(work, layout, cluster, pack, is_fused, forward, backward)
    _add_elementwise(work, layout, cluster, pack.tokens, forward, backward)
    _add_tensor_parallel(work, layout, cluster, pack.tokens, overlaps_tp, forward, backward)
    _add_context_parallel(work, layout, cluster, pack.tokens, forward, backward)
    return Pass(forward, backward)


def _add_linear(work: Work, cluster: Cluster, tokens: float, linear: Linear, forward: Terms, backward: Terms) -> None:
    """Forward `[T, in] x [in, out]`; backward the inputs' gradient and, unless the weight is frozen, its own.

    FP8 quantises what goes in and the gradient that comes back; the weight is quantised once a step, which is not
    counted.
    """
    dtype = work.dtype if work.fp8 == "off" else "fp8"
    forward["matmul"] += seconds.matmul(cluster, dtype, tokens, linear.inputs, linear.outputs)
    backward["matmul"] += seconds.matmul(cluster, dtype, tokens, linear.outputs, linear.inputs)
    if work.lora is None:
        backward["matmul"] += seconds.matmul(cluster, dtype, linear.inputs, tokens, linear.outputs)
    copies = 1 if work.lora else 2
    forward["quantise"] += seconds.quantise(cluster, work.fp8, tokens * linear.inputs, copies)
    backward["quantise"] += seconds.quantise(cluster, work.fp8, tokens * linear.outputs, copies)


def _add_adapter(
    work: Work, layout: Layout, cluster: Cluster, tokens: float, linear: Linear, forward: Terms, backward: Terms
) -> None:
    """Two skinny products and what they read and write: `e (3 in + 4 out)` a token forward, `e (7 in + 2 out)` back.

    Forward: dropout reads and writes the input, the sum reads and writes the output. Without dropout 2 `in` less each
    way. Under sequence parallelism the product that tensor ranks do not split has a rank's own tokens only, and what
    lies between the two, `[T, r]`, is gathered or scattered; otherwise it is summed in one of the directions.
    """
    targets = [target for target in linear.rows if target in work.lora.targets]
    if not targets:
        return
    rank, rows = work.lora.rank * len(targets), sum(linear.rows[target] for target in targets)
    dropped = 2 * linear.inputs * (work.lora.dropout > 0)
    part = tokens / layout.tp if layout.splits_tokens else tokens
    before, behind = (tokens, part) if linear.is_row_parallel else (part, tokens)
    element = seconds.ELEMENT[work.dtype]
    products = [(before, linear.inputs, rank), (behind, rank, rows)]
    transposed = [
        (before, rank, linear.inputs),
        (linear.inputs, before, rank),
        (behind, rows, rank),
        (rank, behind, rows),
    ]
    forward["adapters"] += sum(seconds.matmul(cluster, work.dtype, *sizes) for sizes in products)
    forward["adapters"] += seconds.memory(cluster, element * (before * dropped + behind * 3 * rows))
    backward["adapters"] += sum(seconds.matmul(cluster, work.dtype, *sizes) for sizes in transposed)
    backward["adapters"] += seconds.memory(cluster, element * before * (dropped + 3 * linear.inputs))
    if layout.tp == 1:
        return
    one = seconds.ring(cluster, element * tokens * rank, layout.tp, cluster.device.gpus_per_node)
    rings = (1, 1) if layout.splits_tokens else (2, 0) if linear.is_row_parallel else (0, 2)
    for terms, number in zip((forward, backward), rings, strict=True):
        terms["tensor_parallel"] += number * one


def _add_attention(
    work: Work, layout: Layout, cluster: Cluster, pack: Pack, is_fused: bool, forward: Terms, backward: Terms
) -> None:
    """Scores and values: `4 T keys A d / TP` FLOPs forward; backward 2.5 times that fused, with scores kept twice."""
    architecture = work.architecture
    heads = architecture.num_attention_heads / layout.tp
    flops = 4 * pack.tokens * pack.keys * heads * architecture.head_dim
    if is_fused:
        forward["attention"] += seconds.attention(cluster.device, flops, pack.keys, False)
        backward["attention"] += seconds.attention(cluster.device, 2.5 * flops, pack.keys, True)
        return
    # Without a fused kernel a causal mask hides scores that were computed.
    hidden = 2 if work.causal else 1
    scores = pack.tokens * pack.keys * heads * hidden
    forward["attention"] += seconds.attention_in_memory(cluster, work.dtype, hidden * flops, scores)
    backward["attention"] += seconds.attention_in_memory(cluster, work.dtype, 2 * hidden * flops, scores)


def _add_elementwise(
    work: Work, layout: Layout, cluster: Cluster, tokens: float, forward: Terms, backward: Terms
) -> None:
    """Norms, residuals, rotation and the activation, by the numbers that each reads and writes, a token.

    forward: norms 2 x 2 H, residuals 2 x 3 H, rotation 2 (A + G) d, SwiGLU 3 F (without gate 2 F); backward: norms
    2 x 3 H, residuals 2 x 3 H, rotation the same, SwiGLU 5 F (3 F). Tensor ranks split rotation and activation, and
    under sequence parallelism norms and residuals.
    """
    sizes, gated = work.architecture, work.architecture.gated_mlp
    split = layout.tp if layout.splits_tokens else 1
    rotated = 2 * (sizes.num_attention_heads + sizes.num_key_value_heads) * sizes.head_dim / layout.tp
    ffn, hidden = sizes.intermediate_size / layout.tp, sizes.hidden_size / split
    element = seconds.ELEMENT[work.dtype] * tokens
    forward["elementwise"] += seconds.memory(cluster, element * (10 * hidden + rotated + (3 if gated else 2) * ffn))
    backward["elementwise"] += seconds.memory(cluster, element * (12 * hidden + rotated + (5 if gated else 3) * ffn))


def _add_tensor_parallel(
    work: Work, layout: Layout, cluster: Cluster, tokens: float, overlaps: bool, forward: Terms, backward: Terms
) -> None:
    """Four rings of `e T H` bytes in each direction: two all-gathers and two reduce-scatters, or two all-reduces.

    Under sequence parallelism the inputs of trained column-parallel weights are gathered again in the backward pass.
    """
    if layout.tp == 1:
        return
    moved = seconds.ELEMENT[work.dtype] * tokens * work.architecture.hidden_size
    one = seconds.ring(cluster, moved, layout.tp, min(layout.tp, cluster.device.gpus_per_node))
    again = 2 if layout.splits_tokens and work.lora is None else 0
    for terms, rings in ((forward, 4), (backward, 4 + again)):
        terms["tensor_parallel"] += seconds.visible(cluster, rings * one, terms["matmul"], overlaps)


def _add_context_parallel(
    work: Work, layout: Layout, cluster: Cluster, tokens: float, forward: Terms, backward: Terms
) -> None:
    """Keys and values of all ranks, `2 e T cp G d / TP` bytes: gathered forward; backward again, and their gradients.

    On GPUs TransformerEngine passes them on while it attends to those that it has.
    """
    if layout.cp == 1:
        return
    sizes = work.architecture
    width = 2 * sizes.num_key_value_heads * sizes.head_dim / layout.tp
    moved = seconds.ELEMENT[work.dtype] * tokens * layout.cp * width
    one = seconds.ring(cluster, moved, layout.cp, max(1, cluster.device.gpus_per_node // layout.tp))
    overlaps = work.dtype != "float32"
    for terms, rings in ((forward, 1), (backward, 2)):
        terms["context_parallel"] += seconds.visible(cluster, rings * one, terms["attention"], overlaps)


def embedding(work: Work, layout: Layout, cluster: Cluster, tokens: float) -> Pass:
    """Looking tokens up (read and write `H`), their sum over tensor ranks, and backward the sum into the table."""
    moved = seconds.ELEMENT[work.dtype] * tokens * work.architecture.hidden_size
    rings = 1 if layout.splits_tokens else 2
    one = rings * seconds.ring(cluster, moved, layout.tp, cluster.device.gpus_per_node)
    forward = Counter(embedding=seconds.memory(cluster, 2 * moved))
    backward = Counter(embedding=seconds.memory(cluster, 3 * moved) if work.lora is None else 0.0)
    if layout.tp > 1:
        forward["tensor_parallel"] += one
        backward["tensor_parallel"] += one if work.lora is None and layout.splits_tokens else 0.0
    return Pass(forward, backward)


def head(pooling: PoolingConfig, work: Work, layout: Layout, cluster: Cluster, pack: Pack) -> Pass:
    """The pooling head. Of tensor ranks, only the latent head's share their tokens, under sequence parallelism."""
    hidden = work.architecture.hidden_size
    inner = pooling.num_heads * (pooling.head_width or hidden)
    moved = seconds.ELEMENT[work.dtype] * pack.tokens * hidden
    reading = Counter(head=seconds.memory(cluster, moved))
    if pooling.kind in ("mean", "last"):
        return Pass(reading, Counter(head=seconds.memory(cluster, 2 * moved)))
    if pooling.kind == "latent":
        tokens = pack.tokens / (layout.tp if layout.splits_tokens else 1)
        forward = _latent(pooling, work, cluster, tokens, inner)
    elif pooling.kind == "self_attention":
        products = [(pack.tokens, hidden, 3 * inner), (pack.tokens, inner, hidden), *_mlp(pack.tokens, hidden)]
        forward = sum(seconds.matmul(cluster, work.dtype, *sizes) for sizes in products)
        scores = pack.tokens * pack.keys * pooling.num_heads
        forward += seconds.attention_in_memory(cluster, work.dtype, 4 * pack.tokens * pack.keys * inner, scores)
    else:
        # It is computed once more in the backward pass.
        forward = _multi_layer(pooling, work, cluster, pack.texts, inner)
        return Pass(Counter(head=forward), Counter(head=3 * forward))
    return Pass(Counter(head=forward), Counter(head=2 * forward))


def _mlp(rows: float, hidden: int) -> list[tuple[float, float, float]]:
    """The products of the GEGLU block: `H -> 8 H`, `4 H -> H`."""
    return [(rows, hidden, 8 * hidden), (rows, 4 * hidden, hidden)]


def _latent(pooling: PoolingConfig, work: Work, cluster: Cluster, tokens: float, inner: float) -> float:
    """Seconds of the folded latent head's forward pass.

    A token: `[T, H] x [H, A R]`, `[T, A R] x [A R, H]` and the GEGLU; norms, residuals, softmax and GEGLU read and
    write `22 H + 2 A R`. Once a pack the fold: keys and values `[R, H] x [H, 2 A w]` and two products
    `[A R, w] x [w, H]`, in float32 (TF32 on a GPU).
    """
    hidden, columns = work.architecture.hidden_size, pooling.num_heads * pooling.num_latents
    products = [(tokens, hidden, columns), (tokens, columns, hidden), *_mlp(tokens, hidden)]
    total = sum(seconds.matmul(cluster, work.dtype, *sizes) for sizes in products)
    total += seconds.memory(cluster, seconds.ELEMENT[work.dtype] * tokens * (22 * hidden + 2 * columns))
    folded = "float32" if work.dtype == "float32" else "tf32"
    total += seconds.matmul(cluster, folded, pooling.num_latents, hidden, 2 * inner)
    return total + 2 * seconds.matmul(cluster, folded, columns, inner / pooling.num_heads, hidden)


def _multi_layer(pooling: PoolingConfig, work: Work, cluster: Cluster, texts: float, inner: float) -> float:
    """Seconds of the forward pass of multi-layer pooling: `L` rows a text for keys and values, `R` for the rest."""
    sizes = work.architecture
    hidden, layers, latents = sizes.hidden_size, sizes.num_hidden_layers, pooling.num_latents
    columns = pooling.num_heads * layers
    products = [
        (texts * layers, hidden, 2 * inner),
        (texts * columns, inner / pooling.num_heads, hidden),
        (texts * latents, inner / pooling.num_heads, columns),
        (texts * latents, columns, hidden),
        *_mlp(texts * latents, hidden),
    ]
    return sum(seconds.matmul(cluster, work.dtype, *one) for one in products)
