"""Bidirectional attention over packed tokens.

Letters: `T` tokens in a pack, `t` of them on a context-parallel rank (all, where there is one), `B` sequences, `A`
query heads and `G` key/value groups of this tensor rank, `d` head width, `P` places of all padded buckets, `L` padded
length of a bucket, `b` sequences in a bucket.

There are two forms with the same result. `attend_packed` attends to the pack as it lies; `attend_padded` lays
sequences of similar length into padded batches, hides the pads, and takes the tokens back. `packed_attention` picks
the faster one. te_attention.py has both with TransformerEngine's kernels. Where ranks share the pack, it gathers keys
and values first, and both forms take fewer queries than keys.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from nvembed_mcore.data.packing import WHOLE, Split
from nvembed_mcore.kernels.varlen import varlen_attention
from nvembed_mcore.model.context import Context, bounds_of
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
        position_ids: int64 [t], position of each token of this rank inside its own sequence.
        segment_ids: int64 [t], number of its sequence.
        context: the ranks that share the pack; None: this one has it all. Megatron's fields are those of the whole
            pack, `cu_seqlens_*_padded` with what fills its sequences, as TransformerEngine wants them.
        rotary: angles of the positions.
        summaries: of the states after each layer, where the pooling head reads them.
    """

    lengths: np.ndarray | None = None
    position_ids: torch.Tensor | None = None
    segment_ids: torch.Tensor | None = None
    context: Context | None = None
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
            classes = -(-self.lengths // granularity)
            self._paddings[key] = _padding(self.lengths, classes, granularity, few_shapes, self.position_ids.device)
        return self._paddings[key]

    @cached_property
    def query_padding(self) -> Padding:
        """The padded form of this rank's queries: buckets of the same sequences as those of `padding()`."""
        if self.context is None:
            return self.padding()
        classes, own = -(-self.lengths // BUCKET_GRANULARITY), self.context.own_lengths
        return _padding(own, classes, BUCKET_GRANULARITY, False, self.position_ids.device)


def packing_of(
    lengths: np.ndarray, device: torch.device, split: Split = WHOLE, group: dist.ProcessGroup | None = None
) -> Packing:
    """Describe a pack of sequences with these `lengths` (int64 [B], each at least 1).

    Args:
        split: which part of the tokens this rank has, of those that the context-parallel ranks of `group` share.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    assert lengths.min() >= 1, "a kernel may hang on an empty sequence"
    filled = split.filled(lengths)
    positions = np.arange(filled.sum()) - np.repeat(np.cumsum(filled) - filled, filled)
    segments, own = np.repeat(np.arange(len(lengths)), filled), split.places(filled)
    context = Context(group, split, lengths, device) if split.size > 1 else None
    bounds, longest = bounds_of(lengths, device), int(filled.max())
    return Packing(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=context and context.filled_bounds,
        cu_seqlens_kv_padded=context and context.filled_bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=lengths,
        position_ids=torch.as_tensor(positions[own]).to(device),
        segment_ids=torch.as_tensor(segments[own]).to(device),
        context=context,
    )


def _padding(
    lengths: np.ndarray, classes: np.ndarray, granularity: int, few_shapes: bool, device: torch.device
) -> Padding:
    """Sequences of the same class, [B] of a multiple of `granularity`, share a bucket."""
    starts = np.cumsum(lengths) - lengths
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


def why_padded(device_type: str, dtype: torch.dtype, width: int, dropout: float, *, causal_parts: bool = False) -> str:
    """Why heads of this width are attended in padded buckets; empty where torch attends to the pack as it is.

    Args:
        causal_parts: whether a causal mask is asked for over texts that ranks share.
    """
    if device_type != "cuda":
        return "attention to a pack as it is needs a CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"attention to a pack as it is takes half precision, and not {dtype}"
    if width not in VARLEN_WIDTHS:
        return f"FlashAttention computes heads of width 8 to 256 in steps of 8, and not {width}"
    if causal_parts:
        # It hides what comes behind as many keys as there are queries, and here two chunks of queries are apart.
        return "FlashAttention has no causal mask for two chunks of a text"
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
        query: [t, A, d]. key, value: [t, G, d], with A a multiple of G (grouped queries).
        packing: the pack's description.
        causal: also hide later tokens of the same sequence.
        dropout: probability of dropping an attention weight.

    Returns:
        [t, A, d], same dtype as `query`; of tokens that only fill a sequence some finite numbers.
    """
    if packing.context:
        key, value = packing.context.gather(key, value)
    if _has_kernel(query, packing, causal, dropout):  # FlashAttention needs no pads
        return attend_packed(query, key, value, packing, causal=causal)
    # One call a sequence, the packed form elsewhere, takes three times as long as a call for each bucket.
    return attend_padded(query, key, value, packing, causal=causal, dropout=dropout)


def _has_kernel(query: torch.Tensor, packing: Packing, causal: bool, dropout: float = 0.0) -> bool:
    causal_parts = causal and packing.context is not None
    return not why_padded(query.device.type, query.dtype, query.size(-1), dropout, causal_parts=causal_parts)


def attend_packed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, *, causal: bool = False
) -> torch.Tensor:
    """The packed form: torch's variable-length attention in half precision on CUDA, elsewhere one call a sequence.

    Arguments and result as in `packed_attention`, but that keys and values are those of the whole pack.
    """
    own, lengths = packing.context, packing.lengths
    if _has_kernel(query, packing, causal):
        queries = (own.own_bounds, int(own.own_lengths.max())) if own else (packing.cu_seqlens_q, packing.max_seqlen_q)
        keys = (packing.cu_seqlens_kv, int(lengths.max()))
        return varlen_attention(query, key, value, queries, keys, causal=causal)
    own_lengths, parts = (own.own_lengths if own else lengths).tolist(), []
    sequences = zip(
        *(states.split(own_lengths) for states in (query, packing.position_ids)),
        *(states.split(lengths.tolist()) for states in (key, value)),
        strict=True,
    )
    for q, positions, k, v in sequences:
        mask = _causal(positions, len(k)) if causal else None
        q, k, v = (states.transpose(0, 1)[None] for states in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
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

    Arguments and result as in `packed_attention`, but that keys and values are those of the whole pack.
    """
    padding, queries, repeats = packing.padding(), packing.query_padding, query.size(1) // key.size(1)
    padded = (pad(states, one) for states, one in ((query, queries), (key, padding), (value, padding)))
    positions = _positions(packing, queries) if causal else [None] * len(queries.buckets)
    parts = []
    for bucket, where, q, k, v in zip(padding.buckets, positions, *padded, strict=True):
        # The query heads of a group attend to the same keys: they are further queries, [b, G, L * repeats, d].
        out = F.scaled_dot_product_attention(
            q.unflatten(2, (-1, repeats)).transpose(1, 2).flatten(2, 3),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=_mask(bucket, where, repeats),
            dropout_p=dropout,
        )
        parts.append(out.unflatten(2, (-1, repeats)).transpose(1, 2).flatten(2))
    return unpad(parts, queries).unflatten(1, query.shape[1:])


def _positions(packing: Packing, queries: Padding) -> list[torch.Tensor]:
    """For each bucket the positions of its queries inside their sequences, int64 [b or 1, places of a sequence]."""
    if packing.context is None:
        return [torch.arange(bucket.length, device=queries.rows.device)[None] for bucket in queries.buckets]
    sizes = [bucket.num_sequences * bucket.length for bucket in queries.buckets]
    parts = packing.position_ids.index_select(0, queries.rows).split(sizes)
    return [part.view(-1, bucket.length) for part, bucket in zip(parts, queries.buckets, strict=True)]


def _mask(bucket: Bucket, positions: torch.Tensor | None, repeats: int) -> torch.Tensor | None:
    """Bool [b or 1, 1, 1 or queries * repeats, L], true where attention is allowed; None where nothing is hidden.

    `positions` of the queries: their mask is causal.
    """
    if positions is not None:  # hides pads too, which stand behind the tokens
        return _causal(positions, bucket.length).repeat_interleave(repeats, dim=-2)[:, None]
    return None if bucket.is_token is None else bucket.is_token[:, None, None]


def _causal(positions: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Bool [..., queries, keys], true where queries at these positions [..., queries] may look."""
    return torch.arange(num_keys, device=positions.device) <= positions[..., None]


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
        """query [t, A, d], key and value [t, G, d] -> [t, A * d]."""
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
