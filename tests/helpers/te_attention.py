"""TransformerEngine's attention on torch alone, to prove on a CPU what is handed to it and taken from it.

It asserts what the real modules (release 2.20, `transformer_engine/pytorch/attention`) assert or silently rely on, and
leaves NaN where they leave anything: at pads, in states and gradients.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

DO = 2
"""Number of the output gradient among the scales of backward (`FP8BwdTensorIdx.GRAD_INPUT2`)."""
CUDNN, CAPABILITY = (9, 19, 0), (9, 0)


@dataclass(frozen=True)
class DelayedScaling:
    fp8_format: str = "HYBRID"
    margin: int = 0
    reduce_amax: bool = True
    fp8_dpa: bool = False


class FP8GlobalStateManager:
    """What regions say of themselves."""

    region: tuple[bool, Any, Any] = (False, None, None)

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.region[0]

    @classmethod
    def get_fp8_recipe(cls):
        return cls.region[1]

    @classmethod
    def get_fp8_group(cls):
        return cls.region[2]


class autocast:
    """A region."""

    def __init__(self, enabled: bool = True, calibrating: bool = False, recipe=None, amax_reduction_group=None):
        self.region = (enabled, recipe, amax_reduction_group)

    def __enter__(self) -> None:
        self.outer, FP8GlobalStateManager.region = FP8GlobalStateManager.region, self.region

    def __exit__(self, *_) -> None:
        FP8GlobalStateManager.region = self.outer


def apply_rotary_pos_emb(states, freqs, tensor_format="sbhd", *, fused=False, cu_seqlens=None):
    """Row `i` of `freqs` [rows, 1, 1, d] turns token `i` of each sequence."""
    assert tensor_format == "thd" and fused and cu_seqlens.dtype == torch.int32 and freqs.dtype == torch.float32
    lengths = cu_seqlens.diff().tolist()
    assert freqs.size(0) >= max(lengths), "the kernel would read behind the table"
    angles = torch.cat([freqs[:length, 0] for length in lengths])
    first, second = states.chunk(2, dim=-1)
    turned = states * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
    return turned.to(states.dtype).contiguous()


class _Pads(torch.autograd.Function):
    """NaN at pads, in the gradient (`backward`) or in the states."""

    @staticmethod
    def forward(ctx, states, is_token, on_the_way_back):
        ctx.is_token, ctx.on_the_way_back = is_token, on_the_way_back
        return states.clone() if on_the_way_back else states.masked_fill(~is_token, torch.nan)

    @staticmethod
    def backward(ctx, grad):
        if not ctx.on_the_way_back:
            assert not grad[~ctx.is_token.expand_as(grad)].any(), "a pad's gradient must be zero"
            return grad, None, None
        return grad.masked_fill(~ctx.is_token, torch.nan), None, None


class _GradientRounded(torch.autograd.Function):
    """The output gradient in e5m2 under the scale that is there when backward comes."""

    @staticmethod
    def forward(ctx, states, module):
        ctx.module = module
        return states.clone()

    @staticmethod
    def backward(ctx, grad):
        scale = ctx.module.fp8_meta["scaling_bwd"].scale[DO]
        return (grad * scale).clamp(-57344, 57344).to(torch.float8_e5m2).to(grad.dtype) / scale, None


class DotProductAttention(torch.nn.Module):
    """The real one's constructor and `forward`, as far as they are used."""

    calls: list[SimpleNamespace] = []

    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        tp_size=1,
        tp_group=None,
        layer_number=None,
    ) -> None:
        super().__init__()
        assert attn_mask_type in ("padding", "padding_causal") and attention_dropout == 0.0
        self.mask, self.width, self.fp8_meta = attn_mask_type, kv_channels, {}
        self.heads, self.groups = num_attention_heads // tp_size, num_gqa_groups // tp_size

    def forward(
        self,
        query,
        key,
        value,
        attention_mask=None,
        qkv_format=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
    ):
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager as regions

        recipe = regions.get_fp8_recipe()
        is_fp8 = regions.is_fp8_enabled() and recipe.fp8_dpa
        lengths, states = cu_seqlens_q.diff(), (query, key, value)
        self._check(states, qkv_format, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv)
        self.calls.append(
            SimpleNamespace(
                shape=tuple(query.shape), is_fp8=is_fp8, recipe=recipe, group=regions.get_fp8_group(), lengths=lengths
            )
        )
        if is_fp8:
            if qkv_format == "thd" or self.width != 128:
                raise ValueError("No dot product attention backend is available for the provided inputs.")
            if not self.fp8_meta:
                for name, count in (("scaling_fwd", 9), ("scaling_bwd", 6)):
                    state = SimpleNamespace(scale=torch.ones(count), amax_history=torch.zeros(4, count))
                    self.fp8_meta[name] = state
        if qkv_format == "thd":
            return self._attend(*(one.split(lengths.tolist()) for one in states)).flatten(1)
        is_token = (torch.arange(max_seqlen_q)[None] < lengths[:, None])[..., None]
        states = [_Pads.apply(one, is_token[..., None], True) for one in states]
        parts = ([row[:length] for row, length in zip(one, lengths, strict=True)] for one in states)
        tokens = self._attend(*parts).flatten(1)
        tokens = _GradientRounded.apply(tokens, self) if is_fp8 else tokens
        rows = [F.pad(row, (0, 0, 0, max_seqlen_q - len(row))) for row in tokens.split(lengths.tolist())]
        return _Pads.apply(torch.stack(rows), is_token, False)

    def _check(self, states, qkv_format, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv) -> None:
        query, key, value = states
        lengths = cu_seqlens_q.diff()
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_kv)
        assert lengths.min() >= 1, "the kernels hang on an empty row"
        assert cu_seqlens_q[0] == 0 and lengths.max() <= max_seqlen_q == max_seqlen_kv
        assert query.shape[-2:] == (self.heads, self.width) and key.shape == value.shape
        assert key.shape[:-2] == query.shape[:-2] and key.shape[-2:] == (self.groups, self.width)
        for one in states:
            # `get_qkv_layout` tells layouts from strides and offsets, and refuses what it does not know.
            assert one.is_contiguous() and one.storage_offset() == 0 and one.dtype == query.dtype
        assert len({one.untyped_storage().data_ptr() for one in states}) == 3
        if qkv_format == "thd":
            assert query.dim() == 3 and cu_seqlens_q[-1] == len(query), "no pads, and none behind"
        else:
            assert qkv_format == "bshd" and query.dim() == 4 and query.shape[:2] == (len(lengths), max_seqlen_q)

    def _attend(self, queries, keys, values):
        out = []
        for q, k, v in zip(queries, keys, values, strict=True):
            q, k, v = (one.transpose(0, 1) for one in (q, k, v))
            k, v = (one.repeat_interleave(self.heads // self.groups, dim=0) for one in (k, v))
            scores = q @ k.transpose(1, 2) / self.width**0.5
            if self.mask == "padding_causal":
                scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
            out.append((scores.softmax(dim=-1) @ v).transpose(0, 1))
        return torch.cat(out)


def install(
    patch: pytest.MonkeyPatch,
    *,
    cudnn=CUDNN,
    capability=CAPABILITY,
    attention=DotProductAttention,
    rope=apply_rotary_pos_emb,
) -> None:
    """Let imports of TransformerEngine find this, until the patch is undone. Import Megatron-Core before."""
    contents = {
        "": {},
        ".pytorch": {"DotProductAttention": attention, "autocast": autocast},
        ".common.recipe": {"DelayedScaling": DelayedScaling, "Format": SimpleNamespace(HYBRID="HYBRID")},
        ".pytorch.attention.rope": {"apply_rotary_pos_emb": rope},
        ".pytorch.quantization": {"FP8GlobalStateManager": FP8GlobalStateManager},
        ".pytorch.utils": {
            "get_cudnn_version": lambda: cudnn,
            "get_device_compute_capability": lambda: capability,
        },
    }
    for name, content in contents.items():
        module = ModuleType(f"transformer_engine{name}")
        vars(module).update(content)
        patch.setitem(sys.modules, module.__name__, module)
    patch.setattr(
        sys.modules["transformer_engine"], "pytorch", sys.modules["transformer_engine.pytorch"], raising=False
    )
    patch.setattr(DotProductAttention, "calls", [])
