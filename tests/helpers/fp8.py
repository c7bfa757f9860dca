"""FP8 written as plainly as possible, one block after the other, and linears to compare with it."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import torch
from torch import Tensor

LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}


def numbers_of(kind: str) -> np.ndarray:
    """All finite numbers of a format that are not negative, from its definition, in order: float64."""
    exponents, mantissas, bias = {"e4m3": (16, 8, 7), "e5m2": (32, 4, 15)}[kind]
    small = [m / mantissas * 2.0 ** (1 - bias) for m in range(mantissas)]
    big = [(1 + m / mantissas) * 2.0 ** (e - bias) for e in range(1, exponents) for m in range(mantissas)]
    return np.array([number for number in small + big if number <= LARGEST[kind]])


def nearest(values: Tensor, kind: str) -> Tensor:
    """Each value's nearest number of a format by looking at all of them; of two as near the one with an even code."""
    table, flat = numbers_of(kind), values.double().flatten().numpy()
    distances = np.abs(np.abs(flat)[:, None] - table)
    lower = distances.argmin(1)
    upper = np.minimum(lower + 1, len(table) - 1)
    is_tie = distances[np.arange(len(flat)), upper] == distances.min(1)
    codes = np.where(is_tie & (lower % 2 == 1), upper, lower)
    return torch.from_numpy(np.copysign(table[codes], flat)).view(values.shape).float()


def plain(values: Tensor, recipe: str, role: str, over_rows: bool = False, scale: float | None = None) -> Tensor:
    """A matrix rounded by a recipe, block after block; `scale`: of `delayed`."""
    kind = "e5m2" if role == "gradient" and recipe in ("tensorwise", "delayed") else "e4m3"
    if recipe in ("tensorwise", "delayed"):
        size = values.shape
    elif recipe == "blockwise" and role == "weight":
        size = (128, 128)
    else:
        length = {"blockwise": 128, "mxfp8": 32}[recipe]
        size = (length, 1) if over_rows else (1, length)
    found = torch.empty_like(values)
    for row in range(0, values.size(0), size[0]):
        for column in range(0, values.size(1), size[1]):
            block = slice(row, row + size[0]), slice(column, column + size[1])
            one = np.float32(scale) if scale else _scale(values[block].abs().max().item(), recipe, LARGEST[kind])
            found[block] = nearest(values[block] * float(one), kind) * float(np.float32(1) / one)
    return found


def _scale(amax: float, recipe: str, largest: float) -> np.float32:
    if amax == 0 or not math.isfinite(amax):
        return np.float32(1)
    if recipe == "mxfp8":
        return np.float32(2.0 ** -math.ceil(math.log2(np.float32(amax) * np.float32(1 / largest))))
    scale = np.float32(largest) / np.float32(amax)
    return np.float32(2.0 ** math.floor(math.log2(scale))) if recipe == "blockwise" else scale


