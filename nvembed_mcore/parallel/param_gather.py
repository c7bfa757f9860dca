"""New weights that travel while the next forward pass runs (`parallel.overlap_param_gather`).

After a step Megatron's distributed optimizer leaves a data-parallel rank with its share of the new weights, and with
old ones elsewhere. A hook before each module waits for the buckets of the module's own parameters, and sends for the
bucket that comes next. Two things the hook does not know: a module that computes with the parameters of its parts
without calling them, and whoever reads weights outside a forward pass.
"""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel


def wait_for_parts(chunk: DistributedDataParallel) -> None:
    """Let modules that say `reads_parts` wait for all parameters below them, not only for their own."""

    def wait(module: torch.nn.Module, inputs: tuple) -> None:
        for parameter in module.parameters():
            # A frozen parameter has no bucket: it does not change.
            if parameter in chunk.param_to_bucket_group:
                chunk.param_to_bucket_group[parameter].finish_param_sync()

    for module in chunk.module.modules():
        if getattr(module, "reads_parts", False):
            module.register_forward_pre_hook(wait)


def finish_param_gather(chunks: list[DistributedDataParallel]) -> None:
    """Have all weights of the last step here, for who reads them outside a forward pass; every data-parallel rank
    calls this. Does nothing where weights are gathered at the end of a step.
    """
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def gather_params(chunks: list[DistributedDataParallel]) -> None:
    """Have everywhere what each data-parallel rank changed of its own share of the weights; all of them call this,
    when nothing travels (`finish_param_gather`). Does nothing where each updates all weights.
    """
    for chunk in chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            chunk.start_param_sync(force_sync=True)
