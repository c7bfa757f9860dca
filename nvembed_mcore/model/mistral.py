"""From a Hugging Face `MistralConfig` to Megatron-Core's `TransformerConfig` and layer specification."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import MistralConfig

from nvembed_mcore import device
from nvembed_mcore.apex_kernels import fused_rms_norm, why_no_fused_norm
from nvembed_mcore.config import ConfigError, ParallelConfig
from nvembed_mcore.model.attention import PackedCoreAttention
from nvembed_mcore.model.backend import Backend
from nvembed_mcore.model.config_json import read_text_config
from nvembed_mcore.model.fp8_linear import Fp8ColumnParallelLinear, Fp8RowParallelLinear

VOCABULARY_MULTIPLE = 128
"""The embedding table is padded to this multiple in every layout, so that checkpoints fit any tensor-parallel size."""
_SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()


def read_mistral_config(path: str | os.PathLike) -> MistralConfig:
    """Read a Mistral architecture from a `config.json` or the folder that holds it.

    The `text_config` of an NV-Embed folder counts too.

    Raises:
        ConfigError: there is no such file, it is no JSON object, or `mistral_config` refuses what it says.
    """
    return mistral_config(*read_text_config(path))


def mistral_config(raw: dict[str, Any], file: Path) -> MistralConfig:
    """The architecture that JSON values describe; `file`, where they stand, is for messages.

    Raises:
        ConfigError: they describe another architecture or a rotary variant, or two rotary bases; or a value is of a
            wrong type or out of range.
    """
    if raw.get("model_type") not in ("mistral", "bidir_mistral"):
        raise ConfigError(f"{file}: model_type is {raw.get('model_type')!r}, this trainer builds 'mistral'")
    try:
        config = MistralConfig.from_dict({key: value for key, value in raw.items() if key != "model_type"})
    except Exception as error:  # transformers' validators have no class of errors in common
        raise ConfigError(f"{file} is no Mistral configuration: {error}") from error
    for name in _SIZES:
        if getattr(config, name) < 1:
            raise ConfigError(f"{file}: {name} must be at least 1, got {getattr(config, name)}")
    _check_rotary(config, raw, file)
    if config.hidden_act != "silu":
        raise ConfigError(f"{file}: hidden_act is {config.hidden_act!r}, this trainer computes 'silu'")
    return config


def _check_rotary(config: MistralConfig, raw: dict[str, Any], file: Path) -> None:
    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type != "default":
        raise ConfigError(f"{file}: rope_type is {rope_type!r}, this trainer computes 'default'")
    base = config.rope_parameters.get("rope_theta")
    if type(base) not in (int, float) or not 0 < base < math.inf:
        raise ConfigError(f"{file}: rope_theta must be a finite number above 0, got {base!r}")
    bases = [raw.get("rope_theta"), (raw.get("rope_parameters") or {}).get("rope_theta")]
    if None not in bases and bases[0] != bases[1]:
        raise ConfigError(
            f"{file}: rope_theta is {bases[0]}, rope_parameters.rope_theta is {bases[1]}; they must be the same"
        )


def check_layout(hf_config: MistralConfig, parallel: ParallelConfig) -> None:
    """Raise a `ConfigError` when a dimension of the model cannot be split as the layout asks."""
    for field, size in (
        ("num_attention_heads", hf_config.num_attention_heads),
        ("num_key_value_heads", hf_config.num_key_value_heads),
        ("intermediate_size", hf_config.intermediate_size),
    ):
        if size % parallel.tp:
            raise ConfigError(f"parallel.tp = {parallel.tp} does not divide the model's {field} = {size}")
    if VOCABULARY_MULTIPLE % parallel.tp:
        raise ConfigError(f"parallel.tp = {parallel.tp} does not divide {VOCABULARY_MULTIPLE}")
    parallel.layers_of_stages(hf_config.num_hidden_layers)


def check_fp8(hf_config: MistralConfig, backend: Backend, parallel: ParallelConfig) -> None:
    """Raise a `ConfigError` when a product of the layers has a size that FP8 kernels do not take.

    Emulation takes any.
    """
    if not backend.is_fp8_in_te:
        return
    width, heads, groups = head_dim(hf_config), hf_config.num_attention_heads, hf_config.num_key_value_heads
    for what, size, parts in (
        ("hidden_size", hf_config.hidden_size, 1),
        ("intermediate_size", hf_config.intermediate_size, parallel.tp),
        ("num_attention_heads * head_dim", heads * width, parallel.tp),
        ("(num_attention_heads + 2 * num_key_value_heads) * head_dim", (heads + 2 * groups) * width, parallel.tp),
    ):
        if size // parts % backend.alignment:
            raise ConfigError(
                f"precision.fp8 is {backend.fp8!r}, which needs multiples of {backend.alignment}, but the model's "
                f"{what} on a tensor rank is {size // parts}"
            )


def head_dim(hf_config: MistralConfig) -> int:
    """Width of one attention head."""
    return hf_config.head_dim or hf_config.hidden_size // hf_config.num_attention_heads


def padded_vocabulary(hf_config: MistralConfig) -> int:
    """Rows of the embedding table with its padding."""
    return -(-hf_config.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def transformer_config(hf_config: MistralConfig, backend: Backend, parallel: ParallelConfig) -> TransformerConfig:
    """The Megatron configuration of these layers in this layout."""
    dtype, is_te = backend.dtype, backend.layers == "transformer_engine"
    is_interleaved = parallel.chunks_per_stage > 1
    # Given both where chunks are interleaved, Megatron divides by the number of stages in between: none, of two.
    last_follows = parallel.pp == 2 and parallel.layers_in_first_stage is not None
    return TransformerConfig(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        num_attention_heads=hf_config.num_attention_heads,
        num_query_groups=hf_config.num_key_value_heads,
        ffn_hidden_size=hf_config.intermediate_size,
        kv_channels=head_dim(hf_config),
        normalization="RMSNorm",
        layernorm_epsilon=hf_config.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=hf_config.attention_dropout,
        hidden_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        virtual_pipeline_model_parallel_size=parallel.chunks_per_stage if is_interleaved else None,
        num_layers_in_first_pipeline_stage=parallel.layers_in_first_stage,
        num_layers_in_last_pipeline_stage=None if last_follows else parallel.layers_in_last_stage,
        # With lengths that vary, batched messages of an interleaved schedule cross or hang.
        overlap_p2p_comm=is_interleaved,
        batch_p2p_comm=not is_interleaved,
        sequence_parallel=parallel.sequence_parallel and parallel.tp > 1,
        # Packs differ in length, so pipeline stages tell each other the shape first.
        variable_seq_lengths=parallel.pp > 1,
        # 0.16 refuses variable lengths with any other dispatcher, even where there are no experts.
        moe_token_dispatcher_type="alltoall",  # noqa: S106
        # Weights are drawn or read by name after construction, equal in every layout.
        perform_initialization=False,
        use_cpu_initialization=not device.has_cuda(),
        # Fused kernels that need Apex or TransformerEngine.
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        use_te_activation_func=is_te,
        **(_fp8_settings(backend) if backend.is_fp8_in_te else {}),
    )


def _fp8_settings(backend: Backend) -> dict[str, Any]:
    """What TransformerEngine does, in Megatron's words; its regions begin and end with the layers of a stage."""
    return dict(
        fp8_recipe=backend.fp8,
        # Where a scale is for 128 values or fewer, gradients need no wider range than e4m3 has.
        fp8="e4m3" if backend.fp8 in ("blockwise", "mxfp8") else "hybrid",
        # TransformerEngine's own defaults, other than Megatron's.
        fp8_amax_history_len=1024,
        fp8_amax_compute_algo="max",
        # Ranks that share a layer have one scale. Reduced behind every pack (Megatron's way) this would hang where
        # their numbers of packs differ; `te_layers.end_step` does it once a step.
        tp_only_amax_red=False,
    )


