"""Pooling heads: from token states to one vector a text (NV-Embed section 3.2; docs/design.md).

Letters: `T` tokens, `B` texts, `H` hidden size, `R` latents, `A` heads of the head, `w` their width, `L` layers.

A head transforms token states; the pooled mean (or the choice of the last token) is a weighted sum over each text's
tokens that is the same for all heads and is done by `weights_of` and `pool`, or `segment_sum` where the sum is not yet
whole. Only `MultiLayerPooling` comes after that sum: it reads one for each layer (`layer_summaries`).
"""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nvembed_mcore.config import PoolingConfig
from nvembed_mcore.data.packing import WHOLE, Split
from nvembed_mcore.kernels import has_triton, reference_head
from nvembed_mcore.model.attention import Packing, packed_attention

ROWS_AT_ONCE = 4096
"""Rows that the feed-forward of `MultiLayerPooling` computes together, R a text; some 16 H numbers a row."""


def weights_of(lengths: np.ndarray, pooled_from: np.ndarray, kind: str, split: Split = WHOLE) -> np.ndarray:
    """Weight of each token in its text's pooled vector: float32 [T].

    Args:
        lengths: int64 [B'], tokens of each sequence; sequences beyond `len(pooled_from)` are dummies of weight 0.
        pooled_from: int64 [B], first pooled position of each text.
        kind: `last` puts everything on the last token; the other kinds take the mean over pooled positions.
        split: which part of the pack's tokens is asked for; what fills their sequences has weight 0.
    """
    filled = split.filled(lengths)
    weights = np.zeros(int(filled.sum()), dtype=np.float32)
    start = 0
    for length, size, first in zip(lengths.tolist(), filled.tolist(), pooled_from.tolist(), strict=False):
        assert 0 <= first < length, "a text without a pooled position must never reach a pack"
        begin = length - 1 if kind == "last" else first
        weights[start + begin : start + length] = 1.0 / (length - begin)
        start += size
    return weights[split.places(filled)]


def kernels_for(states: torch.Tensor) -> ModuleType:
    """Who does what lies between the matrix products: Triton in half precision on CUDA, otherwise plain torch."""
    if why_no_kernels(states.device.type, states.dtype):
        return reference_head
    from nvembed_mcore.kernels import latent_head

    return latent_head


def why_no_kernels(device_type: str, dtype: torch.dtype) -> str:
    """Why torch computes between the head's products; empty where the Triton kernels do."""
    if device_type != "cuda":
        return "the kernels need a CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the kernels save what half precision costs in copies, and the weights are {dtype}"
    return "" if has_triton() else "Triton is not installed"


def segment_sum(
    states: torch.Tensor, weights: torch.Tensor, segment_ids: torch.Tensor, num_segments: int
) -> torch.Tensor:
    """Weighted sum of token states [T, H] over each sequence, in float32: [num_segments, H]."""
    return kernels_for(states).segment_sum(states, weights, segment_ids, num_segments)


def pool(states: torch.Tensor, weights: torch.Tensor, segment_ids: torch.Tensor, num_segments: int) -> torch.Tensor:
    """`segment_sum` at unit length, float32 [num_segments, H]; for states of all tokens."""
    return kernels_for(states).pool(states, weights, segment_ids, num_segments)


