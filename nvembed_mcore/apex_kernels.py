"""Fused kernels of NVIDIA's Apex, for GPUs without TransformerEngine: Adam and the root mean square norm.

On the Python index another package is called `apex`. Which one is there is told by the modules that a build with
kernels has (docs/install-gpu.md): Apex without them imports as well, and fails where it is used.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch

from nvembed_mcore import device


@functools.cache
def fused_adam() -> type[torch.optim.Optimizer]:
    """The class `FusedAdam`.

    Raises:
        ImportError: it is not installed, or without kernels.
    """
    importlib.import_module("amp_C")
    return importlib.import_module("apex.optimizers").FusedAdam


@functools.cache
def fused_rms_norm() -> Callable[..., torch.Tensor]:
    """The function of (states, weight, normalized shape, eps).

    Raises:
        ImportError: it is not installed, or without kernels.
    """
    importlib.import_module("fused_layer_norm_cuda")
    return importlib.import_module("apex.normalization.fused_layer_norm").fused_rms_norm_affine


@functools.cache
def why_no_fused_adam() -> str:
    """Why Apex cannot update weights here; empty where it can."""
    return _why_not(fused_adam)


@functools.cache
def why_no_fused_norm() -> str:
    """Why Apex cannot compute norms here; empty where it can."""
    return _why_not(fused_rms_norm)


def _why_not(find: Callable[[], object]) -> str:
    if not device.has_cuda():
        return "there is no CUDA device"
    try:
        find()
    except Exception as error:  # a build for another torch fails with an error of its linker
        return f"it cannot be imported: {str(error).strip().splitlines()[0]}"
    return ""
