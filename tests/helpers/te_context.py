"""TransformerEngine's attention over texts that ranks share, on torch alone (see te_attention.py beside).

What it is handed it reads as the real one of release 2.20 does (`context_parallel.py`, `rope.py`): bounds are those of
whole texts, `cu_seqlens_*_padded` with what fills them, and a rank has two chunks of each.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import te_attention as stand_in


def chunks_of(rank: int, size: int, length: int) -> list[slice]:
    """Positions that a rank has of a text of `length` tokens, those that fill it included."""
    half = length // (2 * size)
    return [slice(number * half, (number + 1) * half) for number in (rank, 2 * size - 1 - rank)]


def apply_rotary_pos_emb(
    states, freqs, tensor_format="sbhd", *, fused=False, cu_seqlens=None, cp_size=1, cp_rank=0
) -> torch.Tensor:
    """`cu_seqlens` are `cu_seqlens_padded`; row `i` of `freqs` turns position `i`, whoever has it."""
    assert tensor_format == "thd" and fused and cu_seqlens.dtype == torch.int32 and freqs.dtype == torch.float32
    lengths = cu_seqlens.diff().tolist()
    assert freqs.size(0) >= max(lengths) and not any(length % (2 * cp_size) for length in lengths)
    angles = torch.cat([freqs[part, 0] for length in lengths for part in chunks_of(cp_rank, cp_size, length)])
    assert len(angles) == len(states), "the bounds are those of other texts"
    first, second = states.chunk(2, dim=-1)
    return (states * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()).to(states.dtype)


class _Around(torch.autograd.Function):
    """All ranks' states, one behind the other; gradients are summed over ranks."""

    @staticmethod
    def forward(ctx, states, group):
        ctx.group = group
        parts = [torch.empty_like(states) for _ in range(group.size())]
        torch.distributed.all_gather(parts, states.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad[ctx.group.rank()], None


class DotProductAttention(torch.nn.Module):
    """The real one's constructor and `forward` with `cp_group`, as far as they are used."""

    calls = 0

    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups,
        *,
        attn_mask_type,
        tp_size,
        tp_group,
        layer_number,
        cp_group,
        cp_global_ranks,
        cp_stream,
        cp_comm_type,
    ) -> None:
        super().__init__()
        assert cp_global_ranks == torch.distributed.get_process_group_ranks(cp_group)
        assert cp_stream == "a stream" and cp_comm_type == "p2p"
        self.group, self.causal = cp_group, attn_mask_type == "padding_causal"

    def forward(
        self,
        query,
        key,
        value,
        *,
        qkv_format,
        cu_seqlens_q,
        cu_seqlens_kv,
        cu_seqlens_q_padded,
        cu_seqlens_kv_padded,
        max_seqlen_q,
        max_seqlen_kv,
        pad_between_seqs,
    ):
        type(self).calls += 1
        rank, size = self.group.rank(), self.group.size()
        lengths, filled = cu_seqlens_q.diff().tolist(), cu_seqlens_q_padded.diff().tolist()
        assert qkv_format == "thd" and torch.equal(cu_seqlens_q, cu_seqlens_kv)
        assert torch.equal(cu_seqlens_q_padded, cu_seqlens_kv_padded)
        assert not any(one % (2 * size) for one in filled) and len(query) * size == sum(filled)
        assert max_seqlen_q == max_seqlen_kv and max_seqlen_q >= max(filled) and max_seqlen_q % (2 * size) == 0
        assert pad_between_seqs == (lengths != filled), "the ranks would take different kernels"
        keys, values = (_Around.apply(states, self.group) for states in (key, value))
        out, begin = [], 0
        for length, whole in zip(lengths, filled, strict=True):
            own = slice(begin, begin + whole // size)
            begin = own.stop
            k, v = (self._in_order(states[:, own])[:length] for states in (keys, values))
            positions = torch.cat([torch.arange(whole)[part] for part in chunks_of(rank, size, whole)])
            states = self._attend(query[own], positions, k, v)
            out.append(states.masked_fill((positions >= length)[:, None], torch.nan))
        return torch.cat(out)

    def _in_order(self, parts):
        """Those of one text, [ranks, tokens of each, ..] -> [tokens, ..]."""
        first, second = parts.chunk(2, dim=1)
        return torch.cat([*first, *second.flip(0)])

    def _attend(self, query, positions, key, value):
        mask = torch.arange(len(key)) <= positions[:, None] if self.causal else None
        q, k, v = (states.transpose(0, 1)[None] for states in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)


def install(patch: pytest.MonkeyPatch) -> None:
    """As `te_attention.install`, with these."""
    from nvembed_mcore import device

    stand_in.install(patch, attention=DotProductAttention, rope=apply_rotary_pos_emb)
    patch.setattr(device, "second_stream", lambda: "a stream")
    patch.setattr(DotProductAttention, "calls", 0)
