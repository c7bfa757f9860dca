"""Low-rank adapters (LoRA, arXiv 2106.09685) on Megatron's linears, tensor- and sequence-parallel.

Letters: `T` tokens in a pack, `H` hidden size, `F` feed-forward width, `A` query heads, `G` key/value groups, `d` head
width, `r` rank.

Hugging Face has a projection each for queries, keys, values, gate and up, and so does PEFT; Megatron has them in two
linears. Each projection keeps its own `a` [r, in] and `b` [out, r], so that adapters of either side are those of the
other, while a linear computes all of its projections' adapters in two products: the rows of all `a` one above the
other, and all `b` as blocks of one matrix whose rows have the linear's order.

An adapter adds to what its linear puts out and knows nothing else of it, so it suits every linear that takes
[T, 1, in] and returns (output, bias), as Megatron's and TransformerEngine's do, but not those with a norm inside.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from nvembed_mcore import device
from nvembed_mcore.config import LoraConfig
from nvembed_mcore.model.linears import AdaptedLinear, adapted_linears


class Adapter(torch.nn.Module):
    """Adapters of one linear's projections. `a` and `b` hold a matrix for each adapted projection, by its name.

    Of a column-parallel linear `a` is replicated and `b` is split by rows; of a row-parallel one `a` is split by
    columns and `b` is replicated. Under sequence parallelism the replicated one sees a tensor rank's tokens only, so
    its gradient is summed over tensor ranks.
    """

    reads_parts = True
    """It multiplies with its matrices without calling the dictionaries that hold them (parallel/param_gather.py)."""

    def __init__(self, linear: AdaptedLinear, lora: LoraConfig, config: TransformerConfig) -> None:
        """Uninitialised; `checkpoint.hf_import` fills it by name."""
        super().__init__()
        self.linear, self.scale, self.dropout = linear, lora.scale, lora.dropout
        self.sequence_parallel, self.tp = config.sequence_parallel, config.tensor_model_parallel_size
        inputs, parts = (linear.inputs // self.tp, 1) if linear.is_row_parallel else (linear.inputs, self.tp)
        self.local_groups = linear.groups // parts if linear.groups > 1 else 1
        self.local_rows = {name: rows // parts for name, rows in linear.rows.items()}
        self.targets = [name for name in linear.rows if name in lora.targets]
        made = dict(dtype=config.params_dtype, device=device.current())
        self.a = torch.nn.ParameterDict({name: torch.empty(lora.rank, inputs, **made) for name in self.targets})
        self.b = torch.nn.ParameterDict(
            {name: torch.empty(self.local_rows[name], lora.rank, **made) for name in self.targets}
        )
        split, whole = (self.a, self.b) if linear.is_row_parallel else (self.b, self.a)
        for parameter in split.values():
            tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, int(linear.is_row_parallel), 1)
        for parameter in whole.values():
            parameter.sequence_parallel = self.sequence_parallel

    def forward(self, states: Tensor, output: Tensor) -> Tensor:
        """`output` with the adapters' share added.

        Args:
            states: the linear's input as this tensor rank has it, [T or T / TP, 1, inputs or inputs / TP].
            output: the linear's output, [T or T / TP, 1, rows or rows / TP].
        """
        low = self._exchange(F.linear(self._drop(states), torch.cat([self.a[name] for name in self.targets])))
        flat = torch.addmm(output.flatten(0, -2), low.flatten(0, -2), self._blocks().T, alpha=self.scale)
        return flat.view_as(output)

    def _drop(self, states: Tensor) -> Tensor:
        if not (self.training and self.dropout):
            return states
        # Tensor ranks that hold the same states must drop the same, from the generator that they have in common; those
        # that hold parts of them must not, and draw from Megatron's tracker.
        is_part = self.linear.is_row_parallel or self.sequence_parallel
        with get_cuda_rng_tracker().fork() if is_part else nullcontext():
            return F.dropout(states, self.dropout)

    def _exchange(self, low: Tensor) -> Tensor:
        """`a x` as `b` needs it, [T or T / TP, 1, r of each projection]; r is small, so this is cheap to send."""
        if self.tp == 1:
            return low
        if self.linear.is_row_parallel:
            # Each rank has a part of the sum over the inputs.
            if self.sequence_parallel:
                return tensor_parallel.reduce_scatter_to_sequence_parallel_region(low)
            return tensor_parallel.reduce_from_tensor_model_parallel_region(low)
        # Each rank has its own rows of `b`, so the gradients of `a x` are summed on the way back.
        if self.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(low)
        return tensor_parallel.copy_to_tensor_model_parallel_region(low)

    def _blocks(self) -> Tensor:
        """All `b` in the order of the linear's rows, [local rows, r of each projection]; zeros elsewhere."""
        number = len(self.targets)
        if number == len(self.local_rows) == 1:
            return self.b[self.targets[0]]
        sample = self.b[self.targets[0]]
        rank = sample.size(1)
        parts = []
        for name, rows in self.local_rows.items():
            if name in self.targets:
                place = self.targets.index(name)
                part = F.pad(self.b[name], (place * rank, (number - 1 - place) * rank))
            else:
                part = sample.new_zeros(rows, number * rank)
            parts.append(part.unflatten(0, (self.local_groups, -1)))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """For Megatron's distributed checkpoints."""
        split, axis = ("a", 1) if self.linear.is_row_parallel else ("b", 0)
        axes = {f"{split}.{name}": axis for name in self.targets}
        state = self.state_dict(keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)


def attach_adapters(layers: torch.nn.ModuleList, lora: LoraConfig, config: TransformerConfig) -> None:
    """Give layers adapters, `lora_linear_qkv` and so on beside their sub-blocks.

    They stand in the layer itself, not in the linear, whose parameters and checkpoint names stay what they are.
    """
    linears = adapted_linears(
        config.hidden_size,
        config.ffn_hidden_size,
        config.num_attention_heads,
        config.num_query_groups,
        config.kv_channels,
    )
    for layer in layers:
        for linear in linears:
            if set(linear.rows) & set(lora.targets):
                adapter = Adapter(linear, lora, config)
                layer.add_module(f"lora_{linear.name}", adapter)
                add_to_output(layer.get_submodule(linear.path), adapter)


def add_to_output(module: torch.nn.Module, adapter: Adapter) -> None:
    """Let a linear that returns (output, bias) return what its adapter makes of the output."""
    assert not hasattr(module, "layer_norm_weight"), "a linear with a norm in it gets states that the adapter must not"

    def add(module: torch.nn.Module, inputs: tuple[Tensor], result: tuple[Tensor, Tensor | None]):
        output, bias = result
        return adapter(inputs[0], output), bias

    module.register_forward_hook(add)
