"""Rotary positions (RoFormer, arXiv 2104.09864), counted inside each sequence of a pack.

Letters: `T` tokens in a pack, `d` head width.
"""

from __future__ import annotations

import torch


class Rotary:
    """Rotary angles of a pack: position * theta ** (-2 i / d), computed in float32 when they are first asked for."""

    def __init__(self, position_ids: torch.Tensor, width: int, theta: float) -> None:
        exponent = torch.arange(0, width, 2, dtype=torch.float32, device=position_ids.device) / width
        self._frequencies = 1.0 / theta**exponent
        self._position_ids = position_ids
        self._factors: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = {}
        self._table: torch.Tensor | None = None

    @torch.no_grad()
    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors of a state and of its other half, [T, 1, d] each: `cos, cos` and `-sin, sin` by position vector."""
        if dtype not in self._factors:
            angles = (self._position_ids[:, None].float() * self._frequencies[None])[:, None]
            cos, sin = angles.cos(), angles.sin()
            both = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
            self._factors[dtype] = tuple(table.to(dtype) for table in both)
        return self._factors[dtype]

    @torch.no_grad()
    def table(self, longest: int) -> torch.Tensor:
        """Angles by the position inside a sequence, float32 [longest, 1, 1, d], for TransformerEngine's fused kernel.

        The kernel starts a block for each of the table's rows and sequences, so it has no more rows than are needed.
        """
        if self._table is None:
            positions = torch.arange(longest, dtype=torch.float32, device=self._frequencies.device)
            angles = positions[:, None] * self._frequencies[None]
            self._table = torch.cat([angles, angles], dim=-1)[:, None, None]
        return self._table


class RotaryTable(torch.nn.Module):
    """The rotary base of a model; nothing of it is stored in checkpoints."""

    def __init__(self, width: int, theta: float) -> None:
        super().__init__()
        self.width, self.theta = width, theta

    def forward(self, position_ids: torch.Tensor) -> Rotary:
        """Angles for int64 [T] positions."""
        return Rotary(position_ids, self.width, self.theta)


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


def rotate(states: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Turn `states` [T, heads, d] by their positions, in the half-split order of Hugging Face's Mistral."""
    return _Rotated.apply(states, *rotary.factors(states.dtype))
