"""Bidirectional attention over packed tokens, with rotary positions counted inside each sequence.

Letters: `T` tokens in a pack, `B` sequences, `A` query heads and `G` key/value groups of this tensor rank, `d` head
width, `P` places of all padded buckets, `L` padded length of a bucket, `b` sequences in a bucket.

On CUDA in half precision, torch's variable-length attention runs on the pack as it is. Elsewhere sequences of similar
length are attended together in padded buckets: one call a sequence costs three times as much.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from nvembed_mcore.kernels.varlen import varlen_attention

if TYPE_CHECKING:
    from nvembed_mcore.model.layer_summaries import LayerSummaries

VARLEN_WIDTHS = range(8, 257, 8)
"""Head widths that FlashAttention computes; wider heads of a pooling head take the padded form."""
BUCKET_GRANULARITY = 16
"""Sequences whose lengths round up to the same multiple share a bucket; from 4 to 64 a step takes the same time."""


@dataclass(frozen=True)
class Bucket:
    """Sequences attended in one padded call.

    `is_token` bool [b, L], false at pads; None where there are none.
    """

    num_sequences: int
    length: int
    is_token: torch.Tensor | None


@dataclass(frozen=True)
class Padding:
    """The padded form of a pack: its buckets one behind the other.

    Attributes:
        buckets: in order.
        rows: int64 [P], token of the pack at each place (a pad repeats the sequence's first token; its mask hides it).
        places: int64 [T], place of each token.
        pads: int64, places that are pads.
    """

    buckets: list[Bucket]
    rows: torch.Tensor
    places: torch.Tensor
    pads: torch.Tensor


@dataclass
class Packing(PackedSeqParams):
    """What attention must know about a pack; Megatron hands it through its layers untouched.

    Attributes:
        position_ids: int64 [T], position inside its own sequence.
        segment_ids: int64 [T], number of its sequence.
        padding: the padded form.
        rotary: see `RotaryTable`.
        summaries: of the states after each layer, where the pooling head reads them.
    """

    position_ids: torch.Tensor | None = None
    segment_ids: torch.Tensor | None = None
    padding: Padding | None = None
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None
    summaries: LayerSummaries | None = None


def packing_of(lengths: np.ndarray, device: torch.device) -> Packing:
    """Describe a pack of sequences with these `lengths` (int64 [B], each at least 1)."""
    lengths = np.asarray(lengths, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    longest = int(lengths.max())
    bounds = torch.as_tensor(starts, dtype=torch.int32).to(device)
    return Packing(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        position_ids=torch.as_tensor(np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)).to(device),
        segment_ids=torch.as_tensor(np.repeat(np.arange(len(lengths)), lengths)).to(device),
        padding=_padding(lengths, starts[:-1], device),
    )


def _padding(lengths: np.ndarray, starts: np.ndarray, device: torch.device) -> Padding:
    classes = -(-lengths // BUCKET_GRANULARITY)
    buckets, rows, is_token = [], [], []
    for length_class in np.unique(classes):
        members = np.flatnonzero(classes == length_class)
        width = int(lengths[members].max())
        positions = np.arange(width)[None]
        inside = positions < lengths[members, None]
        rows.append((starts[members, None] + np.where(inside, positions, 0)).ravel())
        is_token.append(inside.ravel())
        buckets.append(Bucket(len(members), width, None if inside.all() else torch.as_tensor(inside).to(device)))
    rows, is_token = np.concatenate(rows), np.concatenate(is_token)
    places = np.empty(int(lengths.sum()), dtype=np.int64)
    places[rows[is_token]] = np.flatnonzero(is_token)
    arrays = (rows, places, np.flatnonzero(~is_token))
    return Padding(buckets, *(torch.as_tensor(array).to(device) for array in arrays))


class _Rearranged(torch.autograd.Function):
    """Rows of a tensor by number, [n, ...] -> [len(rows), ...]; the gradient, too, is taken by number.

    Row `i` of the gradient is that of `back[i]`, and zero where `i` is in `zero`. Autograd's own would add row by row,
    because it does not know that every row is wanted once.
    """

    @staticmethod
    def forward(ctx, states: torch.Tensor, rows: torch.Tensor, back: torch.Tensor, zero: torch.Tensor | None):
        ctx.save_for_backward(back, zero)
        return states.index_select(0, rows)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        back, zero = ctx.saved_tensors
        grad = grad.index_select(0, back)
        return grad if zero is None else grad.index_fill_(0, zero, 0.0), None, None, None


def _pad(states: torch.Tensor, padding: Padding) -> list[torch.Tensor]:
    """[T, heads, d] -> for each bucket [b, L, heads, d].

    Nothing that is asked for depends on a pad, so the gradient of its copy is zero and need not be added.
    """
    width = states.shape[1:]
    padded = _Rearranged.apply(states.flatten(1), padding.rows, padding.places, None)
    parts = padded.split([bucket.num_sequences * bucket.length for bucket in padding.buckets])
    return [
        part.view(bucket.num_sequences, bucket.length, *width)
        for part, bucket in zip(parts, padding.buckets, strict=True)
    ]


def _unpad(parts: list[torch.Tensor], padding: Padding) -> torch.Tensor:
    """For each bucket [b, L, heads, d] -> [T, heads, d]."""
    padded = torch.cat([part.flatten(0, 1) for part in parts])
    return _Rearranged.apply(padded, padding.places, padding.rows, padding.pads)


class RotaryTable(torch.nn.Module):
    """Cosines and sines by position; computed in float32, not stored in checkpoints."""

    def __init__(self, width: int, theta: float) -> None:
        super().__init__()
        self.width, self.theta = width, theta

    @torch.no_grad()
    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of a state and of its other half, float32 [T, 1, d] each, for int64 [T] positions.

        They are `cos, cos` and `-sin, sin` of angle = position * theta ** (-2 i / d).
        """
        exponent = torch.arange(0, self.width, 2, dtype=torch.float32, device=position_ids.device) / self.width
        angles = (position_ids[:, None].float() * (1.0 / self.theta**exponent)[None])[:, None]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


class _Rotated(torch.autograd.Function):
    """States turned by their positions; the gradient is turned back."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        ctx.save_for_backward(cos, sin)
        return torch.addcmul(states * cos, states.roll(states.size(-1) // 2, dims=-1), sin)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        cos, sin = ctx.saved_tensors
        return torch.addcmul(grad * cos, grad.roll(grad.size(-1) // 2, dims=-1), sin, value=-1), None, None


def rotate(states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn `states` [T, heads, d] by their positions, in the half-split order of Hugging Face's Mistral."""
    return _Rotated.apply(states, *(table.to(states.dtype) for table in rotary))


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
    padding, repeats = packing.padding, query.size(1) // key.size(1)
    # The query heads of a group attend to the same keys: they are further queries, [b, G, L * repeats, d].
    query = query.unflatten(1, (key.size(1), repeats))
    padded = (_pad(states, padding) for states in (query, key, value))
    parts = []
    for bucket, q, k, v in zip(padding.buckets, *padded, strict=True):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2).flatten(2, 3),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=_mask(bucket, causal, repeats, query.device),
            dropout_p=dropout,
        )
        parts.append(out.unflatten(2, (bucket.length, repeats)).transpose(1, 2))
    return _unpad(parts, padding).flatten(1, 2)


def _mask(bucket: Bucket, causal: bool, repeats: int, device: torch.device) -> torch.Tensor | None:
    """Bool [b or 1, 1, 1 or L * repeats, L], true where attention is allowed; None where nothing is hidden."""
    if causal:  # hides pads too, which stand behind the tokens
        mask = torch.ones(bucket.length, bucket.length, dtype=torch.bool, device=device).tril()
        return mask.repeat_interleave(repeats, dim=0)[None, None]
    return None if bucket.is_token is None else bucket.is_token[:, None, None]


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
