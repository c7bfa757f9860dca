"""What FGM and R-Drop train on, written as plainly as possible; shares no code with the step."""

from __future__ import annotations

from collections.abc import Callable

import torch

FGM_WEIGHT = 0.7


def in_view(tokens: torch.Tensor, is_second: bool) -> torch.Tensor:
    """Embedded tokens [..., H] of a view; a fixed stand-in for dropout takes every third dimension from the second."""
    return tokens * (torch.arange(tokens.size(-1), device=tokens.device) % 3 != 0) * 1.5 if is_second else tokens


def whole_loss(
    table: torch.nn.Module,
    embed: Callable[[], torch.Tensor],
    score: Callable[[list[torch.Tensor]], torch.Tensor],
    epsilon: float,
    views: int,
) -> torch.Tensor:
    """The loss of texts as they are, and with `epsilon` that of moved ones.

    Args:
        table: the model's embedding, called once for each text.
        embed: [N, D], every text on its own.
        score: of one [N, D] for each view.
    """
    tokens: list[torch.Tensor] = []

    def through(change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        found = []
        for view in range(views):
            handle = table.register_forward_hook(lambda _, __, out, view=view: change(in_view(out, view == 1)))
            found.append(embed())
            handle.remove()
        return score(found)

    def keep(out: torch.Tensor) -> torch.Tensor:
        tokens.append(out if out.requires_grad else out.requires_grad_())
        return tokens[-1]

    value = through(keep)
    if not epsilon:
        return value
    grads = torch.autograd.grad(value, tokens, retain_graph=True)
    moves = iter([epsilon * grad / grad.norm() if grad.norm() > 0 else grad for grad in grads])
    return value + FGM_WEIGHT * through(lambda out: out + next(moves))
