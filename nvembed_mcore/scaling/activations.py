"""What autograd keeps of a pack between its forward and its backward pass, and what the passes need besides.

Letters: `T` tokens of a context-parallel rank's part of a pack, `t` those of a tensor rank (T / TP where ranks split
tokens), `P` places of the padded buckets, `H` hidden size, `F` feed-forward width, `A` query heads, `G` key/value
groups, `d` head width, `R` latents, `w` width of a head of the pooling head, `e` bytes of a number.

The terms were read from the modules: a tensor counts once, where it is first kept, in the form in which it is kept.
`tools/scaling/validate.py` compares their sum with what the allocator gave out. What TransformerEngine keeps was read
from its code only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nvembed_mcore.data.packing import Split
from nvembed_mcore.scaling.balance import filled_tokens, pack_multiple
from nvembed_mcore.scaling.parameters import linears, padded_vocabulary

if TYPE_CHECKING:
    from nvembed_mcore.scaling.layout import Layout
    from nvembed_mcore.scaling.workload import Workload

BUCKET, FP8_BUCKET = 16, 128
"""Lengths that round up to the same multiple share a bucket of padded attention (model.attention, te_attention)."""
ROWS_AT_ONCE = 4096
"""Rows of multi-layer pooling that are computed together (model.pooling)."""
BLOCK_WIDTHS = range(8, 257, 8)
"""Head widths that FlashAttention computes (model.attention)."""


@dataclass(frozen=True)
class Shape:
    """A pack as a rank sees it.

    Attributes:
        tokens: T, with the tail that fills it up.
        split: t.
        places: P, and `squares`: the sum of the squares of the buckets' widths over their sequences.
        texts: sequences.
    """

    tokens: float
    split: float
    places: float
    squares: float
    texts: int


def shape_of(workload: Workload, layout: Layout, lengths: np.ndarray) -> Shape:
    """A pack of texts of these `lengths` (int64); none where a rank only takes part."""
    filled = filled_tokens(lengths, pack_multiple(workload, layout), layout.cp)
    tail = filled - int(Split(size=layout.cp).filled(lengths).sum())
    whole = np.append(lengths, tail) if tail else lengths
    granularity = FP8_BUCKET if workload.fp8_attention else BUCKET
    classes = -(-whole // granularity)
    if workload.fp8_attention:
        widths = classes * granularity
    else:
        widest = np.zeros(int(classes.max()) + 1, dtype=np.int64)
        np.maximum.at(widest, classes, whole)
        widths = widest[classes]
    tokens = filled / layout.cp
    split = tokens / layout.tp if layout.splits_tokens else tokens
    squares = float((widths.astype(float) ** 2).sum())
    return Shape(tokens, split, float(widths.sum()) / layout.cp, squares / layout.cp, len(whole))


def layer(workload: Workload, layout: Layout, shape: Shape, *, is_first: bool = False) -> float:
    """Bytes that one layer keeps.

    Trained weights: of each of the two norms its input and the linear's input behind it (4 t H); of torch's norm on a
    CPU the normalised input too (2 t H); attention; the output projection's input (T A d); and of the feed-forward
    block the four that `_feed_forward` names. Frozen weights need no inputs, adapters need theirs.

    Args:
        is_first: the model's first layer, whose input needs no gradient where the embedding is frozen.
    """
    architecture, element = workload.architecture, workload.element
    norm = element * shape.split * architecture.hidden_size + 4 * shape.split
    trains = workload.lora is None
    norms = 2 - (is_first and not trains)
    kept = norm * norms * (2 if workload.device_type == "cpu" and trains else 1)
    kept += _attention(workload, layout, shape) + _feed_forward(workload, layout, shape)
    for linear in linears(architecture, layout.tp):
        tokens = shape.tokens if linear.is_row_parallel else shape.split
        if trains:
            kept += _linear_input(workload, linear.inputs * tokens, is_shared=linear.name.endswith("linear_proj"))
        else:
            kept += _adapter(workload, linear, tokens, shape.tokens, is_first)
    if workload.pooling.kind == "multi_layer":
        kept += 4 * shape.split * architecture.hidden_size  # its summary
    return kept


def _linear_input(workload: Workload, numbers: float, *, is_shared: bool) -> float:
    """A linear's input: in FP8 a byte (in TransformerEngine), and not again where attention keeps its output."""
    if workload.fp8 != "off" and workload.backend == "transformer_engine":
        return numbers
    return 0.0 if is_shared and not _is_padded(workload) else workload.element * numbers


