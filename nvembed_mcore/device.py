"""CUDA or CPU: the one room that knows Megatron-Core expects a CUDA device.

On a host without CUDA, `prepare()` lets the CPU stand in for "the current CUDA device": Megatron-Core 0.16 asks for
its number, moves tensors to it, compares tensor type names with `torch.cuda.FloatTensor` and keeps its random states.
Nothing of the mathematics is touched; on a host with CUDA nothing is replaced at all.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import resource
from dataclasses import dataclass

import torch

_FACTORIES = ("tensor", "zeros", "empty", "ones", "full", "empty_like", "zeros_like", "ones_like")
_prepared = False


def has_cuda() -> bool:
    """Whether this process computes on a CUDA device."""
    return torch.cuda.is_available()


def current() -> torch.device:
    """The device that this process computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else torch.device("cpu")


def name() -> str:
    """The device's name as the driver reports it, or `cpu`."""
    return torch.cuda.get_device_name() if has_cuda() else "cpu"


@dataclass(frozen=True)
class Gpu:
    """A device as the driver describes it; `capability` (9, 0) is Hopper, (10, 0) Blackwell."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int


def gpus() -> list[Gpu]:
    """The devices that this process may use."""
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [Gpu(one.name, (one.major, one.minor), one.total_memory) for one in found]


def cuda_build() -> str | None:
    """Version of CUDA that torch is built for; None: it is built for CPUs."""
    return torch.version.cuda


def nccl_version() -> str:
    """Version of the NCCL that torch is built with; empty where it is built without."""
    return ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else ""


def backend() -> str:
    """Back ends for `init_process_group`; objects and checkpoints travel over gloo in both cases."""
    return "cpu:gloo,cuda:nccl" if has_cuda() else "gloo"


def synchronize() -> None:
    """Wait for the device's queued work, so that a clock read afterwards includes it."""
    if has_cuda():
        torch.cuda.synchronize()


@functools.cache
def second_stream() -> torch.cuda.Stream:
    """A stream beside the current one, the same for all who ask; needs CUDA."""
    return torch.cuda.Stream()


def free_memory_bytes() -> int:
    """Memory that this process may still take: of its GPU, or its share of the host's among the host's processes."""
    if has_cuda():
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    import psutil

    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def memory_bytes() -> int:
    """Memory that this process holds now: its tensors on a GPU, all that is resident on a host without one."""
    if has_cuda():
        return torch.cuda.memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss


def peak_memory_bytes() -> int:
    """The most that `memory_bytes` has been since the process began."""
    if has_cuda():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def default_dtype(precision: str) -> torch.dtype:
    """Data type of the weights for `precision.dtype`; bfloat16 products are slow on CPUs, so `auto` avoids them."""
    if precision == "auto":
        return torch.bfloat16 if has_cuda() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]


def prepare() -> None:
    """Choose this process's device and, without CUDA, host Megatron-Core on the CPU. Safe to call again."""
    global _prepared
    if _prepared:
        return
    _prepared = True
    if has_cuda():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    else:
        _host_megatron_on_cpu()
        _keep_freed_memory()


def _host_megatron_on_cpu() -> None:
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.set_device = lambda *args, **kwargs: None
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    with cpu:
        # torch's device contexts remember the factories at first use. They must remember the real ones, or models
        # that transformers builds on the meta device later would keep buffers that nobody fills.
        torch.empty(0)
    for factory in _FACTORIES:
        setattr(torch, factory, _redirected(getattr(torch, factory), cpu))
    torch.Tensor.type = _named_as_cuda(torch.Tensor.type)

    # It wonders that drawing on the "CUDA device" moves the CPU's generator, at every dropout.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _redirected(factory, cpu: torch.device):
    """A torch factory whose `device="cuda"` means the CPU: Megatron has the literal in many places."""

    @functools.wraps(factory)
    def create(*args, **kwargs):
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = cpu
        return factory(*args, **kwargs)

    return create


def _named_as_cuda(plain_type):
    """`Tensor.type` with the names of CUDA tensors, which Megatron's optimizer and clipper compare with."""

    @functools.wraps(plain_type)
    def tensor_type(self, dtype=None, *args, **kwargs):
        if dtype is not None:
            return plain_type(self, dtype, *args, **kwargs)
        return plain_type(self).replace("torch.", "torch.cuda.", 1)

    return tensor_type


def release_unused_memory() -> None:
    """Give the kernel back what is free inside glibc's heap, which `prepare` lets grow; nothing on CUDA."""
    if not has_cuda():
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of returning them to the kernel: fresh pages cost up to a quarter."""
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library; only speed is lost
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)
    mallopt(top_pad, 1 << 26)
