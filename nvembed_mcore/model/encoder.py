"""The encoder: embedding, this stage's Mistral layers, and on the last stage the pooling head.

Letters: `T` tokens in a pack, `t` of them on a context-parallel rank (all, where there is one), `H` hidden size, `B`
texts of the pack.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor
from torch.nn.functional import normalize
from transformers import MistralConfig

from nvembed_mcore import device
from nvembed_mcore.config import ModelConfig, ParallelConfig, PoolingConfig, PrecisionConfig
from nvembed_mcore.data.packing import Pack
from nvembed_mcore.model import fp8_attention, fp8_step
from nvembed_mcore.model.attention import Packing, packing_of
from nvembed_mcore.model.backend import choose
from nvembed_mcore.model.layer_summaries import LayerSummaries, watch_layers
from nvembed_mcore.model.lora import attach_adapters
from nvembed_mcore.model.mistral import (
    check_fp8,
    check_layout,
    head_dim,
    layer_specs,
    padded_vocabulary,
    transformer_config,
)
from nvembed_mcore.model.pooling import build_head, pool, segment_sum, weights_of
from nvembed_mcore.model.rotary import RotaryTable
from nvembed_mcore.parallel.gather import sum_over_context
from nvembed_mcore.parallel.groups import Groups
from nvembed_mcore.parallel.param_gather import wait_for_parts


class Encoder(MegatronModule):
    """One pipeline stage, or one chunk of it, of a bidirectional Mistral encoder with a pooling head.

    Hidden states inside are Megatron's [t, 1, H] (a pack is one long sequence of batch size 1); under sequence
    parallelism each tensor rank holds t / TP of the rows.
    """

    behind_embedding: Callable[[Tensor, Tensor, int], Tensor] | None = None
    """Gets this rank's embedded tokens [t or t / TP, 1, H], their sequences and how many of these there are; what it
    returns goes on instead (adversarial.py)."""

    def __init__(
        self,
        hf_config: MistralConfig,
        model: ModelConfig,
        parallel: ParallelConfig,
        groups: Groups,
        *,
        precision: PrecisionConfig | None = None,
        chunk: int = 0,
        temperature: float | None = None,
    ) -> None:
        """Build with uninitialised weights; `checkpoint.hf_import` fills them by name.

        Args:
            precision: data types; None: the default ones.
            chunk: number of the chunk in its stage (interleaved stages have several).
            temperature: where a learned temperature starts; None: it is not learned.

        Raises:
            ConfigError: the layout does not divide the model's heads, groups, feed-forward width or layers; or the
                layers cannot be computed here as `model.backend` and `precision` ask.
        """
        check_layout(hf_config, parallel)
        self.backend = choose(model, precision or PrecisionConfig(), parallel.cp)
        check_fp8(hf_config, self.backend, parallel)
        config = transformer_config(hf_config, self.backend, parallel)
        super().__init__(config)
        # Asked for by Megatron's schedule and by its gradient finalisation.
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.pre_process = groups.is_first_stage and chunk == 0
        self.post_process = groups.is_last_stage and chunk == parallel.chunks_per_stage - 1
        self.reads_layers = model.pooling.kind == "multi_layer"
        is_last = model.pooling.kind == "last" or (self.reads_layers and model.attention_mask == "causal")
        self.pooled_tokens = "last" if is_last else "mean"
        self.groups = groups
        if self.pre_process:
            self.embedding = LanguageModelEmbedding(
                config,
                vocab_size=padded_vocabulary(hf_config),
                max_sequence_length=hf_config.max_position_embeddings,
                position_embedding_type="rope",
                tp_group=groups.tp,
            )
        self.rotary = RotaryTable(head_dim(hf_config), hf_config.rope_parameters["rope_theta"])
        self.decoder = self._layers(model, groups, chunk)
        self._mark_sharded_weights()
        if self.backend.fp8_attention == "on":
            fp8_attention.require(self)
        if model.adapters:
            # Before the head is there, which trains whole.
            self.requires_grad_(False)
            attach_adapters(self.decoder.layers, model.adapters, config)
        if self.reads_layers:
            watch_layers(self.decoder.layers, config.num_layers)
        self.pooling = self._head(model.pooling) if self.post_process else None
        self.log_scale = None
        if temperature is not None and self.post_process:
            # float32 in every precision: its steps are smaller than what bfloat16 can tell apart.
            self.log_scale = torch.nn.Parameter(torch.tensor([-math.log(temperature)], device=device.current()))

    def _layers(self, model: ModelConfig, groups: Groups, chunk: int) -> TransformerBlock:
        return TransformerBlock(
            self.config,
            layer_specs(self.config, model.attention_mask, self.backend, chunk),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=groups.collection,
            vp_stage=chunk if self.config.virtual_pipeline_model_parallel_size else None,
        )

    def _head(self, pooling: PoolingConfig) -> torch.nn.Module | None:
        with torch.device("meta"):  # torch would draw three gigabytes for NV-Embed's head, to be written over
            head = build_head(self.config.hidden_size, pooling, self.config.num_layers)
        if head is not None:
            make = functools.partial(torch.empty_like, dtype=self.config.params_dtype, device=device.current())
            for module in head.modules():
                for name, empty in [*module.named_parameters(recurse=False)]:
                    parameter = torch.nn.Parameter(make(empty))
                    # Where a rank sees only its shard of the tokens, the gradients are summed over tensor ranks.
                    parameter.sequence_parallel = self.config.sequence_parallel and not head.needs_whole_texts
                    setattr(module, name, parameter)
        return head

    def _mark_sharded_weights(self) -> None:
        """Tell the clip norm which weights are parts: Megatron does so only when it draws them itself."""
        sharded_dim = {
            tensor_parallel.VocabParallelEmbedding: 0,
            tensor_parallel.ColumnParallelLinear: 0,
            tensor_parallel.RowParallelLinear: 1,
        }
        for module in self.modules():
            for kind, dim in sharded_dim.items():
                if isinstance(module, kind):
                    tensor_parallel.set_tensor_model_parallel_attributes(module.weight, True, dim, 1)

    def load_state_dict(self, *args: Any, **named: Any) -> Any:
        """As torch's; what layers in FP8 keep of their weights is made anew."""
        result = super().load_state_dict(*args, **named)
        fp8_step.forget_weights(self)
        return result

    def set_input_tensor(self, tensor: Tensor | list[Tensor]) -> None:
        """Called by Megatron's schedule with the previous stage's output."""
        self.decoder.set_input_tensor(tensor[0] if isinstance(tensor, list) else tensor)

    def parameters_by_global_name(self) -> dict[str, torch.nn.Parameter]:
        """This rank's parameters, with layers numbered over all pipeline stages from 0."""
        return {self.global_name(name): parameter for name, parameter in self.named_parameters()}

    def local_names(self, global_names: set[str]) -> set[str]:
        """Names in this stage's state dict of those of its parameters that are among `global_names`."""
        return {name for name, _ in self.named_parameters() if self.global_name(name) in global_names}

    def global_name(self, name: str) -> str:
        """Of a parameter or module of this stage, with its layer numbered so."""
        prefix = "decoder.layers."
        if not name.startswith(prefix):
            return name
        number, rest = name.removeprefix(prefix).split(".", 1)
        return f"{prefix}{self.decoder.layers[int(number)].layer_number - 1}.{rest}"

    def forward(self, pack: Pack) -> Tensor:
        """Hidden states [t or t / TP, 1, H] for the next stage; on the last stage unit vectors, float32 [B, H].

        With `multi_layer` pooling, summaries of the layers so far stand behind the hidden states.
        """
        packing = packing_of(pack.lengths, device.current(), pack.split, self.groups.cp)
        packing.rotary = self.rotary(packing.position_ids)
        hidden = None
        if self.pre_process:
            hidden = self.embedding(torch.as_tensor(pack.token_ids).to(device.current())[None], None)
            if self.behind_embedding is not None:
                segments = self._of_rank(packing.segment_ids, self.config.sequence_parallel)
                hidden = self.behind_embedding(hidden, segments, len(pack.lengths))
        if self.reads_layers:
            weights = self._weights(pack, packing, self.config.sequence_parallel)
            packing.summaries = LayerSummaries(*weights, len(pack.lengths))
            if not self.pre_process:
                self.set_input_tensor(packing.summaries.take_from(self.decoder.input_tensor))
        with fp8_step.forward_region(self.backend):
            hidden = self.decoder(hidden, None, rotary_pos_emb=None, packed_seq_params=packing)
        if self.post_process:
            return self._pool(hidden[:, 0], pack, packing)
        return packing.summaries.append_to(hidden) if self.reads_layers else hidden

    def _weights(self, pack: Pack, packing: Packing, is_sharded: bool) -> tuple[Tensor, Tensor]:
        """Weight and sequence of each token of the pack, or of this rank's part of them."""
        weights = weights_of(pack.lengths, pack.pooled_from, self.pooled_tokens, pack.split)
        weights = torch.as_tensor(weights).to(device.current())
        return self._of_rank(weights, is_sharded), self._of_rank(packing.segment_ids, is_sharded)

    def _of_rank(self, values: Tensor, is_sharded: bool) -> Tensor:
        """Those of this tensor rank's tokens, of [t] values, where tensor ranks have a part each."""
        if not is_sharded:
            return values
        size = len(values) // self.config.tensor_model_parallel_size
        return values[self.groups.tp_rank * size : (self.groups.tp_rank + 1) * size]

    def _pool(self, states: Tensor, pack: Pack, packing: Packing) -> Tensor:
        """This rank's token states [t or t / TP, H] -> unit vectors, float32 [B, H]."""
        if self.reads_layers:
            return normalize(self._pool_layers(states, pack, packing)[: pack.num_texts], dim=-1)
        is_sharded = self.config.sequence_parallel
        if is_sharded and self.pooling is not None and self.pooling.needs_whole_texts:
            # Every tensor rank then computes the same, so its backward must not sum their gradients.
            states = tensor_parallel.gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=False)
            is_sharded = False
        if self.pooling is not None:
            states = self.pooling(states, packing)
        tokens = (states, *self._weights(pack, packing, is_sharded), len(pack.lengths))
        if not is_sharded and self.groups.cp_size == 1:
            return pool(*tokens)[: pack.num_texts]
        pooled = sum_over_context(segment_sum(*tokens), self.groups)
        if is_sharded:
            # Forward sums the shards; backward is the identity, since every tensor rank goes on with the same vector.
            pooled = tensor_parallel.reduce_from_tensor_model_parallel_region(pooled)
        return normalize(pooled[: pack.num_texts], dim=-1)

    def _pool_layers(self, states: Tensor, pack: Pack, packing: Packing) -> Tensor:
        """Token states of the last layer, and the summaries of those before -> vectors, float32 [B, H]."""
        packing.summaries.add(states)
        summaries = torch.stack(packing.summaries.layers)
        if self.groups.cp_size > 1:
            summaries = sum_over_context(summaries.float(), self.groups).to(states.dtype)
        if self.config.sequence_parallel:
            # As above: every tensor rank goes on alike, so the head's gradients must not be summed over them.
            summaries = tensor_parallel.reduce_from_tensor_model_parallel_region(summaries.float()).to(states.dtype)
        # A dummy goes in only where there is no text, so that the head's weights still get their gradient, zero.
        return self.pooling(summaries[:, : max(1, pack.num_texts)])


def wrap_data_parallel(
    encoders: list[Encoder], parallel: ParallelConfig, *, distributed_optimizer: bool
) -> list[DistributedDataParallel]:
    """Megatron's data parallelism around each chunk: float32 gradient buffers, reduced once a step."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather and distributed_optimizer,
        bucket_size=parallel.bucket_size,
    )
    chunks = [DistributedDataParallel(encoder.config, config, encoder) for encoder in encoders]
    if encoders[0].backend.layers == "transformer_engine":
        from nvembed_mcore.model import te_layers

        for encoder in encoders:
            te_layers.sum_into_main_grad(encoder)
    for chunk in chunks:
        if config.overlap_param_gather:
            wait_for_parts(chunk)
        # Megatron's schedules read these from the configuration of the first chunk.
        chunk.config.finalize_model_grads_func = finalize_model_grads
        chunk.config.no_sync_func = [one.no_sync for one in chunks] if len(chunks) > 1 else chunk.no_sync
    return chunks
