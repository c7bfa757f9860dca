"""An exponential moving average of the trained weights (`optim.ema_decay`), for evaluation and export.

After step `t`, counted from 1,

    average_1 = w_1        average_t = d_t average_{t-1} + (1 - d_t) w_t        d_t = min(decay, (1 + t) / (10 + t))

so that it spans about a ninth of the steps so far until that is 1 / (1 - decay) of them; otherwise the average of a
short run would be made of its first weights. TensorFlow's `ExponentialMovingAverage` has the same warm-up; a decay of
0.999, which it is often used with, is reached after 8990 steps.

It is in float32, of the optimizer's own float32 weights, and lies beside its moments: a third number for each of them,
sharded as they are (4 bytes a trained parameter, over the data-parallel ranks with `optim.distributed`). Checkpoints
keep it as they keep the moments, in a form that loads into any layout. Frozen weights are their own average.

To be evaluated the averages change places with the weights, where these lie: there is no second model, and what the
optimizer goes on with comes back with the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer

from nvembed_mcore.checkpoint.optimizer_state import AVERAGE, trained
from nvembed_mcore.model import fp8_step
from nvembed_mcore.parallel.param_gather import finish_param_gather, gather_params

log = logging.getLogger(__name__)


def decay_of(decay: float, step: int) -> float:
    """What of the average stays in step number `step`, counted from 1."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_average(optimizer: ChainedOptimizer, decay: float, step: int) -> None:
    """Count the weights after step number `step`. Each rank does so for what it updates; nothing is sent."""
    averages, mains = [], []
    for one in optimizer.chained_optimizers:
        # A pipeline stage without trained weights has none.
        for main, state in {} if one.is_stub_optimizer else one.optimizer.state.items():
            if AVERAGE in state:
                averages.append(state[AVERAGE])
                mains.append(main)
            else:
                state[AVERAGE] = main.detach().clone()
    if averages:
        torch._foreach_lerp_(averages, mains, 1 - decay_of(decay, step))


@contextmanager
def averaged_weights(chunks: list[DistributedDataParallel], optimizer: ChainedOptimizer) -> Iterator[None]:
    """In the block the model has the averaged weights, rounded to its data type; then its own again, by bits, also
    where the block raises. For a run that has an average, from its first step on.

    Every rank enters it; a rank that raises alone waits for the others to come out, so its error is logged first.
    """
    finish_param_gather(chunks)
    _exchange(chunks, optimizer)
    try:
        yield
    except BaseException as error:
        log.error("with averaged weights in the model: %r", error)
        raise
    finally:
        _exchange(chunks, optimizer)


@torch.no_grad()
def _exchange(chunks: list[DistributedDataParallel], optimizer: ChainedOptimizer) -> None:
    """Let averages and weights change places in the optimizer, and the model have what the optimizer has.

    A rank that updates nothing only gathers: all of its data-parallel group do.
    """
    for one in trained(optimizer):
        if one.own is not None and AVERAGE in one.state:
            kept = one.main.clone()
            one.main.copy_(one.state[AVERAGE])
            one.state[AVERAGE].copy_(kept)
            # Float32 weights of the model are the optimizer's own.
            one.parameter.view(-1)[one.own.begin : one.own.end].copy_(one.main.view(-1))
    gather_params(chunks)
    for chunk in chunks:
        fp8_step.forget_weights(chunk.module, frozen=False)
