"""Whether the graphs of a whole batch fit: what a graph keeps, measured, against the memory that is free. And what was
used at most."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from megatron.core.optimizer import MegatronOptimizer

from nvembed_mcore import device
from nvembed_mcore.parallel.gather import numbers_of_all, smallest_on_all

log = logging.getLogger(__name__)

SHARE_OF_FREE = 0.7
"""Of the free memory, what kept graphs may take; the rest is for the backward pass of a pack, scores and gaps."""


def graph_bytes(forward: Callable[[], torch.Tensor], parameters: list[torch.nn.Parameter]) -> int:
    """Bytes that autograd keeps for the backward pass of `forward()`, the parameters' own not counted."""
    kept: dict[int, int] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        # Other classes are weights in FP8, which stay without a graph, too; what else is in FP8 comes in plain parts.
        if type(tensor) in (torch.Tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would hold its own graph, and never be freed

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        output = forward()  # must live until the bytes are counted: a freed storage's address is used again
    for parameter in parameters:
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    del output
    return sum(kept.values())


def _state_to_come(optimizer: MegatronOptimizer, averages: bool) -> int:
    """Bytes of the moments, 8 a parameter of this rank's shard, that the first step of a parameter allocates, and 4 of
    its average."""
    return (12 if averages else 8) * sum(
        parameter.numel()
        for chained in getattr(optimizer, "chained_optimizers", [optimizer])
        if chained.optimizer is not None
        for group in chained.optimizer.param_groups
        for parameter in group["params"]
        if not chained.optimizer.state.get(parameter)
    )


def retainable_tokens(
    forward: Callable[[], torch.Tensor],
    num_tokens: int,
    parameters: list[torch.nn.Parameter],
    optimizer: MegatronOptimizer,
    averages: bool = False,
    besides: float = 0.0,
) -> int:
    """Tokens a rank whose graphs fit into its free memory; the same on every rank, which all call this.

    Context-parallel ranks count as one: of what they share, each keeps a part.

    Args:
        forward: embeds one pack with a graph.
        num_tokens: real tokens of that pack; 0 where it holds none, whose measurement does not count.
        parameters: the model's.
        optimizer: its two moments are about to be allocated, where they are not there yet.
        averages: so is an average of the weights.
        besides: bytes that are kept for each token of the batch, whatever graphs are.
    """
    measured = graph_bytes(forward, parameters) / num_tokens + besides if num_tokens else 0.0
    state = _state_to_come(optimizer, averages)
    per_token = max(1.0, -smallest_on_all(-measured, device.current()))
    free = max(0.0, smallest_on_all(float(device.free_memory_bytes() - state), device.current()))
    tokens = int(SHARE_OF_FREE * free / per_token)
    log.info(
        "a graph keeps %.1f KB a token (measured), %.1f GB are free: graphs of up to %d tokens a rank can be kept",
        per_token / 1e3,
        free / 1e9,
        tokens,
    )
    return tokens


def peak_memory(before: int) -> dict[str, int]:
    """Of the rank that held the most at any time: which, its bytes then and before it built the model; and the mean
    of all ranks' peaks."""
    found = numbers_of_all([device.peak_memory_bytes(), before])
    rank = int(found[:, 0].argmax())
    peak, start = found[rank].tolist()
    mean = found[:, 0].mean().item()
    return {"rank": rank, "bytes": int(peak), "bytes_before_model": int(start), "mean_bytes": int(mean)}
