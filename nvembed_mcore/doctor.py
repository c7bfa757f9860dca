"""What a run will be computed with on this machine, and why; and what commonly goes wrong (`nvembed doctor`).

Every answer comes from the function that the run itself asks. What is installed stands in installed.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from nvembed_mcore import apex_kernels, device, loss
from nvembed_mcore.config import (
    ConfigError,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
)
from nvembed_mcore.installed import Installed, look
from nvembed_mcore.model.backend import Backend, choose, why_no_fp8, why_no_transformer_engine
from nvembed_mcore.preflight_rank import missing_paths

if TYPE_CHECKING:
    from transformers import MistralConfig

FP8_RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


@dataclass(frozen=True)
class Path:
    """Who computes a part of the step, and why."""

    part: str
    choice: str
    why: str = ""


def _mistral_7b() -> MistralConfig:
    from transformers import MistralConfig

    return MistralConfig()


@dataclass(frozen=True)
class Settings:
    """The parts of a configuration that decide it, and the model's architecture; the defaults, where none is given."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(config=""))
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    architecture: MistralConfig = field(default_factory=_mistral_7b)
    architecture_is: str = "Mistral-7B's, for no configuration is given"


@dataclass(frozen=True)
class Diagnosis:
    """What was found, by name; the paths; what may go wrong; and why a run cannot start, or nothing."""

    found: dict[str, str]
    paths: list[Path]
    warnings: list[str]
    refusal: str

    def as_json(self) -> dict[str, Any]:
        """Flat: `found: torch`, `path: attention`, `why: attention`, `warnings`, `refusal`."""
        values: dict[str, Any] = {f"found: {name}": value for name, value in self.found.items()}
        for one in self.paths:
            values |= {f"path: {one.part}": one.choice, f"why: {one.part}": one.why}
        return values | {"warnings": self.warnings, "refusal": self.refusal}


def examine(read: Callable[[], RunConfig] | None = None) -> Diagnosis:
    """Examine this machine, for a run with the configuration that `read` reads; None: for any run."""
    installed, settings, paths = look(), Settings(), []
    refusals = _why_no_run()
    if not refusals:
        try:
            if read is not None:
                config = read()
                refusals = missing_paths(config)
                settings = _settings(config)
            paths = list(paths_of(settings))
        except (ValueError, OSError) as error:
            refusals = [*refusals, str(error)]
    found = installed.lines() | {"TransformerEngine": why_no_transformer_engine() or "can be imported"}
    warnings = list(warnings_of(installed, settings.parallel, os.environ))
    return Diagnosis(found, paths, warnings, "\n".join(refusals))


def _why_no_run() -> list[str]:
    """Why the trainer's own modules cannot be imported; empty where they can.

    Megatron-Core imports TransformerEngine, and foresees only that there is none: a broken one breaks it.
    """
    try:
        from nvembed_mcore import build, optim  # noqa: F401
    except Exception as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else ""
        return [f"Megatron-Core or another library cannot be imported: {type(error).__name__}: {text}"]
    return []


def _settings(config: RunConfig) -> Settings:
    """Of a configuration, and of the model that it names; where that is not here, of Mistral-7B.

    Raises:
        ConfigError, WeightsError: what is there is no model of this kind.
    """
    from nvembed_mcore.build import read_architecture

    named = config.model.config or config.model.init_from
    if os.path.exists(named):
        architecture, source = read_architecture(config.model), f"that of {named}"
    else:
        architecture, source = _mistral_7b(), f"Mistral-7B's, for there is no {named}"
    return Settings(config.model, config.precision, config.parallel, config.optim, architecture, source)


def paths_of(settings: Settings) -> Iterator[Path]:
    """Who computes what.

    Raises:
        ConfigError: the configuration asks for what is not here.
    """
    from nvembed_mcore.model.mistral import check_fp8, check_layout

    architecture = settings.architecture
    check_layout(architecture, settings.parallel)
    backend = choose(settings.model, settings.precision, settings.parallel.cp)
    check_fp8(architecture, backend, settings.parallel)
    sizes = f"{architecture.num_hidden_layers} layers of width {architecture.hidden_size}"
    yield Path("architecture", sizes, settings.architecture_is)
    yield from _layers(backend, settings.model)
    yield from _attention(backend, settings)
    yield from _rest(backend, settings)


