"""Bidirectional attention over packed tokens, with rotary positions counted inside each sequence.

Letters: `T` tokens in a pack, `B` sequences, `A` query heads and `G` key/value groups of this tensor rank, `d` head
width, `L` padded length of a bucket, `b` sequences in a bucket.

On CUDA in half precision, torch's variable-length attention runs on the pack as it is. Elsewhere sequences of similar
length are attended together in padded buckets: one call a sequence costs three times as much.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from nvembed_mcore.kernels.varlen import varlen_attention

VARLEN_WIDTHS = range(8, 257, 8)
"""Head widths that FlashAttention computes; wider heads of a pooling head take the padded form."""
BUCKET_GRANULARITY = 16
"""Sequences whose lengths round up to the same multiple share a bucket."""


@dataclass(frozen=True)
class Bucket:
    """Sequences attended in one padded call.

    `rows` int64 [b, L]: token of the pack at each place (a pad repeats the sequence's first token, which its mask
    hides). `is_token` bool [b, L]. `has_pads` says whether any place is a pad.
    """

    rows: torch.Tensor
    is_token: torch.Tensor
    has_pads: bool


@dataclass
class Packing(PackedSeqParams):
    """What attention must know about a pack; Megatron hands it through its layers untouched.

    Attributes:
        position_ids: int64 [T], position inside its own sequence.
        segment_ids: int64 [T], number of its sequence.
        buckets: the padded form; `restore` int64 [T] finds token t in the concatenated real places of all buckets.
        rotary: cosine and sine, float32 [T, 1, d / 2] each.
    """

    position_ids: torch.Tensor | None = None
    segment_ids: torch.Tensor | None = None
    buckets: list[Bucket] = field(default_factory=list)
    restore: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None


def packing_of(lengths: np.ndarray, device: torch.device) -> Packing:
    """Describe a pack of sequences with these `lengths` (int64 [B], each at least 1)."""
    lengths = np.asarray(lengths, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    longest = int(lengths.max())
    bounds = torch.as_tensor(starts, dtype=torch.int32).to(device)
    buckets, restore = _buckets(lengths, starts[:-1], device)
    return Packing(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        position_ids=torch.as_tensor(np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)).to(device),
        segment_ids=torch.as_tensor(np.repeat(np.arange(len(lengths)), lengths)).to(device),
        buckets=buckets,
        restore=restore,
    )


def _buckets(lengths: np.ndarray, starts: np.ndarray, device: torch.device) -> tuple[list[Bucket], torch.Tensor]:
    classes = -(-lengths // BUCKET_GRANULARITY)
    buckets, order = [], []
    for length_class in np.unique(classes):
        members = np.flatnonzero(classes == length_class)
        width = int(lengths[members].max())
        places = np.arange(width)[None]
        is_token = places < lengths[members, None]
        rows = starts[members, None] + np.where(is_token, places, 0)
        order.append(rows[is_token])
        buckets.append(
            Bucket(torch.as_tensor(rows).to(device), torch.as_tensor(is_token).to(device), not is_token.all())
        )
    restore = np.empty(int(lengths.sum()), dtype=np.int64)
    restore[np.concatenate(order)] = np.arange(len(restore))
    return buckets, torch.as_tensor(restore).to(device)


class RotaryTable(torch.nn.Module):
    """Cosines and sines by position; computed in float32, not stored in checkpoints."""

    def __init__(self, width: int, theta: float) -> None:
        super().__init__()
        self.width, self.theta = width, theta

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, float32 [T, 1, d / 2], for int64 [T] positions: angle = position * theta ** (-2 i / d)."""
        exponent = torch.arange(0, self.width, 2, dtype=torch.float32, device=position_ids.device) / self.width
        angles = (position_ids[:, None].float() * (1.0 / self.theta**exponent)[None])[:, None]
        return angles.cos(), angles.sin()


def rotate(states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn `states` [T, heads, d] by their positions, in the half-split order of Hugging Face's Mistral."""
    cos, sin = (table.to(states.dtype) for table in rotary)
    first, second = states.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    *,
    causal: bool = False,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Softmax attention inside each sequence of a pack.

    Args:
        query: [T, A, d]. key, value: [T, G, d], with A a multiple of G (grouped queries).
        packing: the pack's description.
        causal: also hide later tokens of the same sequence.
        dropout: probability of dropping an attention weight.

    Returns:
        [T, A, d], same dtype as `query`.
    """
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and is_half and query.size(-1) in VARLEN_WIDTHS and dropout == 0.0:
        return varlen_attention(query, key, value, packing.cu_seqlens_q, packing.max_seqlen_q, causal=causal)
    groups = query.size(1) // key.size(1)
    parts = []
    for bucket in packing.buckets:
        q, k, v = (states[bucket.rows].transpose(1, 2) for states in (query, key, value))  # [b, heads, L, d]
        mask = _mask(bucket, causal)
        out = F.scaled_dot_product_attention(
            q,
            k.repeat_interleave(groups, dim=1),
            v.repeat_interleave(groups, dim=1),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal and mask is None,
        )
        parts.append(out.transpose(1, 2)[bucket.is_token])
    return torch.cat(parts)[packing.restore]


def _mask(bucket: Bucket, causal: bool) -> torch.Tensor | None:
    """Bool [b, 1, 1 or L, L], true where attention is allowed; None where nothing but causality hides anything."""
    if not bucket.has_pads:
        return None
    mask = bucket.is_token[:, None, None]
    if causal:
        length = mask.size(-1)
        mask = mask & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    return mask


class PackedCoreAttention(MegatronModule):
    """Core attention for Megatron's `SelfAttention`: rotates queries and keys, then attends inside each sequence."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        **_: object,
    ) -> None:
        super().__init__(config)
        assert attention_type == "self", attention_type
        self.causal = attn_mask_type == AttnMaskType.padding_causal

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        packed_seq_params: Packing | None = None,
    ) -> torch.Tensor:
        """query [T, A, d], key and value [T, G, d] -> [T, A * d]."""
        packing = packed_seq_params
        assert packing is not None and packing.rotary is not None
        dropout = self.config.attention_dropout if self.training else 0.0
        # Tensor ranks hold different heads, which draw different masks: Megatron's tracker tells the ranks apart.
        with get_cuda_rng_tracker().fork() if dropout else nullcontext():
            out = packed_attention(
                rotate(query, packing.rotary),
                rotate(key, packing.rotary),
                value,
                packing,
                causal=self.causal,
                dropout=dropout,
            )
        return out.flatten(1)
