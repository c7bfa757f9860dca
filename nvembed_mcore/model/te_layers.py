"""Megatron's layers with TransformerEngine's modules, and its FP8 over a step of several packs.

Only imported where TransformerEngine can be. Written against its release 2.20 and Megatron-Core 0.16.

Norms are modules of their own. TransformerEngine also has linears with the norm inside, which give the norm's output
to nobody; but an adapter (`lora.py`) reads what its linear reads, and parameters are to be named as in local layers.

FP8 weights. A linear keeps its weight in FP8 beside the weight itself. TransformerEngine makes it anew in each forward
that is told to be the first of a step, and takes that forward's backward for the first one, too: with sums that go
straight into `main_grad` it overwrites what is there. Packs go backward in another order than forward (`step.py`), so
no forward is called the first here. An FP8 weight is made where there is none, and dropped (`forget_fp8_weights`) when
the weight has changed: once a step where it trains, and never where it is frozen. One made in a forward without a
graph lacks what backward needs; the first forward with a graph makes it once more, of the same values (one in blocks
of 128 x 128 is kept, and transposed in backward).

Delayed scaling. TransformerEngine moves the histories of largest magnitudes behind each forward with a graph and each
backward, and reduces them over ranks there: ranks with different numbers of packs would wait for one another, and the
second phase of `cached` would round otherwise than the first. Here they move once a step (`end_step`), the same on all
ranks that share a layer. Until then each tensor's largest magnitude gathers over all packs, which the kernels do by
themselves (`atomicMaxFloat`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformer_engine.pytorch as te
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm, TERowParallelLinear
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from transformer_engine.pytorch.quantization import FP8GlobalStateManager

from nvembed_mcore.model.te_attention import TransformerEngineCoreAttention

NORM_IN_CHECKPOINTS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
"""Megatron's checkpoints name a norm by the linear that it stands before, whether it is inside or not."""


class _KeepsFp8Weight:
    """A linear whose FP8 weight is made anew only after it was forgotten.

    Attributes:
        has_first_scale: whether delayed scaling has yet to see the weight behind the scale that it is rounded with.
    """

    has_first_scale = True

    @property
    def is_first_microbatch(self) -> bool:
        """Megatron's linears hand this to TransformerEngine's."""
        return False

    @is_first_microbatch.setter
    def is_first_microbatch(self, value: bool) -> None:
        """Megatron's schedule says so at the start of each phase, when the weights are still the same."""


class ColumnParallelLinear(_KeepsFp8Weight, TEColumnParallelLinear):
    """`TEColumnParallelLinear`, with its FP8 weight kept."""


class RowParallelLinear(_KeepsFp8Weight, TERowParallelLinear):
    """`TERowParallelLinear`, with its FP8 weight kept."""


class SwiGLU(te.ops.SwiGLU):
    """silu(gate) * up of [..., gate then up], forward and backward in one kernel each."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def sharded_state_dict(self, *_: object, **__: object) -> dict:
        """Nothing: Megatron's feed-forward block asks each of its modules."""
        return {}


def layer_spec(mask: AttnMaskType) -> ModuleSpec:
    """One layer, with parameters and checkpoint names as in Megatron's local layers."""
    attention = ModuleSpec(
        SelfAttention,
        params={"attn_mask_type": mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=TransformerEngineCoreAttention,
            linear_proj=RowParallelLinear,
        ),
    )
    feed_forward = ModuleSpec(
        MLP,
        submodules=MLPSubmodules(
            linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear, activation_func=SwiGLU
        ),
    )
    return ModuleSpec(
        TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=TENorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=TENorm,
            mlp=feed_forward,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=NORM_IN_CHECKPOINTS,
        ),
    )


def linears_of(model: torch.nn.Module) -> Iterator[te.Linear]:
    """The linears of a model's layers."""
    return (module for module in model.modules() if isinstance(module, _KeepsFp8Weight))


def forget_fp8_weights(model: torch.nn.Module, *, frozen: bool) -> None:
    """Weights have changed: their FP8 form is made anew when it is next needed.

    Args:
        frozen: those that do not train, too.
    """
    for linear in linears_of(model):
        if frozen or linear.weight.requires_grad:
            linear._fp8_workspaces.clear()
            linear.has_first_scale = True


def sum_into_main_grad(model: torch.nn.Module) -> None:
    """Let the products that make weight gradients add to Megatron's float32 buffers, which `model`'s weights have.

    Otherwise each is rounded to the weight's type and added by another kernel.
    """
    for linear in linears_of(model):
        linear.fuse_wgrad_accumulation = True


@contextmanager
def histories_kept() -> Iterator[None]:
    """No layer moves a history of delayed scaling inside."""
    # Histories of forward move at the end of the outermost region, if that is in FP8, which this one is not; those of
    # gradients in the backward of the first module to ask whether it is the first. Regions inside change neither.
    with te.autocast(enabled=False):
        FP8GlobalStateManager.is_first_fp8_module()
        yield


def begin_step(models: list[torch.nn.Module]) -> None:
    """Before the first forward of an optimizer step: what an evaluation since the last one rounded is not to count."""
    for magnitudes in FP8GlobalStateManager.quantization_state.global_amax_buffer.values():
        torch._foreach_zero_(magnitudes)
    for model in models:
        forget_fp8_weights(model, frozen=False)  # so that their magnitudes are seen in every step


@torch.no_grad()
def end_step(models: list[torch.nn.Module]) -> None:
    """After the optimizer's step: trained weights have changed, and the histories of delayed scaling move by one.

    All ranks that share these layers call this once a step, however many packs each of them had.
    """
    for forward in (True, False):
        FP8GlobalStateManager.reduce_and_update_fp8_tensors(forward=forward)
    for model in models:
        forget_fp8_weights(model, frozen=False)
        for linear in linears_of(model):
            # A frozen weight gets its scale from the step in which it is first seen, and keeps it.
            if linear.has_first_scale and linear.fp8 and linear.fp8_meta["recipe"].delayed():
                linear._fp8_workspaces.clear()
            linear.has_first_scale = linear.weight.requires_grad
