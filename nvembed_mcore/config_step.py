"""The part of a run's configuration that says how an optimizer step is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from nvembed_mcore.config_data import require


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """How one optimizer step walks through its packs (docs/design.md, The step)."""

    way: Literal["auto", "single", "retain", "cached"] = "auto"
    """What is kept between embedding and the gradient. `single`: the graph of the one pack of a rank. `retain`: the
    graphs of all its packs. `cached`: that of one pack; the others are embedded again (one more forward pass), so a
    batch of any size fits, and pipeline stages work. `auto`: `single` for one pack, `retain` where the graphs fit the
    free memory as measured at the start, otherwise `cached`."""
    tokens_per_microbatch: int = 16384
    """Token budget of one pack on one process; a pack that `parallel.cp` processes share holds so many times as much.
    A longer text gets a pack of its own."""
    gradient_exchange: Literal["auto", "reduce_scatter", "recompute"] = "auto"
    """How the gradient of a text reaches the rank that holds it. `reduce_scatter`: the sum of what all ranks say of
    it. `recompute`: its rank makes it alone, from all queries and their log-sum-exp. `auto`: the cheaper one."""
    fgm_epsilon: float = 0.0
    """Adversarial training (FGM, arXiv 1605.07725): behind the step's walk through its packs a second one, over texts
    whose embedded tokens, all of a text together, are moved by so much to where the loss grows; one update for both.
    0: no second walk."""
    fgm_weight: float = 1.0
    """Weight of the moved texts' loss, which is added to the loss of the texts as they are."""

    def __post_init__(self) -> None:
        require(
            self.tokens_per_microbatch >= 1,
            f"step.tokens_per_microbatch must be at least 1, got {self.tokens_per_microbatch}",
        )
        require(self.fgm_epsilon >= 0, f"step.fgm_epsilon must not be negative, got {self.fgm_epsilon}")
        require(self.fgm_weight > 0, f"step.fgm_weight must be above 0, got {self.fgm_weight}")


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """A teacher's scores of a query's own passages as a second target (docs/how-to/distillation.md)."""

    weight: float = 0.0
    """The loss is InfoNCE plus so many times KL(teacher || student) over the query's positives and hard negatives of
    the step. 0: no distillation, and the records' scores are not read. 1: as FlagEmbedding adds the two."""
    teacher_temperature: float | None = None
    """The teacher's scores are divided by this before their softmax; must be given. FlagEmbedding takes 1, for logits
    of a cross-encoder; of cosines that would make a flat target: they take about what `temperature` is."""

    @property
    def is_on(self) -> bool:
        return self.weight > 0

    def __post_init__(self) -> None:
        name = "loss.distillation"
        require(0 <= self.weight < math.inf, f"{name}.weight must be a number from 0 up, got {self.weight}")
        given = self.teacher_temperature
        require(
            given is not None or not self.is_on,
            f"{name}.teacher_temperature must be given where {name}.weight is {self.weight}: 1 suits logits of a "
            f"cross-encoder, about loss.temperature suits cosines",
        )
        require(given is None or 0 < given < math.inf, f"{name}.teacher_temperature must be above 0, got {given}")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """InfoNCE on gathered embeddings."""

    temperature: float = 0.02
    """Scores are cosines divided by this. The paper does not state one; 0.02 is that of E5-Mistral."""
    learn_temperature: bool = False
    """Train the temperature, from `temperature` on: one number (the log of its inverse) for all ranks. A step
    moves it by the share `optim.lr` at most: by next to nothing at 2e-5."""
    temperature_range: tuple[float, float] = (0.005, 1.0)
    """A learned temperature stays between these."""
    mask_same_document: bool = True
    """Passages with the document id of one of the query's positives never act as its negatives."""
    in_batch_from: Literal["batch", "dataset"] = "batch"
    """In-batch negatives of a query: the passages of all other queries, or of those of its own data set."""
    share_hard_negatives: bool = True
    """Whether the hard negatives of other queries are in-batch negatives too, besides their positives."""
    false_negative_margin: float | None = None
    """In-batch negatives whose cosine exceeds that of the positive by more than this are left out as false negatives;
    a query's own hard negatives stay. Null: none is left out."""
    symmetric: bool = False
    """Mean of two directions: the query among passages, and the positive among queries."""
    matryoshka_dims: list[int] = field(default_factory=list)
    """Also train the first so many dimensions as embeddings of their own (arXiv 2205.13147): the loss is the mean over
    these and the whole vector."""
    r_drop_weight: float = 0.0
    """R-Drop (arXiv 2106.14448): each text is embedded twice under different dropout; the loss is the mean of both,
    plus so many times the symmetric KL divergence (the mean of both directions) of the two distributions of scores.
    Half of the paper's alpha, which adds both losses up. Needs a dropout, such as `model.lora.dropout`. 0: off."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    """What the loss takes from a teacher's scores."""

    def __post_init__(self) -> None:
        require(self.temperature > 0, f"loss.temperature must be above 0, got {self.temperature}")
        low, high = self.temperature_range
        require(
            0 < low <= self.temperature <= high or not self.learn_temperature,
            f"loss.temperature_range must hold loss.temperature {self.temperature}, got {low} to {high}",
        )
        require(
            len(set(self.matryoshka_dims)) == len(self.matryoshka_dims)
            and all(dim >= 1 for dim in self.matryoshka_dims),
            f"loss.matryoshka_dims must be different numbers of at least 1, got {self.matryoshka_dims}",
        )
        require(self.r_drop_weight >= 0, f"loss.r_drop_weight must not be negative, got {self.r_drop_weight}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Adam with decoupled weight decay, warm-up and linear decay."""

    lr: float = 2e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the last step."""
    warmup_steps: int = 50
    """Steps of linear warm-up from zero."""
    weight_decay: float = 0.03
    """Decoupled weight decay; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's first and second moments."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""
    distributed: bool = True
    """Shard the optimizer's state over data-parallel ranks (Megatron's distributed optimizer)."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the trained weights with this decay a step, from which the run is
    evaluated and exported (ema.py); 0 or null: none. It begins with the weights after the first step, and step `t`
    has `(1 + t) / (10 + t)` where that is less."""

    @property
    def averages(self) -> bool:
        """Whether the weights are averaged."""
        return bool(self.ema_decay)

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr must be above 0, got {self.lr}")
        require(0 <= self.min_lr <= self.lr, f"optim.min_lr must be between 0 and lr {self.lr}, got {self.min_lr}")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            require(getattr(self, name) >= 0, f"optim.{name} must not be negative, got {getattr(self, name)}")
        require(
            self.ema_decay is None or 0 <= self.ema_decay < 1,
            f"optim.ema_decay must be between 0 and below 1, got {self.ema_decay}",
        )
