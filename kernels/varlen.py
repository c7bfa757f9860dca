"""torch's variable-length attention, for half precision on CUDA."""

from __future__ import annotations

import torch


def varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int, *, causal: bool
) -> torch.Tensor:
    """Attention inside each sequence of a pack (`torch.nn.attention.varlen`, FlashAttention underneath).

    Args:
        query: bfloat16 or float16 [T, A, d]. key, value: [T, G, d].
        bounds: int32 [B + 1], where each sequence begins; the last entry is T.
        longest: tokens of the longest sequence.
        causal: hide later tokens of the same sequence.

    Returns:
        [T, A, d].
    """
    from torch.nn.attention.varlen import varlen_attn

    groups = query.size(1) // key.size(1)
    # Repeated rather than `enable_gqa`, which torch has only from 2.12 on.
    key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    window = (-1, 0) if causal else (-1, -1)
    return varlen_attn(query, key, value, bounds, bounds, longest, longest, window_size=window)
