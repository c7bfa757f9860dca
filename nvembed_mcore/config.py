"""The typed tree of a run: everything that a YAML file or the command line may say.

Classes are frozen and keyword-only. The docstring under a field is its help text. Checks that need no file, no
process group and no device live in `__post_init__`, so a wrong value ends a run before anything starts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from nvembed_mcore.config_data import ConfigError as ConfigError
from nvembed_mcore.config_data import DataConfig, require
from nvembed_mcore.config_data import DatasetConfig as DatasetConfig
from nvembed_mcore.config_eval import EvalConfig
from nvembed_mcore.config_eval import EvalSetConfig as EvalSetConfig
from nvembed_mcore.config_model import LORA_TARGETS as LORA_TARGETS
from nvembed_mcore.config_model import LoraConfig as LoraConfig
from nvembed_mcore.config_model import ModelConfig, PrecisionConfig
from nvembed_mcore.config_model import PoolingConfig as PoolingConfig
from nvembed_mcore.config_step import DistillationConfig as DistillationConfig
from nvembed_mcore.config_step import LossConfig, OptimConfig, StepConfig


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the processes share the work. Data parallelism takes what tensor, pipeline and context parallelism leave."""

    tp: int = 1
    """Tensor-parallel size."""
    pp: int = 1
    """Pipeline-parallel size."""
    cp: int = 1
    """Context-parallel size: so many processes share each pack, and each has a part of every text. For texts of
    thousands of tokens; short ones are filled to a multiple of 2 `cp` tokens."""
    chunks_per_stage: int = 1
    """Model chunks of a pipeline stage; above 1 the stages take turns (Megatron's interleaved schedule)."""
    layers_in_first_stage: int | None = None
    """Layers of the first pipeline stage, which has the embedding table too; null: as many as the others. Stages
    for which no number is given have equal shares of the rest."""
    layers_in_last_stage: int | None = None
    """Layers of the last pipeline stage, which has the pooling head too; null: as many as the others."""
    sequence_parallel: bool = True
    """Split norms and the pooling head over the tokens of a pack; takes effect when `tp` is above 1."""
    overlap_grad_reduce: bool = False
    """Reduce gradients bucket by bucket while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather the new weights bucket by bucket while the next forward pass runs; needs `overlap_grad_reduce` and
    `optim.distributed`."""
    bucket_size: int | None = None
    """Parameters of one bucket at least (with `overlap_grad_reduce`); null: Megatron's choice, 40 million or more."""
    timeout_minutes: float = 10.0
    """A rank that is silent for longer, or longer in one phase of a step, ends the run; so does a collective."""

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "cp", "chunks_per_stage"):
            require(getattr(self, name) >= 1, f"parallel.{name} must be at least 1, got {getattr(self, name)}")
        require(
            self.chunks_per_stage == 1 or self.pp > 1,
            f"parallel.chunks_per_stage = {self.chunks_per_stage} needs parallel.pp above 1, got {self.pp}",
        )
        for name in ("layers_in_first_stage", "layers_in_last_stage"):
            layers = getattr(self, name)
            require(
                layers is None or self.pp > 1, f"parallel.{name} = {layers} needs parallel.pp above 1, got {self.pp}"
            )
            require(
                layers is None or (layers >= 1 and layers % self.chunks_per_stage == 0),
                f"parallel.{name} must be at least 1 and a multiple of chunks_per_stage = {self.chunks_per_stage}, "
                f"got {layers}",
            )
        require(
            self.bucket_size is None or (self.bucket_size >= 1 and self.overlap_grad_reduce),
            f"parallel.bucket_size must be at least 1 and needs overlap_grad_reduce, got {self.bucket_size} and "
            f"{self.overlap_grad_reduce}",
        )
        require(
            self.overlap_grad_reduce or not self.overlap_param_gather,
            "parallel.overlap_param_gather is true, which needs parallel.overlap_grad_reduce, and that is false",
        )
        require(self.timeout_minutes > 0, f"parallel.timeout_minutes must be above 0, got {self.timeout_minutes}")

    def layers_of_stages(self, num_layers: int) -> list[int]:
        """Layers of each pipeline stage; its chunks have equal shares of them.

        Raises:
            ConfigError: the model's `num_layers` cannot be shared out so.
        """
        first, last = self.layers_in_first_stage, self.layers_in_last_stage
        require(
            first is not None or last is not None or num_layers % (self.pp * self.chunks_per_stage) == 0,
            f"parallel.pp = {self.pp} times chunks_per_stage = {self.chunks_per_stage} does not divide the model's "
            f"num_hidden_layers = {num_layers}",
        )
        others = self.pp - (first is not None) - (last is not None)
        rest = num_layers - (first or 0) - (last or 0)
        require(
            rest > 0 and rest % (others * self.chunks_per_stage) == 0 if others else rest == 0,
            f"parallel.layers_in_first_stage = {first} and layers_in_last_stage = {last} leave {rest} of the model's "
            f"num_hidden_layers = {num_layers} to the {others} other stage(s) of parallel.pp = {self.pp}, whose "
            f"chunks_per_stage = {self.chunks_per_stage} must have equal shares of at least one",
        )
        share = rest // max(1, others)
        return [first or share, *[share] * (self.pp - 2), last or share][: self.pp]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Resume checkpoints, in the run folder's `checkpoints/`."""

    every_steps: int = 500
    """Steps between checkpoints; the last step is always saved. 0: none is ever written, for measurements: a run that
    is stopped takes its steps again."""
    keep: int = 2
    """Complete checkpoints kept; older ones are removed after a new one is complete."""
    keep_best: bool = True
    """Keep that of the best evaluation (`eval.metric`) beyond these. An evaluation that beats all before it is saved
    even at a step where no save is due; that before the first step does not count."""
    resume: Literal["auto", "must", "never"] = "auto"
    """`auto`: go on from the newest complete checkpoint, or start. `must`: end with an error when there is none.
    `never`: end with an error when there is one."""
    async_save: bool = False
    """Write while training goes on, from a copy: costs host memory of a rank's share of weights and optimizer. What
    is stored is the same; a failure to write ends the run at the next step."""
    any_owner: bool = False
    """Go on from files that belong to another user than this one or root."""
    manifest_sha256: str | None = None
    """SHA-256 of the `manifest.json` of the checkpoint that this run must go on from; null: any good one."""

    def __post_init__(self) -> None:
        require(
            self.manifest_sha256 is None or re.fullmatch("[0-9a-f]{64}", self.manifest_sha256) is not None,
            f"checkpoint.manifest_sha256 must be 64 hexadecimal digits in lower case, got {self.manifest_sha256!r}",
        )
        require(self.every_steps >= 0, f"checkpoint.every_steps must not be negative, got {self.every_steps}")
        require(self.keep >= 2, f"checkpoint.keep must be at least 2 (the newest may be damaged), got {self.keep}")


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases (extra `track`). Nothing is imported or sent while it is off."""

    mode: Literal["off", "online", "offline"] = "off"
    """`online`: send while the run goes on; the variable WANDB_MODE may say otherwise. `offline`: write to
    `run_dir/wandb` alone, for `wandb sync`."""
    project: str = "nvembed"
    """Project that the run stands in."""
    entity: str | None = None
    """User or team that the project belongs to; null: the default of whoever is logged in."""
    name: str | None = None
    """Name of the run; null: that of its folder."""

    def __post_init__(self) -> None:
        for name in ("project", "entity", "name"):
            require(getattr(self, name) != "", f"log.wandb.{name} must not be empty")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is printed and written."""

    every_steps: int = 1
    """Steps between lines of `metrics.jsonl` and what the trackers get."""
    tensorboard: bool = True
    """Write TensorBoard events when the package is installed."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
    progress: bool = True
    """Show a progress bar on rank 0."""
    straggler_window: int = 50
    """Steps over which ranks' own seconds are summed and compared; a rank that takes 1.5 times the median in three
    windows in a row is named. 0: never."""
    time_communication_every: int = 0
    """Every so many steps, wait for each collective as soon as it begins, and write the seconds of a step in which a
    rank did so (`communication_seconds`): nothing overlaps in that step, which is slower for it. 0: never."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 1, f"log.every_steps must be at least 1, got {self.every_steps}")
        for name in ("straggler_window", "time_communication_every"):
            require(getattr(self, name) >= 0, f"log.{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One stage of training."""

    run_dir: str
    """Everything that this run writes."""
    stage: int = 1
    """Number of the stage; it enters the order of the samples."""
    seed: int = 1234
    """Random weights, sample order and dropout follow from it."""
    steps: int
    """Optimizer steps of the whole run."""
    stop_at: int | None = None
    """Save and end after this step although `steps` is larger: the schedule stays that of the whole run."""
    max_minutes: float | None = None
    """Save and end with status 75 when the process is so many minutes old, after the step that it is at; null: no
    limit."""
    batch_size: int = 128
    """Queries in a global batch, over all ranks and microbatches."""
    data: DataConfig
    """Data sets and limits."""
    model: ModelConfig
    """Architecture and initial weights."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    """Data types."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout of the processes."""
    step: StepConfig = field(default_factory=StepConfig)
    """How a step is computed."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The contrastive loss."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation while training."""
    log: LogConfig = field(default_factory=LogConfig)
    """Logging."""

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps must be at least 1, got {self.steps}")
        require(self.batch_size >= 1, f"batch_size must be at least 1, got {self.batch_size}")
        require(
            self.stop_at is None or 1 <= self.stop_at <= self.steps,
            f"stop_at must be between 1 and steps ({self.steps}), got {self.stop_at}",
        )
        require(
            self.max_minutes is None or self.max_minutes > 0, f"max_minutes must be above 0, got {self.max_minutes}"
        )
        require(
            self.parallel.pp == 1 or self.step.way in ("auto", "cached"),
            f"step.way {self.step.way!r} keeps graphs, which pipeline stages cannot; parallel.pp is "
            f"{self.parallel.pp}. Use 'auto' or 'cached'",
        )
        require(
            self.loss.r_drop_weight == 0 or self.step.way != "single",
            f"step.way 'single' keeps the graph of one pack, but with loss.r_drop_weight {self.loss.r_drop_weight} "
            f"each pack is embedded twice. Use 'auto', 'retain' or 'cached'",
        )
        require(
            self.parallel.cp == 1 or self.precision.fp8_attention != "on",
            f"precision.fp8_attention is 'on', but texts that processes share are not attended to in FP8; parallel.cp "
            f"is {self.parallel.cp}. Use 'auto' or 'off'",
        )
        require(
            self.optim.distributed or not self.parallel.overlap_param_gather,
            "parallel.overlap_param_gather is true, which needs optim.distributed, and that is false",
        )
        require(
            not self.loss.distillation.is_on
            or any(one.distill and one.num_positives + one.num_negatives >= 2 for one in self.data.datasets),
            f"loss.distillation.weight is {self.loss.distillation.weight}, but no data set has data.datasets.distill "
            f"true and num_positives + num_negatives of at least 2: there is nothing to distil",
        )
        require(
            self.step.gradient_exchange != "recompute" or self.loss.false_negative_margin is None,
            f"step.gradient_exchange 'recompute' computes scores twice, and loss.false_negative_margin "
            f"{self.loss.false_negative_margin} could decide differently each time. Use 'auto' or 'reduce_scatter'",
        )

    @property
    def embeddings_of_a_text(self) -> int:
        """How often a step embeds each text for its loss: twice with R-Drop, and all of that twice with FGM."""
        return (2 if self.loss.r_drop_weight else 1) * (2 if self.step.fgm_epsilon else 1)
