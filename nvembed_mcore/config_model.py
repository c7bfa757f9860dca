"""What a run's configuration says of the model: layers, pooling head, adapters and data types."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nvembed_mcore.config_data import require


@dataclass(frozen=True, kw_only=True)
class PoolingConfig:
    """How token states become one vector a text (NV-Embed section 3.2)."""

    kind: Literal["latent", "mean", "last", "self_attention", "multi_layer"] = "latent"
    """`latent`: NV-Embed's latent attention. `self_attention`: the paper's ablation, tokens of the text as keys and
    values. `mean`: mean over the pooled positions. `last`: the state of `</s>`. `multi_layer`: latents attend to the
    text's mean after each layer (causal: to its last state), arXiv 2409.02727; there 768 latents, 32 heads of 2048."""
    num_latents: int = 512
    """Rows of the trained dictionary that tokens attend to (`latent`), or that attend to layers (`multi_layer`)."""
    num_heads: int = 8
    """Heads of the cross or self attention (`latent`, `self_attention`, `multi_layer`)."""
    head_width: int | None = None
    """Width of one head; null means the hidden size of the backbone, as in NV-Embed (8 heads of 4096)."""
    initializer_range: float | None = None
    """Standard deviation of the head's projections at the start; null means PyTorch's default for linear layers."""

    def __post_init__(self) -> None:
        for name in ("num_latents", "num_heads"):
            require(getattr(self, name) >= 1, f"model.pooling.{name} must be at least 1, got {getattr(self, name)}")


LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685): a linear with weight `W` computes `W x + (alpha / rank) B A dropout(x)`.

    Only adapters and the head train, and only they have optimizer state.
    """

    rank: int = 0
    """Rows of A and columns of B; 16 in the paper. 0: no adapters, all weights train."""
    alpha: float = 32.0
    """The adapters' share is alpha / rank."""
    dropout: float = 0.1
    """Probability of dropping an element of the adapters' input; projections that share an input drop the same."""
    targets: list[Literal["q", "k", "v", "o", "gate", "up", "down"]] = field(default_factory=lambda: [*LORA_TARGETS])
    """Projections with adapters: of attention (queries, keys, values, output) and of the feed-forward block. The paper
    does not state its own."""
    init_from: str | None = None
    """A PEFT folder of adapters (and of the head's weights, if it has them) to start with; null: A is random and B is
    zero."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, f"model.lora.rank must not be negative, got {self.rank}")
        require(self.alpha > 0, f"model.lora.alpha must be above 0, got {self.alpha}")
        require(0 <= self.dropout < 1, f"model.lora.dropout must be from 0 to below 1, got {self.dropout}")
        require(
            len(self.targets) > 0 and set(self.targets) <= {*LORA_TARGETS},
            f"model.lora.targets must be one or more of {', '.join(LORA_TARGETS)}, got {self.targets}",
        )
        require(len(set(self.targets)) == len(self.targets), f"model.lora.targets must differ, got {self.targets}")
        require(
            self.rank > 0 or self.init_from is None,
            f"model.lora.init_from is {self.init_from}, but model.lora.rank is 0: give the rank of its adapters",
        )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder: Mistral layers and a pooling head."""

    config: str | None = None
    """A Hugging Face `config.json` of a Mistral model (or the folder that holds it), to train from random weights."""
    init_from: str | None = None
    """Where weights come from: a Hugging Face folder, or a checkpoint or run folder of an earlier stage (weights only;
    the optimizer starts fresh)."""
    attention_mask: Literal["bidirectional", "causal"] = "bidirectional"
    """`causal` exists for the paper's ablation."""
    backend: Literal["auto", "transformer_engine", "local"] = "auto"
    """Who computes the layers. `transformer_engine`: NVIDIA's norms, linears and attention, on a GPU. `local`: those
    of torch, on a GPU or a CPU. `auto`: the first where it can be imported on a GPU, otherwise the second. The weights
    are the same; `nvembed doctor` says what is here."""
    pooling: PoolingConfig = field(default_factory=PoolingConfig)
    """The head that pools token states."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters to train instead of the backbone's weights."""

    def __post_init__(self) -> None:
        require(
            (self.config is None) != (self.init_from is None),
            f"give exactly one of model.config and model.init_from, got {self.config!r} and {self.init_from!r}",
        )

    @property
    def adapters(self) -> LoraConfig | None:
        """`lora`, unless its rank is 0."""
        return self.lora if self.lora.rank else None


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Data types of the passes through the model. Gradients are reduced and the optimizer works in float32 always."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the weights: `auto` is bfloat16 on a CUDA device and float32 on a CPU."""
    fp8: Literal["off", "delayed", "tensorwise", "blockwise", "mxfp8"] = "off"
    """How the layers' linears round weights and inputs to e4m3 and gradients to e5m2 (blockwise and mxfp8: e4m3); the
    head stays as it is. `tensorwise`: one scale a tensor, from its own largest value. `delayed`: from the largest of
    earlier steps. `blockwise`: one for each 128 values (a weight: 128 x 128). `mxfp8`: one for each 32, on Blackwell.
    With `model.backend: local` the rounding is emulated: as exact, and slower than without."""
    fp8_attention: Literal["off", "on", "auto"] = "off"
    """Products inside attention in FP8, over padded buckets of similar length; needs TransformerEngine, heads of width
    128 and cuDNN 9.7. `auto`: measured at the start of a run on a pack of its own, and taken where it is faster than
    bfloat16 over packed tokens; a resumed run goes on as it began. What only embeds takes `auto` for `off`, and
    so does a run whose texts are shared (`parallel.cp`), which refuses `on`."""

    def __post_init__(self) -> None:
        require(
            self.fp8_attention == "off" or self.fp8 != "off",
            f"precision.fp8_attention {self.fp8_attention!r} needs precision.fp8, which is 'off'",
        )
