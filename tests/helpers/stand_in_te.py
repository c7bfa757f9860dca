"""A small TransformerEngine on torch alone, so that what stands on it can be built, run and looked at on a CPU.

`install()` puts it where Megatron-Core imports TransformerEngine from; a process can do so only before it imports
Megatron-Core, and never undo it. Its modules compute what the real ones do; in FP8 they round weights only, each to
e4m3 under one scale: by `delayed` that of its history, otherwise from its own largest magnitude. The rules that others
rely on are those of release 2.20 (files below `transformer_engine/pytorch`): when a kept weight is used
(`module/base.py`, `quantize_weight`), what `is_first_microbatch` does to sums in `main_grad` (`module/linear.py`), and
when histories of magnitudes move (`quantization.py`, `module/linear.py`, `ops/fuser.py`). `Log` has what was done.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

E4M3_MAX, E5M2_MAX = 448.0, 57344.0


class Log:
    """What the modules did since `clear`."""

    recipes: list[Any] = []
    quantized = 0

    @classmethod
    def clear(cls) -> None:
        cls.recipes, cls.quantized = [], 0


@dataclass
class State:
    """`FP8GlobalStateManager.quantization_state`."""

    fp8_enabled: bool = False
    fp8_recipe: Any = None
    fp8_distributed_group: Any = None
    is_first_fp8_module: bool = False
    autocast_depth: int = 0
    autocast_arguments: dict = field(default_factory=dict)
    global_amax_buffer: dict = field(default_factory=dict)
    global_amax_history_buffer: dict = field(default_factory=dict)
    global_scale_buffer: dict = field(default_factory=dict)


class FP8GlobalStateManager:
    """The part of it that decides when histories move."""

    quantization_state = State()

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.quantization_state.fp8_enabled

    @classmethod
    def get_fp8_recipe(cls):
        return cls.quantization_state.fp8_recipe

    @classmethod
    def is_first_fp8_module(cls) -> bool:
        state = cls.quantization_state
        answer, state.is_first_fp8_module = state.is_first_fp8_module, False
        return answer

    @classmethod
    def add(cls, histories: list[History], recipe, group) -> None:
        state = cls.quantization_state
        for history, forward in zip(histories, (True, False), strict=True):
            key = (forward, repr(recipe), id(group))
            state.autocast_arguments[key] = (recipe, group)
            state.global_amax_buffer.setdefault(key, []).append(history.amax_history[0])
            state.global_amax_history_buffer.setdefault(key, []).append(history.amax_history)
            state.global_scale_buffer.setdefault(key, []).append(history.scale)

    @classmethod
    def reduce_and_update_fp8_tensors(cls, forward: bool = True) -> None:
        state = cls.quantization_state
        for key, magnitudes in state.global_amax_buffer.items():
            _, group = state.autocast_arguments[key]
            if key[0] != forward:
                continue
            together = torch.cat(magnitudes)
            if dist.is_initialized() and dist.get_world_size(group) > 1:
                dist.all_reduce(together, dist.ReduceOp.MAX, group=group)
            largest = E4M3_MAX if forward else E5M2_MAX
            parts = together.split([len(part) for part in magnitudes])
            for part, history, scale in zip(
                parts, state.global_amax_history_buffer[key], state.global_scale_buffer[key], strict=True
            ):
                history[0] = part
                amax = history.amax(0)
                scale.copy_(torch.where(amax > 0, largest / amax, scale))
                history.copy_(history.roll(-1, 0))
                history[0] = 0


@dataclass
class History:
    """A `DelayedScalingRecipeState`: histories float32 [steps, tensors] and scales [tensors]."""

    amax_history: torch.Tensor
    scale: torch.Tensor


class autocast:
    """A region in which modules compute by a recipe."""

    def __init__(self, enabled: bool = True, recipe=None, amax_reduction_group=None) -> None:
        self.enabled, self.recipe, self.group = enabled, recipe, amax_reduction_group

    def __enter__(self) -> None:
        state = FP8GlobalStateManager.quantization_state
        self.saved = (state.fp8_enabled, state.fp8_recipe, state.fp8_distributed_group, state.is_first_fp8_module)
        state.fp8_enabled, state.fp8_recipe, state.fp8_distributed_group = self.enabled, self.recipe, self.group
        if state.autocast_depth == 0:
            state.is_first_fp8_module = True
        state.autocast_depth += 1
        if self.enabled:
            Log.recipes.append(self.recipe)

    def __exit__(self, *_) -> None:
        state = FP8GlobalStateManager.quantization_state
        state.fp8_enabled, state.fp8_recipe, state.fp8_distributed_group, state.is_first_fp8_module = self.saved
        state.autocast_depth -= 1
        if self.enabled and state.autocast_depth == 0 and torch.is_grad_enabled():
            FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=True)


def fp8_autocast(enabled: bool = True, fp8_recipe=None, fp8_group=None) -> autocast:
    return autocast(enabled, fp8_recipe, fp8_group)


class _Recipe:
    """A recipe; like the real ones it ignores settings that it does not know."""

    is_delayed = False

    def __init__(self, **settings: Any) -> None:
        names = "fp8_format fp8_dpa fp8_mha margin amax_history_len amax_compute_algo".split()
        self.settings = {name: settings[name] for name in names if name in settings}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings})"

    def delayed(self) -> bool:
        return self.is_delayed


class DelayedScaling(_Recipe):
    is_delayed = True


class Float8CurrentScaling(_Recipe):
    pass


class Float8BlockScaling(_Recipe):
    pass


class MXFP8BlockScaling(_Recipe):
    pass


class _Stateful(torch.nn.Module):
    """A module whose state dict has a pickle beside the parameters."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(b"a pickle"), dtype=torch.uint8)

    def set_extra_state(self, state) -> None:
        raise AssertionError("a pickle is unpickled")


