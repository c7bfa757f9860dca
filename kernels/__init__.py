"""Kernels, each with a plain PyTorch reference. Installed as `nvembed_mcore.kernels`."""

import functools
import importlib.util


@functools.cache
def has_triton() -> bool:
    """Whether the Triton kernels can be imported."""
    return importlib.util.find_spec("triton") is not None
