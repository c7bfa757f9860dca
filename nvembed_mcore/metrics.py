"""What a step costs and how fast it was: FLOPs, tokens, padding, seconds by phase, MFU.

Every rate counts **real** tokens, those of texts. Padding and forward passes done again for memory are work of the
machine but not of the model, so they lower tokens/s and MFU instead of raising them.

Letters: `T` tokens, `H` hidden size, `R` latents, `A` heads of the pooling head, `w` their width.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import MistralConfig

from nvembed_mcore.config import LoraConfig, PoolingConfig
from nvembed_mcore.model.lora import adapted_linears

# Dense peaks in FLOP/s for bfloat16 and float16 on tensor cores, from NVIDIA's data sheets (half of the figure
# "with sparsity"). A row fits when all its words are in the device's name; the more special rows come first.
_PEAK_FLOPS: tuple[tuple[frozenset[str], float], ...] = (
    (frozenset({"H100", "PCIE"}), 756e12),
    (frozenset({"H100", "NVL"}), 835e12),
    (frozenset({"H200", "NVL"}), 835e12),
    (frozenset({"A100"}), 312e12),
    (frozenset({"H100"}), 989e12),
    (frozenset({"H200"}), 989e12),
    (frozenset({"B200"}), 2250e12),
)


def device_peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Peak of one device in FLOP/s without sparsity, or None where it is not known.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it, for example `NVIDIA H100 80GB HBM3`.
        dtype: type of the matrix products. Only bfloat16 and float16 are known: for float32 the peak depends on
            whether TF32 is allowed.
    """
    words = set(re.findall(r"[A-Z0-9]+", device_name.upper()))
    # A MIG slice bears the name of the whole device but has only a part of its cores.
    if dtype not in (torch.bfloat16, torch.float16) or "MIG" in words:
        return None
    return next((peak for needed, peak in _PEAK_FLOPS if needed <= words), None)


def pack_flops(
    hf_config: MistralConfig,
    pooling: PoolingConfig,
    lengths: Sequence[int],
    *,
    causal: bool = False,
    lora: LoraConfig | None = None,
) -> float:
    """Model FLOPs of one forward and backward pass over a pack whose texts have `lengths` tokens.

    A matrix product `[m, k] x [k, n]` is `2mkn`; its backward pass is two of that size, so training costs three
    times the forward pass. With `s` a text's length, `T = sum(s)`, heads of width `d` (`a` for queries, `g` for
    keys and values), intermediate size `F` and `L` layers:

        linears      6 T L (2 a d H + 2 g d H + 3 F H)
        attention    12 L a d sum(s^2)            (scores and values, 2 s^2 a d each; `causal`: s (s + 1) / 2 for s^2)
        head         see `_head_flops`
        adapters     6 T L r (in + out) of each; the linears' weights then have no gradient, and 6 becomes 4

    Not counted, as usual: embedding look-up, norms, rotary, softmax, activations, biases, the loss, the optimizer,
    and any forward pass done again.

    Args:
        hf_config: the backbone.
        pooling: the head.
        lengths: tokens of each real text; dummies and padding do not belong here.
        causal: whether the backbone's mask is causal.
        lora: the adapters, if only they and the head train.
    """
    hidden, heads, groups = hf_config.hidden_size, hf_config.num_attention_heads, hf_config.num_key_value_heads
    width = getattr(hf_config, "head_dim", None) or hidden // heads
    tokens = sum(lengths)
    weights = 2 * heads * width * hidden + 2 * groups * width * hidden + 3 * hf_config.intermediate_size * hidden
    linears = 6 * tokens * weights
    if lora:
        shapes = adapted_linears(hidden, hf_config.intermediate_size, heads, groups, width)
        adapted = sum(
            one.inputs + rows for one in shapes for target, rows in one.rows.items() if target in lora.targets
        )
        linears = 4 * tokens * weights + 6 * tokens * lora.rank * adapted
    attention = 12 * heads * width * _attended_pairs(lengths, causal)
    return float(
        hf_config.num_hidden_layers * (linears + attention) + _head_flops(hf_config, pooling, lengths, causal)
    )


