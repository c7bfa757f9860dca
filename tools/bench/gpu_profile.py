"""Where the time of a training step goes, by family of work and by kernel: which kernel is worth writing next.

A family is where an operation belongs in the model (pooling head, adapters, attention, norm: by the modules, forward
and backward), or in the step (loss, optimizer), otherwise by the kernel's name (matrix products, rounding to FP8,
SwiGLU, copies). Of a backward operation autograd knows the forward one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from gpu_measure import Figures
from gpu_ours import Ours
from gpu_workload import Size, make_batches
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity

from nvembed_mcore import device
from nvembed_mcore.config import ParallelConfig, PrecisionConfig
from nvembed_mcore.parallel.groups import initialize

STEPS, KERNELS_SHOWN = 2, 20
MARK = "family: "
PHASES = {"score": "loss", "optimizer": "optimizer"}
BY_MODULE = (
    (re.compile(r"(^|\.)pooling$"), "pooling head"),
    (re.compile(r"(^|\.)lora_\w+$"), "LoRA products"),
    (re.compile(r"core_attention$"), "attention"),
    (re.compile(r"norm\w*$"), "norm"),
)
BY_NAME = (
    ("FP8 products", r"e4m3|e5m2|fp8.*gemm|gemm.*fp8|f8f8|nvjet_q|nvjet_\w*qq|_scaled_mm"),
    ("rounding to FP8", r"quanti|cast_transpose|transpose_cast|amax|fp8|float8|multi_cast"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|xmma|::(add|b|baddb)?mm$|::(linear|matmul)$|s16816|splitK"),
    ("attention", r"flash|fmha|sdpa|attention|cudnn.*mha|softmax_warp"),
    ("norm", r"norm"),
    ("SwiGLU", r"swiglu|silu|gated|glu"),
    ("optimizer", r"adam|multi_tensor|l2norm"),
    ("copies", r"copy|memcpy|memset|::(cat|fill_|zero_|index_select|contiguous|clone|to|_to_copy)$|CatArray|fill"),
)


def family_of(name: str) -> str:
    """The family of a kernel (or, on a CPU, of an operator) that no module or phase claims."""
    return next((family for family, words in BY_NAME if re.search(words, name, re.IGNORECASE)), "other")


class Phases:
    """A timer of a step's phases that marks them in the profile instead of timing them."""

    @contextmanager
    def __call__(self, phase: str):
        with record_function(MARK + PHASES[phase] if phase in PHASES else f"phase {phase}"):
            yield


def mark_modules(model: torch.nn.Module) -> None:
    """Let modules of a family say when they run forward."""
    for name, module in model.named_modules():
        family = next((family for words, family in BY_MODULE if words.search(name)), None)
        if family is None:
            continue
        opened: list[record_function] = []

        def enter(module: torch.nn.Module, inputs: Any, opened=opened, family=family) -> None:
            opened.append(record_function(MARK + family))
            opened[-1].__enter__()

        def leave(module: torch.nn.Module, inputs: Any, output: Any, opened=opened) -> None:
            opened.pop().__exit__(None, None, None)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)


def regions(events: Iterable[Any]) -> Callable[[Any], str | None]:
    """Of an event on the host, the family whose mark encloses it, or that of the forward operation it belongs to."""
    known: dict[int, str | None] = {}
    forward: dict[int, tuple[float, str | None]] = {}  # of a sequence number, the last forward event that bears it

    def enclosing(event: Any) -> str | None:
        if id(event) not in known:
            if event.name.startswith(MARK):
                found = event.name.removeprefix(MARK)
            elif _is_backward(event) and event.sequence_nr in forward:
                found = forward[event.sequence_nr][1]
            else:
                found = enclosing(event.cpu_parent) if event.cpu_parent is not None else None
            known[id(event)] = found
        return known[id(event)]

    every = sorted(events, key=lambda event: event.time_range.start)
    for event in every:
        if event.sequence_nr >= 0 and not _is_backward(event):
            forward[event.sequence_nr] = (event.time_range.start, enclosing(event))
    return enclosing


def _is_backward(event: Any) -> bool:
    return event.name.startswith("autograd::engine::evaluate_function")


def costs(events: list[Any]) -> list[tuple[str, str, float]]:
    """(name, family, microseconds) of every kernel; without a GPU of every operator's own time."""
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    family, found = regions(on_host), []
    for event in on_host:
        named = [(kernel.name, kernel.duration) for kernel in event.kernels]
        if not device.has_cuda() and not event.name.startswith((MARK, "phase ")):
            named = [(event.name, event.self_cpu_time_total)]
        found += [(name, family(event) or family_of(name), us) for name, us in named]
    if device.has_cuda():
        linked = sum(us for _, _, us in found)
        kernels = [one for one in events if one.device_type == torch.autograd.DeviceType.CUDA]
        every = sum(one.time_range.elapsed_us() for one in kernels if not one.is_user_annotation)
        # Kernels that the profiler cannot connect with an operator.
        found.append(("(of no known operator)", "other", max(0.0, every - linked)))
    return found


def table(found: list[tuple[str, str, float]], steps: int) -> list[str]:
    """Lines: families, then the longest kernels with their families."""
    of_family, of_kernel, counts = defaultdict(float), defaultdict(float), defaultdict(int)
    for name, family, us in found:
        of_family[family] += us
        of_kernel[name, family] += us
        counts[name, family] += 1
    total = sum(of_family.values()) or 1.0
    lines = [f"{'family':20} {'ms a step':>10} {'share':>7}"]
    for family, us in sorted(of_family.items(), key=lambda item: -item[1]):
        lines.append(f"{family:20} {us / 1e3 / steps:10.3f} {us / total:7.1%}")
    lines += ["", f"{'ms a step':>10} {'share':>7} {'calls':>6}  kernel (family)"]
    for (name, family), us in sorted(of_kernel.items(), key=lambda item: -item[1])[:KERNELS_SHOWN]:
        calls = counts[name, family] / steps
        lines.append(f"{us / 1e3 / steps:10.3f} {us / total:7.1%} {calls:6.0f}  {name[:110]} ({family})")
    return lines


def profile(figures: Figures, size: Size, name: str, precision: dict[str, str]) -> None:
    """Two LoRA steps of about one pack."""
    ours = Ours(size, initialize(ParallelConfig()), PrecisionConfig(**precision), trains=True)
    mark_modules(ours.encoder)
    (batch,) = make_batches(size, "msmarco", size.pack_queries())
    step = ours.step("retain")
    for number in (1, 2):
        step(batch, number, Phases())
    device.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.has_cuda() else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        for number in range(STEPS):
            step(batch, 3 + number, Phases())
        device.synchronize()
    found = costs(list(profiler.events()))
    total = sum(us for _, _, us in found) or 1.0
    shares: dict[str, float] = defaultdict(float)
    for _, family, us in found:
        shares[family.replace(" ", "_")] += us / total
    figures.add(f"profile_{name}", **{f"share_{family}": share for family, share in shares.items()})
    figures.add(**{f"profile_{name}_table": "\n".join(table(found, STEPS))})