class RMSNorm(_Stateful):
    def __init__(self, hidden_size, eps, sequence_parallel, zero_centered_gamma, params_dtype, device) -> None:
        super().__init__()
        assert not zero_centered_gamma
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad):
            if FP8GlobalStateManager.is_first_fp8_module():
                hidden = _MovesHistories.apply(hidden)
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class SwiGLU(_Stateful):
    def forward(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        return F.silu(gate) * up


class _MovesHistories(torch.autograd.Function):
    """Of the first module in a region: its backward is that region's last."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=False)
        return grad


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, used, module, is_first):
        ctx.save_for_backward(hidden, used)
        ctx.weight, ctx.module, ctx.is_first = weight, module, is_first
        return hidden @ used.t()

    @staticmethod
    def backward(ctx, grad):
        hidden, used = ctx.saved_tensors
        module, weight = ctx.module, ctx.weight
        if module.histories:
            module.see(grad, 1, 0)
        of_weight = None
        if weight.requires_grad:
            of_weight = grad.flatten(0, -2).t() @ hidden.flatten(0, -2)
            if module.fuse_wgrad_accumulation:
                if ctx.is_first:
                    weight.main_grad.copy_(of_weight)
                else:
                    weight.main_grad.add_(of_weight)
                weight.grad_added_to_main_grad = True
                of_weight = torch.full_like(weight, float("nan"))  # nobody is to look at it
        return grad @ used, of_weight, None, None, None


class Linear(_Stateful):
    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        bias=True,
        parallel_mode=None,
        params_dtype=None,
        device=None,
        **_,
    ) -> None:
        super().__init__()
        assert tp_size == 1 and not sequence_parallel and not bias, "the stand-in knows no tensor parallelism, no bias"
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        self.weight.tensor_model_parallel = True
        self.weight.partition_dim, self.weight.partition_stride = int(parallel_mode == "row"), 1
        self.fuse_wgrad_accumulation, self.save_original_input = fuse_wgrad_accumulation, False
        self._fp8_workspaces: dict[str, tuple[torch.Tensor, bool]] = {}
        self.fp8, self.fp8_meta, self.histories, self.is_registered = False, {}, [], False

    def init_fp8_metadata(self) -> None:
        """Make the histories of the region's recipe."""
        recipe = self.fp8_meta["recipe"] = FP8GlobalStateManager.get_fp8_recipe()
        if recipe.delayed() and not self.histories:
            steps = recipe.settings["amax_history_len"]
            self.histories = [History(torch.zeros(steps, n), torch.ones(n)) for n in (3, 2)]
            self.fp8_meta |= dict(zip(("scaling_fwd", "scaling_bwd"), self.histories, strict=True))

    def see(self, tensor: torch.Tensor, which: int, place: int) -> None:
        """Count a tensor's largest magnitude in row 0 of the history of forward (0) or backward (1)."""
        row = self.histories[which].amax_history[0]
        row[place] = torch.maximum(row[place], tensor.detach().abs().max())

    def forward(self, hidden: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        self.fp8 = FP8GlobalStateManager.is_fp8_enabled()
        used = self._fp8_weight(hidden, is_first_microbatch) if self.fp8 else self.weight.detach()
        if self.fp8 and torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad):
            if FP8GlobalStateManager.is_first_fp8_module():
                hidden = _MovesHistories.apply(hidden)
        return _Product.apply(hidden, self.weight, used, self, is_first_microbatch)

    def _fp8_weight(self, hidden: torch.Tensor, is_first: bool | None) -> torch.Tensor:
        self.init_fp8_metadata()
        if self.histories:
            if not self.is_registered:
                state, self.is_registered = FP8GlobalStateManager.quantization_state, True
                FP8GlobalStateManager.add(self.histories, state.fp8_recipe, state.fp8_distributed_group)
            self.see(hidden, 0, 0)
        needs_transpose = torch.is_grad_enabled() and hidden.requires_grad
        kept = None if is_first is None else self._fp8_workspaces.get("weight")
        if kept is None or is_first or (needs_transpose and not kept[1]):
            kept = self._quantize(), needs_transpose
            if is_first is not None:
                self._fp8_workspaces["weight"] = kept
        return kept[0]

    def _quantize(self) -> torch.Tensor:
        Log.quantized += 1
        weight = self.weight.detach()
        scale = E4M3_MAX / weight.abs().max()
        if self.fp8_meta["recipe"].delayed():
            self.see(weight, 0, 1)
            scale = self.histories[0].scale[1]
        return (weight * scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(weight.dtype) / scale


def _is_available(return_reason: bool = False):
    return (True, "") if return_reason else True


def _is_mxfp8_available(return_reason: bool = False):
    reason = "Device compute capability 10.0 or higher required for MXFP8 execution."
    return (False, reason) if return_reason else False


class _Unused:
    """Something that Megatron-Core names when it is imported, and nobody here calls."""


def _module(name: str, **content: Any) -> None:
    module = sys.modules[name] = ModuleType(name)
    module.__dict__.update(content)
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)


def install() -> None:
    """Be `transformer_engine` in this process, as if there were a GPU for it."""
    assert "megatron.core" not in sys.modules and "transformer_engine" not in sys.modules
    name = "transformer_engine"
    _module(name, __version__="2.20.2")
    _module(f"{name}.common")
    formats = SimpleNamespace(E4M3="e4m3", HYBRID="hybrid")
    recipes = (DelayedScaling, Float8CurrentScaling, Float8BlockScaling, MXFP8BlockScaling)
    _module(f"{name}.common.recipe", Format=formats, **{recipe.__name__: recipe for recipe in recipes})
    unused = dict.fromkeys("LayerNorm LayerNormLinear DotProductAttention GroupedLinear".split(), _Unused)
    _module(
        f"{name}.pytorch",
        **unused,
        Linear=Linear,
        RMSNorm=RMSNorm,
        autocast=autocast,
        fp8_autocast=fp8_autocast,
        is_fp8_available=_is_available,
        is_fp8_block_scaling_available=_is_available,
        is_mxfp8_available=_is_mxfp8_available,
    )
    _module(f"{name}.pytorch.ops", SwiGLU=SwiGLU, Sequential=_Unused, FusibleOperation=_Unused)
    _module(f"{name}.pytorch.distributed", CudaRNGStatesTracker=_Unused, activation_recompute_forward=_Unused)
    _module(f"{name}.pytorch.tensor", QuantizedTensor=_Unused)
    fused = "fused_compute_score_for_moe_aux_loss fused_moe_aux_loss fused_topk_with_score_function".split()
    _module(f"{name}.pytorch.router", **dict.fromkeys(fused, _Unused))
    for module in ("fp8", "quantization"):
        _module(f"{name}.pytorch.{module}", FP8GlobalStateManager=FP8GlobalStateManager, fp8_autocast=fp8_autocast)

    from nvembed_mcore.model import backend

    backend.why_no_transformer_engine = lambda: ""
