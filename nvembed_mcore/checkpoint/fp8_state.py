"""What a checkpoint keeps of delayed scaling: the histories and scales of every linear, as plain tensors.

All ranks that share a layer have the same ones, so they load into any layout. A run that had none, because it began
without FP8 or with another recipe or backend, goes on with empty ones; so do those of FP8 attention, always.
"""

from __future__ import annotations

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import get_fp8_context
from torch import Tensor

from nvembed_mcore.model import fp8_linear
from nvembed_mcore.model.encoder import Encoder

MARK = "._extra_state."
"""In their names in a checkpoint. `reader` lets tensors of such names be missing, or be there for nobody."""


def sharded_state(chunk: DistributedDataParallel) -> dict[str, ShardedTensor]:
    """A chunk's histories and scales as `dist_checkpointing` takes them, by name; none without delayed scaling."""
    replica = (0, chunk.tp_group.rank(), chunk.dp_cp_group.rank())
    found = histories_of(chunk.module)
    return {name: ShardedTensor.from_rank_offsets(name, one, replica_id=replica) for name, one in found.items()}


def load(chunk: DistributedDataParallel, state: dict[str, Tensor]) -> None:
    """Fill them with what a checkpoint had."""
    with torch.no_grad():
        for name, tensor in histories_of(chunk.module).items():
            if name in state:
                tensor.copy_(state[name])


def histories_of(encoder: Encoder) -> dict[str, Tensor]:
    """The tensors themselves, by name: `amax_history` [steps, tensors] and `scale` [tensors] of each linear, float32.

    TransformerEngine has a pair for forward (input, weight, output) and one for backward (gradients of output and
    input); emulation has one (input, weight, gradient of output).
    """
    if encoder.backend.fp8 != "delayed":
        return {}
    if encoder.backend.is_fp8_emulated:
        states = {name: linear.fp8 for name, linear in fp8_linear.linears_of(encoder)}
        return _named(encoder, states, "")
    forward, backward = ({}, {})
    for name, linear in _transformer_engine_linears(encoder).items():
        forward[name], backward[name] = (linear.fp8_meta[key] for key in ("scaling_fwd", "scaling_bwd"))
    return _named(encoder, forward, "forward.") | _named(encoder, backward, "backward.")


def _transformer_engine_linears(encoder: Encoder) -> dict[str, torch.nn.Module]:
    """By name, with the histories that a linear otherwise makes in its first forward."""
    from nvembed_mcore.model import te_layers  # only where it can be imported

    linears = {*te_layers.linears_of(encoder)}
    with te_layers.histories_kept(), get_fp8_context(encoder.config):
        for linear in linears:
            linear.init_fp8_metadata()
    return {name: module for name, module in encoder.named_modules() if module in linears}


def _named(encoder: Encoder, states: dict[str, object], prefix: str) -> dict[str, Tensor]:
    return {
        f"{encoder.global_name(name)}{MARK}{prefix}{what}": getattr(state, what)
        for name, state in states.items()
        for what in ("amax_history", "scale")
    }