class Mlp(nn.Module):
    """GEGLU of width 4H, as the public NV-Embed has it: `x * gelu(g)` with `x, g` the halves of one projection."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp_in = nn.Linear(hidden, 8 * hidden)
        self.mlp_out = nn.Linear(4 * hidden, hidden)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.mlp_out(kernels_for(states).geglu(self.mlp_in(states)))


class AttendingHead(Mlp):
    """Projections and norms of the heads with attention; what attends to what is theirs."""

    reads_parts = True
    """They fold projections without calling them (parallel/param_gather.py)."""

    def __init__(self, hidden: int, config: PoolingConfig) -> None:
        super().__init__(hidden)
        self.num_heads, self.head_width = config.num_heads, config.head_width or hidden
        inner = self.num_heads * self.head_width
        self.norm_query = nn.LayerNorm(hidden)
        self.norm_context = nn.LayerNorm(hidden)
        self.to_q = nn.Linear(hidden, inner, bias=False)
        self.to_kv = nn.Linear(hidden, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, hidden, bias=False)
        self.norm_mlp = nn.LayerNorm(hidden)


class LatentAttention(AttendingHead):
    """NV-Embed's latent attention: token states are queries, trained latents are keys and values.

    The latents do not depend on the text, so `to_q`, `to_kv` and `to_out` fold into two matrices around a softmax
    over each head's R columns: exact, and several times fewer operations a token.
    """

    needs_whole_texts = False

    def __init__(self, hidden: int, config: PoolingConfig) -> None:
        super().__init__(hidden, config)
        self.latents = nn.Parameter(torch.empty(config.num_latents, hidden))

    def fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The cross attention as two float32 matrices, [H, A * R] and [A * R, H].

        logits of head a: `(Wq_a x) . (Wk_a c) / sqrt(w)` = `x . (Wq_a^T Wk_a c) / sqrt(w)`;
        output: `sum_a Wo_a (V_a^T p_a)` = `sum_a (V_a Wo_a^T)^T p_a`.
        """
        heads, width = self.num_heads, self.head_width
        product = kernels_for(self.latents).fold_product
        context = F.layer_norm(
            self.latents.float(),
            self.latents.shape[-1:],
            self.norm_context.weight.float(),
            self.norm_context.bias.float(),
            self.norm_context.eps,
        )
        keys, values = product(context, self.to_kv.weight.float().T).chunk(2, dim=-1)
        keys, values = (x.unflatten(1, (heads, width)).transpose(0, 1) for x in (keys, values))  # [A, R, w]
        to_q = self.to_q.weight.float().unflatten(0, (heads, width))  # [A, w, H]
        to_out = self.to_out.weight.float().unflatten(1, (heads, width)).permute(1, 2, 0)  # [A, w, H]
        into = product(keys / math.sqrt(width), to_q).flatten(0, 1).T  # [H, A * R]
        out_of = product(values, to_out).flatten(0, 1)  # [A * R, H]
        return into, out_of

    def forward(self, states: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Token states [T, H] -> token states [T, H]; each token on its own, so any part of a text will do."""
        into, out_of = (matrix.to(states.dtype) for matrix in self.fold())
        attention = kernels_for(states).group_softmax(self.norm_query(states) @ into, self.num_heads)
        states = states + attention @ out_of
        return states + super().forward(self.norm_mlp(states))


class SelfAttentionPooling(AttendingHead):
    """The paper's ablation (section 5.2.3): as the latent head, with the text's own tokens as keys and values."""

    needs_whole_texts = True

    def forward(self, states: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Token states [T, H] of whole texts -> token states [T, H]."""
        query = self.to_q(self.norm_query(states))
        key, value = self.to_kv(self.norm_context(states)).chunk(2, dim=-1)
        query, key, value = (x.unflatten(-1, (self.num_heads, self.head_width)) for x in (query, key, value))
        states = states + self.to_out(packed_attention(query, key, value, packing).flatten(1))
        return states + super().forward(self.norm_mlp(states))


class MultiLayerPooling(AttendingHead):
    """Multi-layer trainable pooling (arXiv 2409.02727): latents are queries, a text's layers are keys and values.

    There are more latents than layers, so values go through `to_out` before they are weighted: exact, and many times
    fewer operations.
    """

    needs_whole_texts = True

    def __init__(self, hidden: int, config: PoolingConfig, num_layers: int) -> None:
        super().__init__(hidden, config)
        self.latents = nn.Parameter(torch.empty(config.num_latents, hidden))
        self.layer_embedding = nn.Embedding(num_layers, hidden)

    def forward(self, summaries: torch.Tensor) -> torch.Tensor:
        """Summaries [L, B, H] -> vectors, float32 [B, H].

        A few texts at a time, and computed again in the backward pass: a graph keeps nothing here that grows with the
        number of texts but the summaries, and `memory` may go on counting by the token.
        """
        query = self.to_q(self.norm_query(self.latents)).unflatten(-1, (self.num_heads, self.head_width))
        few = max(1, ROWS_AT_ONCE // len(self.latents))
        parts = summaries.transpose(0, 1).split(few)
        # Not reentrant, as Megatron's own is: gradients would then reach a weight once for each part, and where they
        # are reduced while the backward pass runs they must do so as often in every step as in the first.
        pooled = [checkpoint(self._pool, query, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return torch.cat(pooled)

    def _pool(self, query: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Queries [R, A, w] and texts [b, L, H] -> float32 [b, H]."""
        heads = (self.num_heads, self.head_width)
        key, value = self.to_kv(self.norm_context(texts + self.layer_embedding.weight)).chunk(2, dim=-1)
        key, value = key.unflatten(-1, heads), value.unflatten(-1, heads)  # [b, L, A, w]
        value = torch.einsum("blaw,haw->balh", value, self.to_out.weight.unflatten(1, heads))
        logits = torch.einsum("raw,blaw->bral", query, key) / math.sqrt(self.head_width)
        attention = logits.float().softmax(dim=-1).to(value.dtype)
        states = self.latents + attention.flatten(2) @ value.flatten(1, 2)  # [b, R, A * L] @ [b, A * L, H]
        states = states + super().forward(self.norm_mlp(states))
        return states.float().mean(dim=1)


def build_head(hidden: int, config: PoolingConfig, num_layers: int) -> nn.Module | None:
    """The head's module, or None for `mean` and `last`, which have no parameters."""
    if config.kind == "latent":
        return LatentAttention(hidden, config)
    if config.kind == "self_attention":
        return SelfAttentionPooling(hidden, config)
    if config.kind == "multi_layer":
        return MultiLayerPooling(hidden, config, num_layers)
    return None