class RMSNorm(torch.nn.Module):
    """Root mean square norm over the last dimension, by Apex's kernel where it is installed.

    Megatron's wrapper of the torch norm refuses sequence parallelism; here the weight is marked so that its gradient
    is summed over the tensor ranks, which each see a part of the tokens.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device.current()), requires_grad=True
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        shape = (hidden.size(-1),)
        if not why_no_fused_norm():
            return fused_rms_norm()(hidden, self.weight, shape, self.eps)
        return F.rms_norm(hidden, shape, self.weight, self.eps)


def layer_specs(
    config: TransformerConfig, attention_mask: str, backend: Backend, chunk: int = 0
) -> TransformerBlockSubmodules:
    """Layers of this pipeline stage's chunk, and the norm behind the last."""
    mask = AttnMaskType.padding if attention_mask == "bidirectional" else AttnMaskType.padding_causal
    if backend.layers == "transformer_engine":
        from nvembed_mcore.model import te_layers  # only where it can be imported

        layer, norm = te_layers.layer_spec(mask), te_layers.TENorm
    else:
        layer, norm = _local_layer(mask, backend), RMSNorm
    vp_stage = chunk if config.virtual_pipeline_model_parallel_size else None
    return TransformerBlockSubmodules([layer] * get_num_layers_to_build(config, vp_stage), layer_norm=norm)


def _local_layer(mask: AttnMaskType, backend: Backend) -> ModuleSpec:
    """Megatron's local layer with our norm and packed core attention."""
    layer: ModuleSpec = get_gpt_layer_local_spec(normalization="RMSNorm")
    attention = layer.submodules.self_attention
    attention.params["attn_mask_type"] = mask
    attention.submodules.core_attention = PackedCoreAttention
    if backend.is_fp8_emulated:
        column, row = (
            ModuleSpec(linear, {"fp8": backend.fp8}) for linear in (Fp8ColumnParallelLinear, Fp8RowParallelLinear)
        )
        attention.submodules.linear_qkv, attention.submodules.linear_proj = column, row
        layer.submodules.mlp.submodules.linear_fc1, layer.submodules.mlp.submodules.linear_fc2 = column, row
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    return layer
