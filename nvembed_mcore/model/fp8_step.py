"""What layers in FP8 must know of a run beyond the pack before them: where a step begins and ends, and new weights.

TransformerEngine's layers and local ones, which emulate FP8, have the same rules (`te_layers`, `fp8_linear`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from nvembed_mcore.model import fp8_linear
from nvembed_mcore.model.backend import Backend


@contextmanager
def forward_region(backend: Backend) -> Iterator[None]:
    """Around the layers in each forward."""
    if backend.is_fp8_in_te:
        from nvembed_mcore.model import te_layers  # only where it can be imported

        with te_layers.histories_kept():
            yield
    else:
        yield


def begin_step(encoders: list[torch.nn.Module]) -> None:
    """Before the first forward of an optimizer step: what was computed since the last one does not count."""
    if encoders[0].backend.is_fp8_in_te:
        from nvembed_mcore.model import te_layers

        te_layers.begin_step(encoders)
    else:
        fp8_linear.begin_step(encoders)


def end_step(encoders: list[torch.nn.Module], groups: list[dist.ProcessGroup]) -> None:
    """After the optimizer has changed the weights: histories of delayed scaling move by one.

    Args:
        groups: those whose ranks together share these layers, tensor, and data with context. All of them call this
            once a step, however many packs each of them had.
    """
    if encoders[0].backend.is_fp8_in_te:
        from nvembed_mcore.model import te_layers

        te_layers.end_step(encoders)  # its regions know the group of both
    else:
        fp8_linear.end_step(encoders, groups)


def forget_weights(encoder: torch.nn.Module, *, frozen: bool = True) -> None:
    """After weights came from elsewhere: none is as it was; without `frozen`, none that trains."""
    if encoder.backend.is_fp8_in_te:
        from nvembed_mcore.model import te_layers

        te_layers.forget_fp8_weights(encoder, frozen=frozen)
    else:
        fp8_linear.forget_weights([encoder], frozen=frozen)
