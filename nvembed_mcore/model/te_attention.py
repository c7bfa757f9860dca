"""Core attention with TransformerEngine's kernels, for Megatron's self-attention.

Letters: `t` tokens of a pack on this rank, `A` query heads and `G` key/value groups of this tensor rank, `d` head
width, `L` padded length of a bucket, `b` sequences in a bucket.

In bfloat16 it attends to the pack as it lies (`thd` with `cu_seqlens`, no pads), in FP8, whose backward pass the
kernels have only for sequences of one length, to padded buckets. Written against TransformerEngine 2.20
(`pytorch/attention/dot_product_attention`), whose own modules hold the rest: Megatron's wrapper adds nothing that is
needed here, and has no way to say which form is meant.

Where context-parallel ranks share the pack, their parts of keys and values go round in a ring (`p2p`), and a part is
attended to while the next one comes; what fills sequences lies between them and is hidden.

FP8 by delayed scaling, the only recipe that Hopper's kernels take, is a region of its own inside that of the linears,
so these may have any recipe. Its scales are shared by the ranks that share the linears' (the group of the region
around), and move when theirs do.
"""

from __future__ import annotations

import functools
import logging
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from nvembed_mcore import device
from nvembed_mcore.model.attention import PackedCoreAttention, Packing, pad, unpad

log = logging.getLogger(__name__)

BUCKET_MULTIPLE = 128
"""Padded lengths of FP8 buckets: a tile of the kernels, and few shapes, because cuDNN builds a graph for each."""
GRADIENT_SCALE_AT_START = 2.0**14
"""TransformerEngine begins with 1, under which gradients of a mean over many tokens are below e5m2's least number:
attention's would be lost until a history has seen them, one product after the other. Up to 3.5 fits under this one."""


def why_torch(config: TransformerConfig) -> str:
    """Why torch attends although TransformerEngine is here; empty where it does not."""
    if config.attention_dropout:
        return f"the model's attention_dropout is {config.attention_dropout}, which slows packed kernels down"
    if config.params_dtype not in (torch.bfloat16, torch.float16):
        return f"the weights are {str(config.params_dtype).removeprefix('torch.')}"
    return _why_no_ring() if config.context_parallel_size > 1 else ""


def _why_no_ring() -> str:
    """Why ranks cannot share texts by its kernels; empty where they can.

    What fills the texts lies between them. Of the kernels with `thd` only cuDNN's (and FlashAttention 3, for Hopper)
    hide that: `get_attention_backend` of release 2.20, and its `fused_attn.cpp`.
    """
    from transformer_engine.pytorch.utils import get_cudnn_version, get_device_compute_capability

    capability, cudnn = get_device_compute_capability(), get_cudnn_version()
    if capability < (9, 0):
        return f"shared texts need a GPU of compute capability 9.0, this one has {dotted(capability)}"
    if cudnn < (9, 6, 0):
        return f"shared texts need cuDNN 9.6, this one is {dotted(cudnn)}"
    return ""


def dotted(version: tuple[int, ...]) -> str:
    """As people write it: 9.0."""
    return ".".join(map(str, version))