class PlainLinear:
    """One process's linear by formulas: y = Q(x) Q(W)^T, dx = Q(dy) Q(W), dW = Q(dy)^T Q(x), and `delayed`'s history.

    `parts` of the outputs (`column`) or inputs (`row`) have scales of their own where the recipe says so.
    """

    def __init__(self, weight: Tensor, recipe: str, parts: int = 1, kind: str = "column") -> None:
        self.weight, self.recipe, self.parts, self.kind = weight, recipe, parts, kind
        self.scales = {"input": 1.0, "weight": 1.0, "gradient": 1.0}
        self.history: list[dict[str, float]] = []

    def _rounded(self, values: Tensor, role: str, over_rows: bool = False) -> Tensor:
        if self.recipe == "delayed":
            return plain(values, "delayed", role, scale=self.scales[role])
        split = {"column": {"weight": 0, "gradient": 1}, "row": {"weight": 1, "input": 1}}[self.kind]
        if role not in split:
            return plain(values, self.recipe, role, over_rows)
        pieces = values.chunk(self.parts, split[role])
        return torch.cat([plain(one, self.recipe, role, over_rows) for one in pieces], split[role])

    def pack(self, states: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One microbatch: output, gradient of the input and of the weight."""
        now = {"input": states, "weight": self.weight, "gradient": grad}
        self.history.append({role: one.abs().max().item() for role, one in now.items()})
        output = self._rounded(states, "input") @ self._rounded(self.weight, "weight").T
        back = self._rounded(grad, "gradient") @ self._rounded(self.weight, "weight", True)
        product = self._rounded(grad, "gradient", True).T @ self._rounded(states, "input", True)
        return output, back, product

    def end_step(self) -> None:
        """The scales of the next step, from the largest of all microbatches since the first."""
        for role in self.scales:
            amax = np.float32(max(one[role] for one in self.history))
            self.scales[role] = float(np.float32(LARGEST["e5m2" if role == "gradient" else "e4m3"]) / amax)


def linear(recipe: str, kind: str, size: tuple[int, int], layout: tuple[int, bool] = (1, False)):
    """An emulated linear of `size` (outputs, inputs), the groups of its layout (TP, SP), and its rank's weight set."""
    from nvembed_mcore.model import fp8_linear
    from nvembed_mcore.model.backend import Backend
    from nvembed_mcore.model.mistral import transformer_config
    from tests.helpers.cases import layout as make_layout
    from tests.helpers.models import tiny_config

    parallel, groups = make_layout(layout[0], 1, layout[1])
    config = transformer_config(tiny_config(), Backend("local", torch.float32, recipe), parallel)
    of_kind = {
        "column": (fp8_linear.Fp8ColumnParallelLinear, {"gather_output": False}),
        "row": (fp8_linear.Fp8RowParallelLinear, {"input_is_parallel": True}),
    }
    module, options = of_kind[kind]
    made = module(
        size[1], size[0], config=config, init_method=None, bias=False, skip_bias_add=False, fp8=recipe,
        tp_group=groups.tp, **options,
    )  # fmt: skip
    with torch.no_grad():
        made.weight.copy_(weight_of(size).chunk(layout[0], 0 if kind == "column" else 1)[groups.tp_rank])
    return made, groups


def weight_of(size: tuple[int, int]) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1)) * 0.05