def _layers(backend: Backend, model: ModelConfig) -> Iterator[Path]:
    is_te, why_not = backend.layers == "transformer_engine", why_no_transformer_engine()
    asked = f"model.backend is {model.backend}"
    yield Path("layers", _NAMES[backend.layers], asked if model.backend != "auto" else why_not or "it can be imported")
    yield Path("weights", str(backend.dtype).removeprefix("torch."), f"on {device.name()}")
    no_apex = apex_kernels.why_no_fused_norm()
    if is_te:
        yield Path("norms", "TransformerEngine", "of its layers")
    else:
        yield Path("norms", "torch" if no_apex else "Apex", no_apex and f"Apex: {no_apex}")
    fp8 = f"FP8 {backend.fp8}{', emulated: rounded to it, computed without' if backend.is_fp8_emulated else ''}"
    yield Path("linears", "as the weights" if backend.fp8 == "off" else fp8, f"precision.fp8 is {backend.fp8}")
    for recipe in FP8_RECIPES:
        why_no = why_not or why_no_fp8(recipe)
        yield Path(f"FP8 {recipe}", "emulated only" if why_no else "supported", why_no)


_NAMES = {"transformer_engine": "TransformerEngine", "local": "Megatron's local layers"}


def _attention(backend: Backend, settings: Settings) -> Iterator[Path]:
    from nvembed_mcore.model import fp8_attention
    from nvembed_mcore.model.attention import why_padded
    from nvembed_mcore.model.mistral import transformer_config
    from nvembed_mcore.model.te_attention import why_torch

    config, cp = transformer_config(settings.architecture, backend, settings.parallel), settings.parallel.cp
    is_te, width, dropout = backend.layers == "transformer_engine", config.kv_channels, config.attention_dropout
    why_not = why_torch(config) if is_te else f"the layers are {_NAMES[backend.layers]}"
    causal_parts = cp > 1 and settings.model.attention_mask == "causal"
    padded = why_padded(device.current().type, backend.dtype, width, dropout, causal_parts=causal_parts)
    missing = fp8_attention.missing(config) if is_te else why_not
    if backend.fp8_attention == "on" and missing:
        raise ConfigError(f"precision.fp8_attention is 'on', but {missing}. Use 'off' or 'auto'")
    in_fp8 = "off" if missing else backend.fp8_attention
    if not why_not:
        form = _TE_ATTENTION[in_fp8] + (f", keys and values of {cp} ranks in a ring" if cp > 1 else "")
        yield Path("attention", form, f"heads of width {width}, no dropout")
        yield Path("rotary positions", "TransformerEngine, one kernel", "by the place in each text")
    else:
        form = "torch, padded buckets of similar length" if padded else "torch's variable-length attention, packed"
        form += f", keys and values gathered from {cp} ranks" if cp > 1 else ""
        yield Path("attention", form, "; ".join(filter(None, [why_not if is_te else "", padded])) or why_not)
        yield Path("rotary positions", "torch", "by the place in each text")
    asked = f"precision.fp8_attention is {settings.precision.fp8_attention}"
    yield Path("FP8 attention", in_fp8, f"{asked}; {missing or 'it can be here'}")


_TE_ATTENTION = {
    "off": "TransformerEngine, packed",
    "on": "TransformerEngine in FP8, padded buckets of similar length",
    "auto": "TransformerEngine, packed or in FP8 over padded buckets: measured when a run starts",
}


def _rest(backend: Backend, settings: Settings) -> Iterator[Path]:
    from nvembed_mcore.model.pooling import why_no_kernels
    from nvembed_mcore.optim import choose_adam

    parallel = settings.parallel
    adam, why = choose_adam()
    yield Path("optimizer", _FUSED[adam], why)
    sharded = "sharded over data-parallel ranks" if settings.optim.distributed else "whole on every rank"
    yield Path("optimizer's state", sharded, f"optim.distributed is {str(settings.optim.distributed).lower()}")
    no_kernel = loss.why_no_kernel(device.current().type, torch.float32)
    yield Path("loss", "torch" if no_kernel else "Triton kernel", no_kernel)
    no_kernels = why_no_kernels(device.current().type, backend.dtype)
    yield Path("pooling head", "torch" if no_kernels else "Triton between its products", no_kernels)
    adapters = settings.model.adapters or LoraConfig()
    trained = f"adapters of rank {adapters.rank} and the head" if adapters.rank else "all weights"
    yield Path("trained", trained, f"model.lora.rank is {adapters.rank}")
    yield Path("exchange", device.backend(), "objects and checkpoints travel over gloo")
    overlap, why = parallel.overlap_grad_reduce, "parallel.overlap_grad_reduce is "
    yield Path("gradients", _beside(overlap, "the backward pass", "reduced"), why + str(overlap).lower())
    if settings.optim.distributed:
        overlap, why = parallel.overlap_param_gather, "parallel.overlap_param_gather is "
        yield Path("new weights", _beside(overlap, "the next forward pass", "gathered"), why + str(overlap).lower())