class TransformerEngineCoreAttention(PackedCoreAttention):
    """Rotates queries and keys, then attends inside each sequence of a pack.

    Attributes:
        attention: TransformerEngine's module; None where torch computes (`why_torch`).
        is_fp8: whether products are in FP8; see fp8_attention.py.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        shares_scales: bool = True,
        **_: object,
    ) -> None:
        """
        Args:
            pg_collection: whose `tp` ranks share the heads, and whose `cp` ranks a pack; None: one rank has it all.
            shares_scales: whether FP8 scales are those of all ranks of the region around; otherwise of this one.
        """
        super().__init__(config, layer_number, attn_mask_type, attention_type)
        self.pg_collection = pg_collection
        self.is_fp8, self.attention, self._has_started = False, None, False
        if reason := why_torch(config):
            _tell(f"attention by torch instead of TransformerEngine: {reason}")
            return
        import transformer_engine.pytorch as te
        from transformer_engine.common.recipe import DelayedScaling, Format
        from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        self.attention = te.DotProductAttention(
            config.num_attention_heads,
            config.kv_channels,
            num_gqa_groups=config.num_query_groups,
            attn_mask_type=attn_mask_type.name,
            tp_size=config.tensor_model_parallel_size,
            tp_group=pg_collection.tp if pg_collection else None,
            layer_number=layer_number,
            **(_ring(pg_collection.cp) if config.context_parallel_size > 1 else {}),
        )
        self._region, self._rope, self._regions = te.autocast, apply_rotary_pos_emb, FP8GlobalStateManager
        # Several buckets go through one module, which may keep the magnitudes of the last one only: a margin of one
        # bit leaves room for twice as large ones in the others.
        self.recipe = DelayedScaling(fp8_format=Format.HYBRID, margin=1, reduce_amax=shares_scales, fp8_dpa=True)

    def twin(self) -> TransformerEngineCoreAttention:
        """Another one of its kind, to be tried out: its FP8 scales are its own."""
        mask = AttnMaskType.padding_causal if self.causal else AttnMaskType.padding
        return type(self)(self.config, 1, mask, "self", self.pg_collection, shares_scales=False)

    def region(self, *, is_fp8: bool) -> AbstractContextManager:
        """In which its module computes in FP8, or in bfloat16 whatever the linears around do."""
        group = self._regions.get_fp8_group()
        return self._region(enabled=is_fp8, recipe=self.recipe, amax_reduction_group=group)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        packed_seq_params: Packing | None = None,
    ) -> torch.Tensor:
        """query [t, A, d], key and value [t, G, d] -> [t, A * d]."""
        packing = packed_seq_params
        if self.attention is None:
            return super().forward(query, key, value, attention_mask, packed_seq_params=packing)
        query, key = (self._rotated(states, packing) for states in (query, key))
        return (self._attend_in_fp8 if self.is_fp8 else self._attend)(query, key, value, packing)

    def _rotated(self, states: torch.Tensor, packing: Packing) -> torch.Tensor:
        """As `rotary.rotate`, in one kernel, which turns in float32 by the position inside the sequence."""
        table, part = packing.rotary.table(packing.max_seqlen_q), {}
        bounds = packing.cu_seqlens_q
        if packing.context:
            bounds = packing.cu_seqlens_q_padded
            part = dict(cp_size=packing.context.split.size, cp_rank=packing.context.split.rank)
        return self._rope(states, table, tensor_format="thd", fused=True, cu_seqlens=bounds, **part)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing) -> torch.Tensor:
        """The packed form."""
        filler, shared = None, {}
        if packing.context:
            filler = packing.context.is_filler
            shared = dict(
                cu_seqlens_q_padded=packing.cu_seqlens_q_padded,
                cu_seqlens_kv_padded=packing.cu_seqlens_kv_padded,
                pad_between_seqs=filler is not None,
            )
        with self.region(is_fp8=False):
            out = self.attention(
                query,
                key,
                value.contiguous(),  # a part of the projection's output otherwise, whose layout the kernels would copy
                qkv_format="thd",
                cu_seqlens_q=packing.cu_seqlens_q,
                cu_seqlens_kv=packing.cu_seqlens_kv,
                max_seqlen_q=packing.max_seqlen_q,
                max_seqlen_kv=packing.max_seqlen_kv,
                **shared,
            )
        # The kernels leave anything there, and what is not finite would reach weights through a gradient of zero.
        return out if filler is None else out.masked_fill(filler[:, None], 0.0)

    def _attend_in_fp8(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing
    ) -> torch.Tensor:
        """The padded form."""
        padding = packing.padding(BUCKET_MULTIPLE, few_shapes=True)
        padded = (pad(states, padding) for states in (query, key, value))
        parts = []
        with self.region(is_fp8=True):
            for bucket, q, k, v in zip(padding.buckets, *padded, strict=True):
                parts.append(
                    self.attention(
                        q,
                        k,
                        v,
                        qkv_format="bshd",
                        cu_seqlens_q=bucket.bounds,
                        cu_seqlens_kv=bucket.bounds,
                        max_seqlen_q=bucket.length,
                        max_seqlen_kv=bucket.length,
                    )
                )
        self._start_gradient_scales()
        return unpad(parts, padding)

    @torch.no_grad()
    def _start_gradient_scales(self) -> None:
        """Once, and only those that no history speaks for: a resumed run goes on with its own."""
        if not self._has_started:
            self._has_started = True
            state = self.attention.fp8_meta["scaling_bwd"]
            state.scale.masked_fill_(state.amax_history.amax(dim=0) == 0, GRADIENT_SCALE_AT_START)


def _ring(group: dist.ProcessGroup) -> dict[str, object]:
    """What TransformerEngine must know of the context-parallel ranks."""
    ranks = dist.get_process_group_ranks(group)
    return dict(cp_group=group, cp_global_ranks=ranks, cp_stream=device.second_stream(), cp_comm_type="p2p")


@functools.cache
def _tell(line: str) -> None:
    """Once, not for each layer."""
    log.info("%s", line)
