"""What the pooling heads do between their matrix products, in plain torch.

Letters: `T` tokens, `A` heads, `R` latents, `F` width of the feed-forward, `H` hidden size, `B` sequences of a pack.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fold_product(left: Tensor, right: Tensor) -> Tensor:
    """A matrix product of the fold, float32 [.., m, k] @ [.., k, n]."""
    return left @ right


def group_softmax(logits: Tensor, groups: int) -> Tensor:
    """Softmax over each of `groups` equal parts of a row, in float32: [T, A * R] -> [T, A * R] in the same dtype."""
    return logits.unflatten(-1, (groups, -1)).float().softmax(dim=-1).to(logits.dtype).flatten(-2)


def geglu(projected: Tensor) -> Tensor:
    """`value * gelu(gate)` of the halves of the last dimension, with the exact gelu: [.., 2F] -> [.., F]."""
    value, gate = projected.chunk(2, dim=-1)
    return value * F.gelu(gate)


def segment_sum(states: Tensor, weights: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    """Weighted sum of token states over each sequence, in float32: [B, H].

    Args:
        states: [T, H], in any floating dtype.
        weights: float32 [T], constants.
        segment_ids: int64 [T], ascending; a sequence may have no token here.
        num_segments: B.
    """
    total = states.new_zeros(num_segments, states.size(-1), dtype=torch.float32)
    return total.index_add(0, segment_ids, states.float() * weights[:, None])


def pool(states: Tensor, weights: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    """`segment_sum` at unit length, float32 [B, H]; a sum of zero stays zero."""
    return F.normalize(segment_sum(states, weights, segment_ids, num_segments), dim=-1)