def _is_padded(workload: Workload) -> bool:
    """Whether core attention lays the pack into padded buckets (model.attention.why_padded)."""
    is_flash = workload.device_type == "cuda" and workload.dtype == "bfloat16"
    is_flash &= workload.architecture.head_dim in BLOCK_WIDTHS
    return workload.fp8_attention or not is_flash


def _attention(workload: Workload, layout: Layout, shape: Shape) -> float:
    """Queries, keys, values and what attention puts out, [.., 2 A d + 2 G d]; the log-sum-exp of each query; masks.

    Torch's packed form gets keys and values repeated for each query head (kernels.varlen), and keeps them so.
    """
    sizes, element, tp = workload.architecture, workload.element, layout.tp
    query = sizes.num_attention_heads * sizes.head_dim / tp
    # Torch attends to gathered keys and values of all context-parallel ranks, TransformerEngine keeps a rank's own.
    is_ring = workload.backend == "transformer_engine" and workload.dtype == "bfloat16"
    group = sizes.num_key_value_heads * sizes.head_dim / tp * (1 if is_ring else layout.cp)
    heads = sizes.num_attention_heads / tp
    if not _is_padded(workload):
        keys = group if is_ring else query * layout.cp
        return shape.tokens * (element * (2 * query + 2 * keys) + 4 * heads)
    width = 1 if workload.fp8_attention else element
    kept = shape.places * (width * (2 * query + 2 * group) + 4 * heads)
    repeats = sizes.num_attention_heads / sizes.num_key_value_heads
    masks = 4 * repeats * shape.squares if workload.causal else 4 * shape.places
    return kept + (masks if workload.backend == "local" else 0.0)


def _feed_forward(workload: Workload, layout: Layout, shape: Shape) -> float:
    """Gate and up (2 F a token); Megatron's own activation also keeps silu(gate) and a copy of up (2 F more)."""
    ffn = workload.architecture.intermediate_size / layout.tp
    widths = 4 if workload.backend == "local" else 2
    return workload.element * shape.tokens * widths * ffn


def _adapter(workload: Workload, linear, tokens: float, whole: float, is_first: bool) -> float:
    """An adapter's input behind dropout, the mask of that (a byte each on CUDA), `a x`, and `b` in one matrix."""
    targets = [target for target in linear.rows if target in workload.lora.targets]
    if not targets:
        return 0.0
    element, columns = workload.element, workload.lora.rank * len(targets)
    kept = element * (tokens * linear.inputs + whole * columns)
    if len(linear.rows) > 1:
        kept += element * linear.outputs * columns
    has_mask = workload.lora.dropout > 0 and not (is_first and "q" in linear.rows)
    mask = 1 if workload.device_type == "cuda" else element
    return kept + mask * tokens * linear.inputs * has_mask


def outside_layers(workload: Workload, layout: Layout, shape: Shape, *, is_first: bool, is_last: bool) -> float:
    """Bytes that a chunk keeps outside its layers: angles, token ids, the last norm, the pooling head.

    Args:
        is_first, is_last: whether the chunk has the embedding and the head.
    """
    sizes, element = workload.architecture, workload.element
    if workload.backend == "local":
        kept = 2 * shape.tokens * sizes.head_dim * element
    else:
        kept = 4.0 * workload.max_length * sizes.head_dim
    kept += 8 * 2 * shape.tokens  # positions and sequences of the packing
    if is_first:
        kept += 8 * shape.tokens
    return kept + (last_norm(workload, shape) + head(workload, layout, shape) if is_last else 0.0)