_FUSED = {
    "TransformerEngine": "TransformerEngine's FusedAdam",
    "Apex": "Apex's FusedAdam",
    "torch": "torch's fused AdamW",
}


def _beside(overlaps: bool, what: str, verb: str) -> str:
    return f"{verb} while {what} runs" if overlaps else f"{verb} between the passes"


def warnings_of(installed: Installed, parallel: ParallelConfig, environment: Mapping[str, str]) -> Iterator[str]:
    """What commonly goes wrong, as far as it can be seen from outside."""
    if installed.cuda_build and not installed.devices:
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        why = (
            f"CUDA_VISIBLE_DEVICES is {visible!r}" if visible is not None else f"driver: {installed.driver or 'none'}"
        )
        yield f"torch is built for CUDA {installed.cuda_build}, but no device can be used ({why}): all runs on the CPU"
    if installed.cuda_build is None and installed.driver:
        yield f"there is an NVIDIA driver ({installed.driver}), but torch is built for CPUs"
    if installed.apex == "another package":
        yield (
            "the package `apex` of the Python index is installed, which has nothing to do with NVIDIA's: uninstall it "
            "(docs/install-gpu.md)"
        )
    if installed.apex == "without kernels":
        yield "Apex is installed without its kernels, so it computes nothing here (docs/install-gpu.md)"
    yield from _of_transformer_engine(installed)
    if "psutil" not in installed.packages:
        yield "psutil is not installed: `step.way: auto` cannot measure a host's memory"
    yield from _of_the_environment(parallel, environment, bool(installed.devices))


def _of_transformer_engine(installed: Installed) -> Iterator[str]:
    parts = {name: found for name, found in installed.packages.items() if name.startswith("transformer-engine")}
    if parts and len(set(parts.values())) > 1:
        yield f"the parts of TransformerEngine have different versions, and it refuses to be imported: {parts}"
    # It wants the package of that name, the core for the CUDA version, and the part for torch.
    if parts and (missing := {"transformer-engine", "transformer-engine-torch"} - parts.keys()):
        yield (
            f"TransformerEngine is half installed, without {', '.join(sorted(missing))}: Megatron-Core may then fail "
            f"to be imported, whatever model.backend is"
        )
    if installed.cudnn == (9, 10, 0):
        yield "cuDNN 9.10.0 has faults in FP8 attention, for which TransformerEngine leaves it out: use a later one"


def _of_the_environment(parallel: ParallelConfig, environment: Mapping[str, str], has_devices: bool) -> Iterator[str]:
    connections = environment.get("CUDA_DEVICE_MAX_CONNECTIONS")
    overlaps = parallel.overlap_grad_reduce or parallel.overlap_param_gather
    if has_devices and (parallel.tp > 1 or parallel.cp > 1) and connections != "1":
        yield (
            f"CUDA_DEVICE_MAX_CONNECTIONS is {connections}, with parallel.tp = {parallel.tp} and parallel.cp = "
            f"{parallel.cp}: tensor and context parallelism overlap their communication only where it is 1"
        )
    if has_devices and parallel.tp == parallel.cp == 1 and overlaps and connections == "1":
        yield (
            "CUDA_DEVICE_MAX_CONNECTIONS is 1, with parallel.tp = parallel.cp = 1: gradients and weights then wait in "
            "one queue with the kernels that they should overlap with; NVIDIA's recipes have 32 there"
        )
    for name, value, effect in SLOW_SETTINGS:
        if environment.get(name) in value:
            yield f"{name} is {environment[name]}: {effect}"


SLOW_SETTINGS = (
    ("NCCL_P2P_DISABLE", ("1",), "GPUs of a node exchange through the host's memory"),
    ("NCCL_SHM_DISABLE", ("1",), "GPUs of a node without NVLink exchange through the network"),
    ("NCCL_IB_DISABLE", ("1",), "nodes exchange over TCP"),
    ("NCCL_DEBUG", ("INFO", "TRACE"), "NCCL writes a line for each call, or nearly"),
    ("NVTE_FUSED_ATTN", ("0",), "TransformerEngine does not use cuDNN's attention"),
    ("NVTE_FLASH_ATTN", ("0",), "TransformerEngine does not use FlashAttention"),
    ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", ("0",), "attention's backward pass repeats by bits, and takes longer"),
    ("CUDA_LAUNCH_BLOCKING", ("1",), "the host waits for each kernel"),
    ("TORCH_NCCL_BLOCKING_WAIT", ("1",), "the host waits for each collective"),
)
"""Settings of a search for a fault that are easily left behind: name, values, what they do."""
