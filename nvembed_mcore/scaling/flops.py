"""FLOPs of the model's products: the work that MFU counts.

Only the model's own work counts: no padding, and no forward pass done again.

Letters: `T` tokens, `H` hidden size, `R` latents, `A` heads of the pooling head, `w` their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from nvembed_mcore.config import LoraConfig, PoolingConfig
from nvembed_mcore.model.linears import adapted_linears


class Sizes(Protocol):
    """What is read of a backbone: `Architecture` and transformers' `MistralConfig` have it."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None


def pack_flops(
    sizes: Sizes,
    pooling: PoolingConfig,
    lengths: Sequence[int],
    *,
    causal: bool = False,
    lora: LoraConfig | None = None,
) -> float:
    """Model FLOPs of one forward and backward pass over a pack whose texts have `lengths` tokens.

    A matrix product `[m, k] x [k, n]` is `2mkn`; its backward pass is two of that size, so training costs three
    times the forward pass. With `s` a text's length, `T = sum(s)`, heads of width `d` (`a` for queries, `g` for
    keys and values), intermediate size `F` and `L` layers:

        linears      6 T L (2 a d H + 2 g d H + 3 F H)
        attention    12 L a d sum(s^2)            (scores and values, 2 s^2 a d each; `causal`: s (s + 1) / 2 for s^2)
        head         see `_head_flops`
        adapters     6 T L r (in + out) of each; the linears' weights then have no gradient, and 6 becomes 4

    Not counted, as usual: embedding look-up, norms, rotary, softmax, activations, biases, the loss, the optimizer,
    and any forward pass done again.

    Args:
        sizes: the backbone, as an `Architecture` or a `MistralConfig`.
        pooling: the head.
        lengths: tokens of each real text; dummies and padding do not belong here.
        causal: whether the backbone's mask is causal.
        lora: the adapters, if only they and the head train.
    """
    hidden, heads, groups = sizes.hidden_size, sizes.num_attention_heads, sizes.num_key_value_heads
    width = getattr(sizes, "head_dim", None) or hidden // heads
    tokens = sum(lengths)
    weights = 2 * heads * width * hidden + 2 * groups * width * hidden + 3 * sizes.intermediate_size * hidden
    linears = 6 * tokens * weights
    if lora:
        shapes = adapted_linears(hidden, sizes.intermediate_size, heads, groups, width)
        adapted = sum(
            one.inputs + rows for one in shapes for target, rows in one.rows.items() if target in lora.targets
        )
        linears = 4 * tokens * weights + 6 * tokens * lora.rank * adapted
    attention = 12 * heads * width * _attended_pairs(lengths, causal)
    return float(sizes.num_hidden_layers * (linears + attention) + _head_flops(sizes, pooling, lengths))


def _attended_pairs(lengths: Sequence[int], causal: bool) -> int:
    """(query, key) pairs that the mask allows."""
    return sum(s * (s + 1) // 2 if causal else s * s for s in lengths)


def _head_flops(sizes: Sizes, pooling: PoolingConfig, lengths: Sequence[int]) -> float:
    """FLOPs of the pooling head, forward and backward.

    `latent`, folded (docs/design.md): `6 T (2 H A R)` for the two matrices `[H, A R]` and `[A R, H]`, `6 T 12 H^2`
    for the GEGLU (`H -> 8H`, `4H -> H`), and once a pack `24 R H A w` for making the two matrices: four products of
    `2 R H A w` (keys, values, and their products with the query's and the output's projection).
    `self_attention`: `6 T (4 H A w)` for its projections, `12 A w sum(s^2)` (never causal) and the GEGLU.
    `multi_layer`, for each of `B` texts with `L` layers: `18 L H A w` for keys, values and the values' way through the
    output's projection, `6 R L (A w + A H)` for scores and weighted values, `6 R 12 H^2` for the GEGLU; and once a
    pack `6 R H A w` for the queries. The others have no weights.
    """
    if pooling.kind in ("mean", "last"):
        return 0.0
    tokens, hidden = sum(lengths), sizes.hidden_size
    inner = pooling.num_heads * (pooling.head_width or hidden)
    if pooling.kind == "multi_layer":
        layers, latents = sizes.num_hidden_layers, pooling.num_latents
        attention = 18 * layers * hidden * inner + 6 * latents * layers * (inner + pooling.num_heads * hidden)
        return len(lengths) * (attention + 6 * latents * 12 * hidden**2) + 6 * latents * hidden * inner
    mlp = 6 * tokens * 12 * hidden**2
    if pooling.kind == "self_attention":
        return 6 * tokens * 4 * hidden * inner + 12 * inner * _attended_pairs(lengths, causal=False) + mlp
    folded = 6 * tokens * 2 * hidden * pooling.num_heads * pooling.num_latents
    fold_once = 24 * pooling.num_latents * hidden * inner
    return folded + fold_once + mlp
