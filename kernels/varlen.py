"""torch's variable-length attention, for half precision on CUDA."""

from __future__ import annotations

import torch


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    queries: tuple[torch.Tensor, int],
    keys: tuple[torch.Tensor, int],
    *,
    causal: bool,
) -> torch.Tensor:
    """Attention inside each sequence of a pack (`torch.nn.attention.varlen`, FlashAttention underneath).

    Args:
        query: bfloat16 or float16 [T, A, d]. key, value: [K, G, d].
        queries: int32 [B + 1], where each sequence's queries begin, the last entry being T; and how many the longest
            has.
        keys: the same of its keys, of which there may be another number.
        causal: hide later tokens of the same sequence; only with as many queries as keys.

    Returns:
        [T, A, d].
    """
    from torch.nn.attention.varlen import varlen_attn

    groups = query.size(1) // key.size(1)
    # Repeated rather than `enable_gqa`, which torch has only from 2.12 on.
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    window = (-1, 0) if causal else (-1, -1)
    return varlen_attn(query, key, value, queries[0], keys[0], queries[1], keys[1], window_size=window)
