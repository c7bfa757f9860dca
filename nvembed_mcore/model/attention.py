"""Bidirectional attention over packed tokens.

Letters: `T` tokens in a pack, `B` sequences, `A` query heads and `G` key/value groups of this tensor rank, `d` head
width, `P` places of all padded buckets, `L` padded length of a bucket, `b` sequences in a bucket.

There are two forms with the same result. `attend_packed` attends to the pack as it lies; `attend_padded` lays
sequences of similar length into padded batches, hides the pads, and takes the tokens back. `packed_attention` picks
the faster one. te_attention.py has both with TransformerEngine's kernels.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
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
from nvembed_mcore.model.rotary import Rotary, rotate

if TYPE_CHECKING:
    from nvembed_mcore.model.layer_summaries import LayerSummaries

VARLEN_WIDTHS = range(8, 257, 8)
"""Head widths that FlashAttention computes; wider heads of a pooling head take the padded form."""
BUCKET_GRANULARITY = 16
"""Sequences whose lengths round up to the same multiple share a bucket; from 4 to 64 a step takes the same time."""


@dataclass(frozen=True)
class Bucket:
    """Sequences attended in one padded call.

    Attributes:
        num_sequences: b.
        length: L.
        is_token: bool [b, L], false at pads; None where there are none. Every sequence has a token.
        bounds: int32 [b + 1], running sum of the sequences' tokens.
    """

    num_sequences: int
    length: int
    is_token: torch.Tensor | None
    bounds: torch.Tensor


@dataclass(frozen=True)
class Padding:
    """The padded form of a pack: its buckets one behind the other.

    Attributes:
        buckets: in order.
        rows: int64 [P], token of the pack at each place (a pad repeats the sequence's first token; its mask hides it).
        places: int64 [T], place of each token.
        pads: int64, places that are nobody's: pads and whole sequences that only fill a bucket.
    """

    buckets: list[Bucket]
    rows: torch.Tensor
    places: torch.Tensor
    pads: torch.Tensor


@dataclass
class Packing(PackedSeqParams):
    """What attention must know about a pack; Megatron hands it through its layers untouched.

    Attributes:
        lengths: int64 [B], tokens of each sequence, on the host.
        position_ids: int64 [T], position inside its own sequence.
        segment_ids: int64 [T], number of its sequence.
        rotary: angles of its positions.
        summaries: of the states after each layer, where the pooling head reads them.
    """

    lengths: np.ndarray | None = None
    position_ids: torch.Tensor | None = None
    segment_ids: torch.Tensor | None = None
    rotary: Rotary | None = None
    summaries: LayerSummaries | None = None
    _paddings: dict[tuple[int, bool], Padding] = field(default_factory=dict, repr=False)

    def padding(self, granularity: int = BUCKET_GRANULARITY, *, few_shapes: bool = False) -> Padding:
        """The padded form; made when it is first asked for, and kept for the other layers.

        Args:
            granularity: sequences whose lengths round up to the same multiple of it share a bucket.
            few_shapes: for kernels that are compiled for each shape: buckets have the full length of their multiple,
                and their sequences are rounded up to four numbers an octave with sequences of one token.
        """
        key = (granularity, few_shapes)
        if key not in self._paddings:
            self._paddings[key] = _padding(self.lengths, granularity, few_shapes, self.position_ids.device)
        return self._paddings[key]


def packing_of(lengths: np.ndarray, device: torch.device) -> Packing:
    """Describe a pack of sequences with these `lengths` (int64 [B], each at least 1)."""
    lengths = np.asarray(lengths, dtype=np.int64)
    assert lengths.min() >= 1, "a kernel may hang on an empty sequence"
    starts = np.concatenate([[0], np.cumsum(lengths)])
    longest = int(lengths.max())
    bounds = torch.as_tensor(starts, dtype=torch.int32).to(device)
    return Packing(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=lengths,
        position_ids=torch.as_tensor(np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)).to(device),
        segment_ids=torch.as_tensor(np.repeat(np.arange(len(lengths)), lengths)).to(device),
    )


def _padding(lengths: np.ndarray, granularity: int, few_shapes: bool, device: torch.device) -> Padding:
    starts, classes = np.cumsum(lengths) - lengths, -(-lengths // granularity)
    buckets, rows, is_wanted = [], [], []
    for length_class in np.unique(classes).tolist():
        members = np.flatnonzero(classes == length_class)
        fillers = _few_counts(len(members)) - len(members) if few_shapes else 0
        own, first = np.pad(lengths[members], (0, fillers), constant_values=1), np.pad(starts[members], (0, fillers))
        width = length_class * granularity if few_shapes else int(own.max())
        positions = np.arange(width)[None]
        inside = positions < own[:, None]
        rows.append((first[:, None] + np.where(inside, positions, 0)).ravel())
        is_wanted.append((inside & (np.arange(len(own)) < len(members))[:, None]).ravel())
        mask = None if inside.all() else torch.as_tensor(inside).to(device)
        bounds = torch.as_tensor(np.concatenate([[0], np.cumsum(own)]), dtype=torch.int32).to(device)
        buckets.append(Bucket(len(own), width, mask, bounds))
    rows, is_wanted = np.concatenate(rows), np.concatenate(is_wanted)
    places = np.empty(int(lengths.sum()), dtype=np.int64)
    places[rows[is_wanted]] = np.flatnonzero(is_wanted)
    arrays = (rows, places, np.flatnonzero(~is_wanted))
    return Padding(buckets, *(torch.as_tensor(array).to(device) for array in arrays))


def _few_counts(count: int) -> int:
    """`count` rounded up to one of 1 to 8, 10, 12, 14, 16, 20, ...: four numbers an octave."""
    step = 1 << max(0, count.bit_length() - 3)
    return -(-count // step) * step


class _Scattered(torch.autograd.Function):
    """Rows of the pack to every bucket: [T, n] -> [b * L, n] each, with memory of its own.

    Nothing that is asked for depends on a pad, so the gradient of its copy is zero and need not be added: the
    gradient, too, is taken by number. Autograd's own would add row by row, because it does not know that each is
    wanted once.
    """

    @staticmethod
    def forward(ctx, states: torch.Tensor, padding: Padding):
        ctx.padding = padding
        sizes = [bucket.num_sequences * bucket.length for bucket in padding.buckets]
        return tuple(states.index_select(0, rows) for rows in padding.rows.split(sizes))

    @staticmethod
    def backward(ctx, *grads: torch.Tensor):
        return torch.cat(grads).index_select(0, ctx.padding.places), None


class _Gathered(torch.autograd.Function):
    """Tokens back from their places, [P, n] -> [T, n]; the gradient of a pad is zero."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, padding: Padding):
        ctx.padding = padding
        return states.index_select(0, padding.places)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad.index_select(0, ctx.padding.rows).index_fill_(0, ctx.padding.pads, 0.0), None


def pad(states: torch.Tensor, padding: Padding) -> list[torch.Tensor]:
    """[T, heads, d] -> for each bucket [b, L, heads, d]."""
    parts = _Scattered.apply(states.flatten(1), padding)
    return [
        part.view(bucket.num_sequences, bucket.length, *states.shape[1:])
        for part, bucket in zip(parts, padding.buckets, strict=True)
    ]


def unpad(parts: list[torch.Tensor], padding: Padding) -> torch.Tensor:
    """For each bucket [b, L, n] -> [T, n]."""
    return _Gathered.apply(torch.cat([part.flatten(0, 1) for part in parts]), padding)


def why_padded(device_type: str, dtype: torch.dtype, width: int, dropout: float) -> str:
    """Why heads of this width are attended in padded buckets; empty where torch attends to the pack as it is."""
    if device_type != "cuda":
        return "attention to a pack as it is needs a CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"attention to a pack as it is takes half precision, and not {dtype}"
    if width not in VARLEN_WIDTHS:
        return f"FlashAttention computes heads of width 8 to 256 in steps of 8, and not {width}"
    return "FlashAttention here drops no attention weights" if dropout else ""


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    *,
    causal: bool = False,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Softmax attention inside each sequence of a pack, in the form that is faster here.

    Args:
        query: [T, A, d]. key, value: [T, G, d], with A a multiple of G (grouped queries).
        packing: the pack's description.
        causal: also hide later tokens of the same sequence.
        dropout: probability of dropping an attention weight.

    Returns:
        [T, A, d], same dtype as `query`.
    """
    if not why_padded(query.device.type, query.dtype, query.size(-1), dropout):  # FlashAttention needs no pads
        return attend_packed(query, key, value, packing, causal=causal)
    # One call a sequence, the packed form elsewhere, takes three times as long as a call for each bucket.
    return attend_padded(query, key, value, packing, causal=causal, dropout=dropout)


def attend_packed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, *, causal: bool = False
) -> torch.Tensor:
    """The packed form: torch's variable-length attention in half precision on CUDA, elsewhere one call a sequence.

    Arguments and result as in `packed_attention`.
    """
    if not why_padded(query.device.type, query.dtype, query.size(-1), dropout=0.0):
        return varlen_attention(query, key, value, packing.cu_seqlens_q, packing.max_seqlen_q, causal=causal)
    lengths, parts = packing.lengths.tolist(), []
    for q, k, v in zip(*(states.split(lengths) for states in (query, key, value)), strict=True):
        q, k, v = (states.transpose(0, 1)[None] for states in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def attend_padded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    *,
    causal: bool = False,
    dropout: float = 0.0,
) -> torch.Tensor:
    """The padded form: one call for each bucket of sequences of similar length, whose mask hides the pads.

    Arguments and result as in `packed_attention`.
    """
    padding, repeats = packing.padding(), query.size(1) // key.size(1)
    padded = (pad(states, padding) for states in (query, key, value))
    parts = []
    for bucket, q, k, v in zip(padding.buckets, *padded, strict=True):
        # The query heads of a group attend to the same keys: they are further queries, [b, G, L * repeats, d].
        out = F.scaled_dot_product_attention(
            q.unflatten(2, (-1, repeats)).transpose(1, 2).flatten(2, 3),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=_mask(bucket, causal, repeats, query.device),
            dropout_p=dropout,
        )
        parts.append(out.unflatten(2, (bucket.length, repeats)).transpose(1, 2).flatten(2))
    return unpad(parts, padding).unflatten(1, query.shape[1:])


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