def last_norm(workload: Workload, shape: Shape) -> float:
    """Bytes that the norm behind the last layer keeps, as one of `layer`."""
    copies = 2 if workload.device_type == "cpu" and workload.lora is None else 1
    return copies * workload.element * shape.split * workload.architecture.hidden_size + 4 * shape.split


def head(workload: Workload, layout: Layout, shape: Shape) -> float:
    """Bytes that the pooling head keeps of a pack.

    `mean`, `last`: the weighted states in float32. `latent` and `self_attention`: norms, softmax or attention, GEGLU
    (16 t H in Triton, 20 t H in torch, and the attention's own). `multi_layer`: what its checkpoints begin with.
    """
    hidden, pooling, element = workload.architecture.hidden_size, workload.pooling, workload.element
    is_triton = workload.device_type == "cuda" and workload.dtype == "bfloat16"
    pooled = 0.0 if is_triton else 4 * shape.split * hidden
    if pooling.kind in ("mean", "last"):
        return pooled
    inner = pooling.num_heads * (pooling.head_width or hidden)
    if pooling.kind == "multi_layer":
        rows = workload.architecture.num_hidden_layers * shape.texts
        return pooled + element * (rows * hidden + pooling.num_latents * (hidden + inner))
    geglu = (8 + 4) if is_triton else (8 + 4 + 4)
    if pooling.kind == "latent":
        columns = pooling.num_heads * pooling.num_latents
        states = element * shape.split * ((4 + geglu) * hidden + columns)
        return pooled + states + fold(workload)
    states = element * shape.tokens * ((5 + geglu) * hidden + inner)
    # On CUDA no kernel takes heads so wide: the weights are kept, before and behind the softmax.
    scores = 4 * pooling.num_heads * (shape.places if workload.device_type == "cpu" else 2 * shape.squares)
    pooled = 0.0 if is_triton else 4 * shape.tokens * hidden
    return pooled + states + element * inner * shape.places * (2 + 2 * layout.cp) + scores


def fold(workload: Workload) -> float:
    """What the fold of a pack keeps: the latents' keys and values, two matrices [H, A R]; all in float32, and of
    weights in half precision the float32 copies of the projections (4 A w H) and the matrices once more."""
    hidden, pooling = workload.architecture.hidden_size, workload.pooling
    inner = pooling.num_heads * (pooling.head_width or hidden)
    matrices = 2 * hidden * pooling.num_heads * pooling.num_latents
    kept = 4 * (pooling.num_latents * (hidden + 3 * inner))
    if workload.dtype == "float32":
        return kept + 4 * matrices
    return kept + 4 * 4 * inner * hidden + workload.element * matrices


def layer_work(workload: Workload, layout: Layout, shape: Shape) -> float:
    """Bytes that a layer's backward pass needs beside what is kept, at its fullest: behind the SwiGLU.

    The gradients of its two halves (2 F a token) and of the residual stream (t H); under sequence
    parallelism, what a linear gathers of its gradient or input (T H).
    """
    sizes, element = workload.architecture, workload.element
    gathered = sizes.hidden_size * shape.tokens if layout.splits_tokens else 0.0
    grads = shape.tokens * 2 * sizes.intermediate_size / layout.tp + shape.split * sizes.hidden_size
    return element * (grads + gathered)


def head_work(workload: Workload, layout: Layout, shape: Shape) -> float:
    """The same of the head: the gradients of the GEGLU's halves (8 H a token)."""
    kind, hidden = workload.pooling.kind, workload.architecture.hidden_size
    if kind in ("mean", "last"):
        return 2 * workload.element * shape.split * hidden
    if kind == "multi_layer":
        rows = min(ROWS_AT_ONCE, workload.pooling.num_latents * max(1, shape.texts))
        return workload.element * rows * 26 * hidden
    tokens = shape.split if kind == "latent" else shape.tokens
    return workload.element * tokens * 8 * hidden


def embedding_grad(workload: Workload, layout: Layout) -> float:
    """The gradient of the embedding table, made whole at the end of a backward pass."""
    if workload.lora is not None:
        return 0.0
    return float(workload.element * padded_vocabulary(workload.architecture) // layout.tp) * (
        workload.architecture.hidden_size
    )
