"""What a step computes, whatever the layout: the model, the loss, and the texts of a few batches.

Letters: `S` sampled steps, `N` texts of the largest of their batches, `Q` queries of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from nvembed_mcore.config import LoraConfig, LossConfig, PoolingConfig, RunConfig
from nvembed_mcore.scaling.lengths import Lengths as Lengths
from nvembed_mcore.scaling.lengths import sample_lengths as sample_lengths

if TYPE_CHECKING:
    from nvembed_mcore.scaling.architecture import Architecture


@dataclass(frozen=True, eq=False)
class Workload:
    """A step's work.

    Attributes:
        dtype: of weights and activations.
        device_type: what computes it; it decides what `auto` of data type and exchange mean.
        backend: whose modules compute the layers.
        fp8, fp8_attention: as in `precision`.
        causal: whether attention is.
        exchange: `step.gradient_exchange`.
        averages: whether the weights are averaged.
        lengths: int64 [S, N], as `Lengths.tokens`.
        num_queries: Q.
        steps: of the whole run.
        max_length: the longest text that the configuration allows.
        walks: how often a step walks through its packs: with `step.fgm_epsilon` twice.
    """

    architecture: Architecture
    pooling: PoolingConfig
    lora: LoraConfig | None
    loss: LossConfig
    dtype: Literal["float32", "bfloat16"]
    device_type: Literal["cuda", "cpu"]
    backend: Literal["transformer_engine", "local"]
    fp8: Literal["off", "delayed", "tensorwise", "blockwise", "mxfp8"]
    fp8_attention: bool
    causal: bool
    exchange: Literal["auto", "reduce_scatter", "recompute"]
    averages: bool
    lengths: np.ndarray
    query: np.ndarray
    is_positive: np.ndarray
    source: str
    num_queries: int
    steps: int
    max_length: int
    walks: int = 1

    @classmethod
    def of(
        cls,
        config: RunConfig,
        architecture: Architecture,
        lengths: Lengths,
        device_type: Literal["cuda", "cpu"] = "cuda",
    ) -> Workload:
        """The work of a run of `config` on a device; on CUDA TransformerEngine computes, unless it says otherwise."""
        is_local = device_type == "cpu" or config.model.backend == "local"
        dtype = config.precision.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device_type == "cuda" else "float32"
        return cls(
            architecture=architecture,
            pooling=config.model.pooling,
            lora=config.model.adapters,
            loss=config.loss,
            dtype=dtype,
            device_type=device_type,
            backend="local" if is_local else "transformer_engine",
            fp8=config.precision.fp8,
            # What `auto` will measure is not known before: padded FP8 attention needs more memory, so it is assumed.
            fp8_attention=config.precision.fp8_attention != "off" and not is_local,
            causal=config.model.attention_mask == "causal",
            exchange=config.step.gradient_exchange,
            averages=config.optim.averages,
            lengths=lengths.tokens,
            query=lengths.query,
            is_positive=lengths.is_positive,
            source=lengths.source,
            num_queries=config.batch_size,
            steps=config.steps,
            max_length=max(config.data.max_query_tokens, config.data.max_document_tokens),
            walks=2 if config.step.fgm_epsilon else 1,
        )

    @property
    def views(self) -> int:
        """How often a walk embeds each text: with `loss.r_drop_weight` twice."""
        return 2 if self.loss.r_drop_weight else 1

    @property
    def element(self) -> int:
        """Bytes of a number of the weights and activations."""
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def alignment(self) -> int:
        """Tokens of a tensor rank's part of a pack are a multiple of this, as `model.backend.Backend.alignment`."""
        return {"off": 1, "mxfp8": 32}.get(self.fp8, 16)

    def texts(self, step: int) -> np.ndarray:
        """Tokens of the texts of a sampled step, int64, none of them 0."""
        return self.lengths[step][self.lengths[step] > 0]

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens of a global batch."""
        return float(self.lengths.sum(1).mean())