def _attended_pairs(lengths: Sequence[int], causal: bool) -> int:
    """(query, key) pairs that the mask allows."""
    return sum(s * (s + 1) // 2 if causal else s * s for s in lengths)


def _head_flops(hf_config: MistralConfig, pooling: PoolingConfig, lengths: Sequence[int], causal: bool) -> float:
    """FLOPs of the pooling head, forward and backward.

    `latent`, folded (docs/design.md): `6 T (2 H A R)` for the two matrices `[H, A R]` and `[A R, H]`, `6 T 12 H^2`
    for the GEGLU (`H -> 8H`, `4H -> H`), and once a pack `24 R H A w` for making the two matrices: four products of
    `2 R H A w` (keys, values, and their products with the query's and the output's projection).
    `self_attention`: `6 T (4 H A w)` for its projections, `12 A w sum(s^2)` and the GEGLU.
    `multi_layer`, for each of `B` texts with `L` layers: `18 L H A w` for keys, values and the values' way through the
    output's projection, `6 R L (A w + A H)` for scores and weighted values, `6 R 12 H^2` for the GEGLU; and once a
    pack `6 R H A w` for the queries. The others have no weights.
    """
    if pooling.kind in ("mean", "last"):
        return 0.0
    tokens, hidden = sum(lengths), hf_config.hidden_size
    inner = pooling.num_heads * (pooling.head_width or hidden)
    if pooling.kind == "multi_layer":
        layers, latents = hf_config.num_hidden_layers, pooling.num_latents
        attention = 18 * layers * hidden * inner + 6 * latents * layers * (inner + pooling.num_heads * hidden)
        return len(lengths) * (attention + 6 * latents * 12 * hidden**2) + 6 * latents * hidden * inner
    mlp = 6 * tokens * 12 * hidden**2
    if pooling.kind == "self_attention":
        return 6 * tokens * 4 * hidden * inner + 12 * inner * _attended_pairs(lengths, causal) + mlp
    folded = 6 * tokens * 2 * hidden * pooling.num_heads * pooling.num_latents
    fold_once = 24 * pooling.num_latents * hidden * inner
    return folded + fold_once + mlp


class PhaseTimer:
    """Seconds by named phase of a step.

    A phase may be entered any number of times in a step; its seconds add up. Phases do not nest.

        timer = PhaseTimer(device.synchronize)
        with timer("embed"):
            ...
        seconds = timer.lap()  # {"embed": ..., "total": ...}, and the timer starts over
    """

    def __init__(
        self, synchronize: Callable[[], None] = lambda: None, entered: Callable[[str], None] = lambda phase: None
    ) -> None:
        """
        Args:
            synchronize: waits for the device, so that work still queued counts for the phase that queued it.
            entered: is told of each phase that begins.
        """
        self._synchronize, self._entered = synchronize, entered
        self._open: str | None = None
        self._start_over()

    def _start_over(self) -> None:
        self._seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time of the `with` block for `phase`; a block that raises counts too."""
        assert self._open is None, f"phase {phase!r} inside phase {self._open!r} would be counted twice"
        assert phase != "total", "`total` is the whole step"
        self._open = phase
        self._entered(phase)
        self._synchronize()
        start = time.perf_counter()
        try:
            yield
            self._synchronize()
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start
            self._open = None

    def lap(self) -> dict[str, float]:
        """Seconds of each phase and `total`, the time since the timer was made or since the last lap; starts over."""
        seconds = self._seconds | {"total": time.perf_counter() - self._began}
        self._start_over()
        return seconds


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One training line of `metrics.jsonl`: a step of all ranks together."""

    step: int
    """Optimizer steps done, counted from 1."""
    loss: float
    """Mean contrastive loss over the queries of the global batch."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    lr: float
    """Learning rate of this step."""
    real_tokens: int
    """Tokens of texts in the step, over all ranks."""
    padded_tokens: int
    """Tokens that went through the model, over all ranks: the real ones and those that only fill."""
    seconds: dict[str, float]
    """Seconds by phase (`data`, `embed`, `score`, `backward`, `optimizer`) and `total`: `PhaseTimer.lap`."""
    texts: int
    """Queries and documents of the global batch."""
    flops: float | None = None
    """Model FLOPs of the step over all ranks: the sum of `pack_flops`."""
    peak_flops: float | None = None
    """Sum of the peaks of all devices in FLOP/s; None where it is not known."""
    communication: dict[str, float] = field(default_factory=dict)
    """Seconds in which a rank communicated or waited to, by group; the mean of all ranks. Empty: not measured in this
    step."""

    def __post_init__(self) -> None:
        assert "total" in self.seconds, f"seconds lack `total`: {sorted(self.seconds)}"
        assert self.padded_tokens >= self.real_tokens, f"{self.padded_tokens} tokens cannot hold {self.real_tokens}"

    @property
    def pad_fraction(self) -> float:
        """Share of the tokens that only fill."""
        return 1 - self.real_tokens / self.padded_tokens if self.padded_tokens else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Real tokens a second over the whole step."""
        return self.real_tokens / self.seconds["total"]

    @property
    def padded_tokens_per_second(self) -> float:
        """What the machine did, fill included: as close to `tokens_per_second` as packing is good."""
        return self.padded_tokens / self.seconds["total"]

    @property
    def mfu(self) -> float | None:
        """Model FLOPs a second as a share of the devices' peak; None where one of both is not known."""
        if self.flops is None or self.peak_flops is None:
            return None
        return self.flops / (self.seconds["total"] * self.peak_flops)

    def as_dict(self) -> dict[str, float]:
        """The flat line: `seconds` for the total, `seconds_<phase>` for each phase, what is not known left out."""
        line: dict[str, float] = {
            "step": self.step,
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "lr": self.lr,
            "real_tokens": self.real_tokens,
            "padded_tokens": self.padded_tokens,
            "texts": self.texts,
            "pad_fraction": self.pad_fraction,
            "tokens_per_second": self.tokens_per_second,
            "padded_tokens_per_second": self.padded_tokens_per_second,
            "seconds": self.seconds["total"],
        }
        line |= {f"seconds_{phase}": value for phase, value in self.seconds.items() if phase != "total"}
        if self.flops is not None:
            line["flops"] = self.flops
        if self.mfu is not None:
            line["mfu"] = self.mfu
        if self.communication:
            line["communication_seconds"] = sum(self.communication.values())
        line |= {f"communication_seconds_{group}": value for group, value in self.communication.items()}
        return line
