"""Megatron's local linears with their three products in FP8, emulated: rounded operands, multiplied as usual.

`y = Q(x) Q(W)^T` forward; `dx = Q(dy) Q(W)` and `dW = Q(dy)^T Q(x)` back, as TransformerEngine's linears do. Sums are
those of the operands' type (a GPU's tensor cores sum in float32). Adapters, head and embedding are none of these
linears and stay as they are.

Tensor-parallel scales are those of TransformerEngine. With `tensorwise` each rank's part of a weight, of a
row-parallel linear's input and of a column-parallel linear's gradient has its own scale; under sequence parallelism
the gathered input (column) and gradient (row) have one, for which TransformerEngine reduces the magnitude over tensor
ranks and which here is that of the gathered tensor. With `delayed` every tensor has one scale over all ranks that
share a layer. Blocks do not know of ranks.

A weight is rounded once a step, for all microbatches and both phases, and once for all if it is frozen (with
`delayed`, again when its scale moves).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from nvembed_mcore import device
from nvembed_mcore.model.fp8 import (
    HISTORY_STEPS,
    Role,
    amax_of,
    format_of,
    is_direction_free,
    quantized,
    roll,
    with_scale,
)

ROLES: tuple[Role, ...] = ("input", "weight", "gradient")


class Fp8Rounding(torch.nn.Module):
    """How one linear rounds, and what it remembers.

    Attributes:
        amax_history: `delayed` only, float32 [1024, 3]: largest magnitudes of input, weight and gradient, each step's
            in a row; row 0 is that of the step being taken.
        scale: `delayed` only, float32 [3]: of this step; 1 in a run's first.
    """

    def __init__(self, recipe: str) -> None:
        super().__init__()
        self.recipe = recipe
        self._weight: tuple[Tensor, Tensor] | None = None
        self._amax_of_weight: Tensor | None = None
        if recipe == "delayed":
            here = {"dtype": torch.float32, "device": device.current()}
            # They are no weights: checkpoints keep them beside (checkpoint/fp8_state.py).
            self.register_buffer("amax_history", torch.zeros(HISTORY_STEPS, len(ROLES), **here), persistent=False)
            self.register_buffer("scale", torch.ones(len(ROLES), **here), persistent=False)

    def both(self, values: Tensor, role: Role) -> tuple[Tensor, Tensor]:
        """A matrix [m, n] rounded for a product that sums over its columns, and for one over its rows."""
        if self.recipe == "delayed":
            once = with_scale(values, self.scale[ROLES.index(role)], format_of("delayed", role))
            return once, once
        along = quantized(values, self.recipe, role)
        is_same = is_direction_free(self.recipe, role)
        return along, along if is_same else quantized(values, self.recipe, role, over_rows=True)

    def weight(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """`both` of the weight, made when it is first needed and kept until it is forgotten."""
        if self._weight is None:
            self._weight, self._amax_of_weight = self.both(weight, "weight"), amax_of(weight)
        return self._weight

    def forget_weight(self) -> None:
        """The weight is no more what it was."""
        self._weight = None

    def remember(self, values: Tensor, role: Role) -> None:
        """Count a tensor for the scales of the steps to come."""
        if self.recipe == "delayed":
            slot = self.amax_history[0, ROLES.index(role)]
            torch.maximum(slot, amax_of(values), out=slot)

    def magnitudes(self) -> Tensor:
        """`delayed` only: the largest of this step, float32 [3], where one forward at least was."""
        self.amax_history[0, ROLES.index("weight")] = self._amax_of_weight
        return self.amax_history[0]

    def move(self, magnitudes: Tensor) -> None:
        """`delayed` only: the end of a step with these magnitudes, float32 [3]."""
        self.amax_history[0] = magnitudes
        largest = torch.tensor([torch.finfo(format_of("delayed", role)).max for role in ROLES])
        history, scale = roll(self.amax_history, self.scale, largest.to(self.scale.device))
        if scale[ROLES.index("weight")] != self.scale[ROLES.index("weight")]:
            self.forget_weight()
        self.amax_history.copy_(history)
        self.scale.copy_(scale)


class _Product(torch.autograd.Function):
    """`x W^T` [..., out] of rounded `x` [..., in] and `W` [out, in]; the gradient of the output is rounded, too."""

    @staticmethod
    def forward(ctx, states: Tensor, weight: Tensor, rounding: Fp8Rounding) -> Tensor:
        ctx.rounding = rounding
        along, across = rounding.both(states.reshape(-1, states.size(-1)), "input")
        forth, back = rounding.weight(weight)
        ctx.save_for_backward(back, across if weight.requires_grad else None)
        return (along @ forth.t()).view(*states.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, states = ctx.saved_tensors
        flat = grad.reshape(-1, grad.size(-1))
        ctx.rounding.remember(flat, "gradient")
        along, across = ctx.rounding.both(flat, "gradient")
        grad_states = (along @ weight).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        return grad_states, across.t() @ states if ctx.needs_input_grad[1] else None, None


class _Fp8Linear:
    """What both linears do instead of Megatron's product."""

    def __init__(self, *args: object, fp8: str, **named: object) -> None:
        super().__init__(*args, **named)
        self.fp8 = Fp8Rounding(fp8)

    def _forward_impl(
        self, input: Tensor, weight: Tensor, *, allreduce_dgrad: bool, sequence_parallel: bool, tp_group, **_: object
    ) -> Tensor:
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        if torch.is_grad_enabled():
            # So neither inference counts, nor the first phase of `cached`, whose packs come again.
            self.fp8.remember(input.detach(), "input")
        return _Product.apply(input, weight, self.fp8)


class Fp8ColumnParallelLinear(_Fp8Linear, ColumnParallelLinear):
    """`ColumnParallelLinear` in emulated FP8 by the recipe `fp8`."""


class Fp8RowParallelLinear(_Fp8Linear, RowParallelLinear):
    """`RowParallelLinear` in emulated FP8 by the recipe `fp8`."""


def linears_of(model: torch.nn.Module) -> Iterator[tuple[str, _Fp8Linear]]:
    """The emulated linears of a model, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, _Fp8Linear))


def forget_weights(models: list[torch.nn.Module], *, frozen: bool) -> None:
    """Weights have changed; with `frozen`, those that do not train, too."""
    for model in models:
        for _, linear in linears_of(model):
            if frozen or linear.weight.requires_grad:
                linear.fp8.forget_weight()


def begin_step(models: list[torch.nn.Module]) -> None:
    """Before the first forward of an optimizer step: what was computed since the last one does not count."""
    for one in _delayed(models):
        one.amax_history[0] = 0


@torch.no_grad()
def end_step(models: list[torch.nn.Module], groups: list[dist.ProcessGroup]) -> None:
    """After the optimizer's step: trained weights have changed, and histories move by one.

    Args:
        groups: those whose ranks together share these layers, tensor and data. All of them call this once a step,
            however many packs each of them had, so that none waits for another.
    """
    if delayed := _delayed(models):
        magnitudes = torch.stack([one.magnitudes() for one in delayed])
        for group in groups:
            dist.all_reduce(magnitudes, dist.ReduceOp.MAX, group=group)
        for one, row in zip(delayed, magnitudes, strict=True):
            one.move(row)
    forget_weights(models, frozen=False)


def _delayed(models: list[torch.nn.Module]) -> list[Fp8Rounding]:
    linears = [linear for model in models for _, linear in linears_of(model)]
    return [linear.fp8 for linear in linears if linear.fp8.recipe == "delayed"]