def packs_of(size: tuple[int, int], tokens: list[int], seed: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Inputs [tokens, in] and gradients of outputs [tokens, out] of microbatches; rows differ in magnitude."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number, count in enumerate(tokens, 1):
        rows = torch.randn(count, 1, generator=generator).exp() * number
        states = torch.randn(count, size[1], generator=generator) * rows
        found.append((states, torch.randn(count, size[0], generator=generator) * rows * 1e-4))
    return found


def worst(found: list[tuple[Tensor, ...]], expected: list[tuple[Tensor, ...]]) -> float:
    """Largest difference of a tensor over its largest value."""
    pairs = [(a, b) for ours, theirs in zip(found, expected, strict=True) for a, b in zip(ours, theirs, strict=True)]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def products(recipe: str, kind: str, size: tuple[int, int], layout: tuple[int, bool] = (1, False)) -> float:
    """Two steps of two microbatches on tensor ranks against formulas: the worst difference."""
    from nvembed_mcore.model import fp8_linear

    made, groups = linear(recipe, kind, size, layout)
    truth = PlainLinear(weight_of(size), recipe, layout[0], kind)
    worst_found = 0.0
    for step in range(2):
        fp8_linear.begin_step([made])
        packs = packs_of(size, [24, 10], seed=step)
        found = [_through(made, groups, kind, layout, *pack) for pack in packs]
        expected = [_own_part(truth.pack(*pack), kind, layout, groups) for pack in packs]
        worst_found = max(worst_found, worst(found, expected))
        with torch.no_grad():
            made.weight.mul_(1.5)
        truth.weight = truth.weight * 1.5
        fp8_linear.end_step([made], [groups.tp, groups.dp])
        truth.end_step()
    return worst_found


def _through(made, groups, kind: str, layout: tuple[int, bool], states: Tensor, grad: Tensor):
    """Output, and gradients of input and weight, of this rank's part of a microbatch."""
    tp, sp = layout

    def part(values: Tensor, dim: int) -> Tensor:
        return values.chunk(tp, dim)[groups.tp_rank].contiguous()

    whole = (0, None)[not sp]
    into, out = (whole, 1) if kind == "column" else (1, whole)
    states, grad = (one if dim is None else part(one, dim) for one, dim in ((states, into), (grad, out)))
    states = states[:, None].clone().requires_grad_()
    output, _ = made(states)
    made.weight.grad = None
    output.backward(grad[:, None])
    return output.detach()[:, 0], states.grad[:, 0], made.weight.grad


def _own_part(whole: tuple[Tensor, Tensor, Tensor], kind: str, layout: tuple[int, bool], groups):
    """This rank's part of output, input's gradient and weight's gradient."""
    tokens = 0 if layout[1] else None
    dims = (1, tokens, 0) if kind == "column" else (tokens, 1, 1)
    return tuple(
        one if dim is None else one.chunk(layout[0], dim)[groups.tp_rank] for one, dim in zip(whole, dims, strict=True)
    )


def unequal_ranks() -> tuple[float, list[float]]:
    """`delayed` where rank 0 has two microbatches and rank 1 one: the worst difference of this rank's products in the
    second step from one process that had all three in both, and the scales then."""
    from nvembed_mcore.model import fp8_linear

    size = (40, 24)
    made, groups = linear("delayed", "column", size)
    truth = PlainLinear(weight_of(size), "delayed")
    for step in range(2):
        fp8_linear.begin_step([made])
        packs = packs_of(size, [9, 5, 7], seed=step)
        mine = slice(2) if groups.dp_rank == 0 else slice(2, 3)
        found = [_through(made, groups, "column", (1, False), *pack) for pack in packs[mine]]
        difference = worst(found, [truth.pack(*pack) for pack in packs][mine])
        fp8_linear.end_step([made], [groups.tp, groups.dp])
        truth.end_step()
    scales = torch.tensor([truth.scales[role] for role in fp8_linear.ROLES])
    return difference, (made.fp8.scale / scales).tolist()


def two_steps(case, evaluates: bool = False) -> dict[str, list]:
    """Losses and clip norms of two steps, and each linear's scales then; `evaluates`: embeds texts in between."""
    from nvembed_mcore.metrics import PhaseTimer
    from nvembed_mcore.model import fp8_linear
    from nvembed_mcore.schedule import embed_texts
    from tests.helpers.cases import build_step
    from tests.helpers.models import random_texts
    from tests.helpers.plain import training_batch

    step, groups, *_ = build_step(case, initializer_range=0.2)
    found: dict[str, list] = {"losses": [], "norms": [], "scales": []}
    roundings = [linear.fp8 for chunk in step.chunks for _, linear in fp8_linear.linears_of(chunk)]
    for number in (1, 2):
        output = step(training_batch(case.queries, number), number, PhaseTimer())
        found["losses"].append(output.loss)
        found["norms"].append(output.grad_norm)
        if evaluates:
            before = [one.amax_history.clone() for one in roundings]
            embed_texts(step.chunks, groups, random_texts([30, 9], 250, seed=9), case.budget)
            assert all(map(torch.equal, before, [one.amax_history for one in roundings]))
    if case.fp8 == "delayed":
        found["scales"] = [one.scale.tolist() for one in roundings]
    return found


def roundings_of_weights(case) -> tuple[int, int, int]:
    """How many linears there are, and how often a weight was rounded in each of two steps of several packs."""
    from nvembed_mcore.metrics import PhaseTimer
    from nvembed_mcore.model import fp8_linear
    from tests.helpers.cases import build_step
    from tests.helpers.plain import training_batch

    step, *_ = build_step(case)
    original, counts = fp8_linear.Fp8Rounding.both, []

    def counted(self, values, role):
        counts[-1] += role == "weight"
        return original(self, values, role)

    with mock.patch.object(fp8_linear.Fp8Rounding, "both", counted):
        for number in (1, 2):
            counts.append(0)
            assert step(training_batch(case.queries, number), number, PhaseTimer()).num_microbatches > 1
    return len([*fp8_linear.linears_of(step.chunks[0])]), *counts


def adapted_linear() -> tuple[list[str], float]:
    """The modules of an encoder with adapters that round, and how far an adapted output is from the rounded linear's
    plus the adapter's own, which is not rounded."""
    from nvembed_mcore.model import fp8_linear
    from tests.helpers.cases import Case, build_step

    step, *_ = build_step(Case(fp8="tensorwise", targets=("q", "down")))
    encoder = step.chunks[0].module
    layer = encoder.decoder.layers[0]
    linear = layer.mlp.linear_fc2
    states = torch.randn(9, 1, linear.input_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        weight, x = linear.weight, states[:, 0]
        a, b = (
            value for name, value in layer.named_parameters() if name.startswith("lora_") and name.endswith("down")
        )
        expected = plain(x, "tensorwise", "input") @ plain(weight, "tensorwise", "weight").T + 5 / 3 * x @ a.T @ b.T
        found = linear(states)[0][:, 0]
    names = [encoder.global_name(name) for name, _ in fp8_linear.linears_of(encoder)]
    return names, ((found - expected).abs().max() / expected.abs().max()).item()
