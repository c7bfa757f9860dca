"""How the processes of a run share the work, as far as time, memory and traffic depend on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from nvembed_mcore.config import ParallelConfig, RunConfig
from nvembed_mcore.config_data import ConfigError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout of `gpus` processes; the names are those of `parallel` and `step` in a configuration."""

    gpus: int
    """Processes, one a device."""
    tp: int = 1
    """Tensor-parallel size."""
    pp: int = 1
    """Pipeline stages."""
    cp: int = 1
    """Context-parallel size: so many ranks share a pack, which may then hold cp x tokens_per_microbatch tokens."""
    chunks: int = 1
    """Model chunks of a stage."""
    layers_in_first_stage: int | None = None
    """Layers of the first stage; None: as many as the others."""
    layers_in_last_stage: int | None = None
    """Layers of the last stage, which has the head too; None: as many as the others."""
    sequence_parallel: bool = True
    """Whether norms and head are split over a pack's tokens; counts when `tp` is above 1."""
    way: Literal["single", "retain", "cached"] = "cached"
    """What the first phase of a step keeps (docs/design.md, The step)."""
    tokens_per_microbatch: int = 16384
    """Token budget of a pack, on one context-parallel rank."""
    distributed_optimizer: bool = True
    """Whether data-parallel ranks share the optimizer's state."""
    overlap_grad_reduce: bool = False
    """Whether gradients are reduced while the backward pass runs."""
    overlap_param_gather: bool = False
    """Whether weights are gathered while the next forward pass runs."""
    bucket_size: int | None = None
    """Parameters of one bucket at least, where gradients are reduced so; None: Megatron's choice."""

    def __post_init__(self) -> None:
        for name in ("gpus", "tp", "pp", "cp", "chunks", "tokens_per_microbatch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.gpus % (self.tp * self.pp * self.cp):
            raise ConfigError(f"{self.gpus} GPUs are no multiple of tp {self.tp} x pp {self.pp} x cp {self.cp}")
        if self.pp > 1 and self.way != "cached":
            raise ConfigError(f"way {self.way!r} keeps graphs, which {self.pp} pipeline stages cannot; use 'cached'")

    @classmethod
    def of(cls, config: RunConfig, gpus: int) -> Layout:
        """The layout of a configuration on `gpus` devices. `step.way: auto` is `cached`, which always fits.

        Raises:
            ConfigError: `gpus` is no multiple of a model's share.
        """
        parallel = config.parallel
        return replace(
            cls.switches(config, gpus),
            tp=parallel.tp,
            pp=parallel.pp,
            cp=parallel.cp,
            chunks=parallel.chunks_per_stage,
            layers_in_first_stage=parallel.layers_in_first_stage,
            layers_in_last_stage=parallel.layers_in_last_stage,
            way="cached" if config.step.way == "auto" else config.step.way,
        )

    @classmethod
    def switches(cls, config: RunConfig, gpus: int) -> Layout:
        """What a configuration says besides sizes, on `gpus` data-parallel ranks."""
        return cls(
            gpus=gpus,
            sequence_parallel=config.parallel.sequence_parallel,
            tokens_per_microbatch=config.step.tokens_per_microbatch,
            distributed_optimizer=config.optim.distributed,
            overlap_grad_reduce=config.parallel.overlap_grad_reduce,
            overlap_param_gather=config.parallel.overlap_param_gather,
            bucket_size=config.parallel.bucket_size,
        )

    @property
    def dp(self) -> int:
        """Data-parallel size: ranks that hold different packs."""
        return self.gpus // (self.tp * self.pp * self.cp)

    @property
    def splits_tokens(self) -> bool:
        """Whether tensor ranks split the tokens of a pack outside the linears."""
        return self.sequence_parallel and self.tp > 1

    def stages(self, num_layers: int) -> list[list[int]]:
        """Layers of each chunk of each stage: `stages[stage][chunk]`.

        Raises:
            ConfigError: the layers cannot be split so.
        """
        if self.pp == 1:
            return [[num_layers]]
        ends = self.layers_in_first_stage, self.layers_in_last_stage
        return [[layers // self.chunks] * self.chunks for layers in _layers(self.pp, self.chunks, ends, num_layers)]


@lru_cache
def _layers(pp: int, chunks: int, ends: tuple[int | None, int | None], num_layers: int) -> list[int]:
    """Layers of each stage, by the rule that a run's configuration has. Kept, because a plan asks very often."""
    first, last = ends
    parallel = ParallelConfig(pp=pp, chunks_per_stage=chunks, layers_in_first_stage=first, layers_in_last_stage=last)
    return parallel.layers_of_stages(num_layers)
