"""Rounding to FP8 and back by the scaling rules of TransformerEngine 2.20: pure functions, on any device.

A value is multiplied by a scale, rounded to the nearest number of the format (ties to even; beyond the largest, to the
largest), and divided by the scale again. What differs is over which values a scale is shared, and where it comes from:

| recipe | one scale for | from | numbers of inputs and weights, of gradients |
|---|---|---|---|
| `tensorwise` | a tensor | its own largest magnitude | e4m3, e5m2 |
| `delayed` | a tensor | the largest of earlier steps | e4m3, e5m2 |
| `blockwise` | 128 values along the product's sum; of a weight 128 x 128 | their own; a power of two | e4m3 |
| `mxfp8` | 32 values along the product's sum | their own; a power of two | e4m3 |

Sources: `transformer_engine/common/recipe/__init__.py` (recipes and their defaults), `common/recipe/recipe_common.cuh`
(`compute_scale_from_amax`), `common/recipe/delayed_scaling.cu` (history), `common/util/ptx.cuh` (`float_to_e8m0`).

Letters: `m` and `n` rows and columns of a matrix, `N` steps of a history.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Role = Literal["input", "weight", "gradient"]
HISTORY_STEPS = 1024
"""Steps whose largest magnitudes `delayed` remembers: `amax_history_len` of TransformerEngine."""


def format_of(recipe: str, role: Role) -> torch.dtype:
    """What a tensor is rounded to: where all of it has one scale, gradients need the range of e5m2."""
    return E5M2 if role == "gradient" and recipe in ("tensorwise", "delayed") else E4M3


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest numbers of a format, in the type of `values`; what is not a number stays so."""
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype).to(values.dtype)


def scale_for(amax: Tensor, dtype: torch.dtype, *, power_of_two: bool = False) -> Tensor:
    """The scale that takes `amax` to the largest number of a format, or with `power_of_two` at most there.

    Args:
        amax: largest magnitudes, float32 of any shape. Where one is zero or not finite the scale is 1.

    Returns:
        float32 of that shape; where the quotient overflows, the largest float32.
    """
    scale = _quotient(torch.full_like(amax, torch.finfo(dtype).max), amax)
    if power_of_two:
        scale = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1)
    return torch.where(torch.isfinite(amax) & (amax > 0), scale, 1.0)


def _quotient(largest: Tensor, amax: Tensor) -> Tensor:
    """Rounded once: a number over a tensor would be a product with the tensor's inverse."""
    return torch.div(largest, amax).clamp(max=torch.finfo(torch.float32).max)


def scale_e8m0(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale of `mxfp8`: the inverse of `amax` / (largest number), rounded up to one of E8M0's powers of two.

    Args:
        amax: as in `scale_for`.

    Returns:
        float32 of that shape, from 2^-127 to 2^126; 1 where the inverse would be E8M0's least.
    """
    mantissa, exponent = torch.frexp(amax * (1 / torch.finfo(dtype).max))
    # frexp's mantissa is from 0.5: a power of two is its own ceiling.
    exponent = torch.where(torch.isfinite(amax), exponent - (mantissa == 0.5).int(), 127)
    is_least = (mantissa == 0) | (exponent <= -127)
    return torch.where(is_least, 1.0, torch.ldexp(torch.ones_like(amax), -exponent))


def with_scale(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` as a format keeps them under scales that broadcast to their shape, and back to their type.

    Exact in float32; to bfloat16 the result is rounded once more, whose error is a sixteenth of that of e4m3.
    """
    return (rounded(values.float() * scale, dtype) * (1 / scale)).to(values.dtype)


def amax_of(values: Tensor) -> Tensor:
    """Largest magnitude, float32, no dimensions; 0 of nothing."""
    if not values.numel():
        return values.new_zeros((), dtype=torch.float32)
    low, high = values.aminmax()
    return torch.maximum(-low, high).float()


def by_tensor(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` under one scale from their own largest magnitude (`Float8CurrentScaling`)."""
    return with_scale(values, scale_for(amax_of(values), dtype), dtype)


def by_blocks(values: Tensor, rows: int, columns: int, dtype: torch.dtype, *, e8m0: bool = False) -> Tensor:
    """A matrix [m, n] under one scale for each block of `rows` x `columns`; at the ends blocks are smaller.

    Args:
        e8m0: scales as in `mxfp8`, otherwise as in `blockwise`.
    """
    m, n = values.shape
    padded = torch.nn.functional.pad(values, (0, -n % columns, 0, -m % rows))
    blocks = padded.view(padded.size(0) // rows, rows, padded.size(1) // columns, columns)
    amax = blocks.abs().amax((1, 3), keepdim=True).float()
    scale = scale_e8m0(amax, dtype) if e8m0 else scale_for(amax, dtype, power_of_two=True)
    return with_scale(blocks, scale, dtype).reshape(padded.shape)[:m, :n]


def quantized(values: Tensor, recipe: str, role: Role, *, over_rows: bool = False) -> Tensor:
    """A matrix [m, n] as one side of a product keeps it; every recipe but `delayed`, whose scale is not its own.

    Args:
        over_rows: the product sums over the rows of the matrix, otherwise over its columns. Blocks lie along the sum,
            so a matrix has two roundings, both of its own values.
    """
    dtype = format_of(recipe, role)
    if recipe == "tensorwise":
        return by_tensor(values, dtype)
    if recipe == "blockwise" and role == "weight":
        return by_blocks(values, 128, 128, dtype)
    length = 128 if recipe == "blockwise" else 32
    shape = (length, 1) if over_rows else (1, length)
    return by_blocks(values, *shape, dtype, e8m0=recipe == "mxfp8")


def is_direction_free(recipe: str, role: Role) -> bool:
    """Whether both roundings of a matrix are the same."""
    return recipe in ("tensorwise", "delayed") or (recipe == "blockwise" and role == "weight")


def roll(history: Tensor, scale: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """The end of a step of `delayed`: algorithm `max`, margin 0 (`amax_and_scale_update`).

    Args:
        history: magnitudes of each tensor, float32 [N, tensors]; row 0 has those of the step that ends.
        scale: those of that step, float32 [tensors].
        largest: of each tensor's format, float32 [tensors].

    Returns:
        The history with row 0 empty for the next step and the oldest row gone, and the next step's scales: those of
        the largest of all `N` rows, or the old ones where that is zero or not finite.
    """
    amax = history.amax(0)
    known = torch.isfinite(amax) & (amax > 0)
    rolled = history.roll(-1, 0)
    rolled[0] = 0
    return rolled, torch.where(known, _quotient(largest, amax), scale)
