"""Summaries of the states after each layer, which multi-layer pooling reads (arXiv 2409.02727).

Letters: `t` tokens of this rank, `B` sequences of a pack, `l` layers done so far, `H` hidden size.

The sums are taken as the layers come. Between pipeline stages those of the layers so far travel as rows behind the
hidden states, and their gradients come back the same way. Under sequence and context parallelism they are sums over
this rank's tokens all the way; the encoder adds those of the ranks once, before the head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from nvembed_mcore.model.pooling import segment_sum


class LayerSummaries:
    """What one pack's texts are after each layer so far: a list of [B, H] in the dtype of the hidden states."""

    def __init__(self, weights: torch.Tensor, segment_ids: torch.Tensor, num_segments: int) -> None:
        """`weights` float32 [t] and `segment_ids` int64 [t] as in `segment_sum`, of this rank's tokens."""
        self.weights, self.segment_ids, self.num_segments = weights, segment_ids, num_segments
        self.layers: list[torch.Tensor] = []

    def add(self, states: torch.Tensor) -> None:
        """Summarise the states [t, H] after the next layer."""
        summary = segment_sum(states, self.weights, self.segment_ids, self.num_segments)
        # Rounded at once, because that is how it would travel: the stages must not be seen in the numbers.
        self.layers.append(summary.to(states.dtype))

    def append_to(self, hidden: torch.Tensor) -> torch.Tensor:
        """What goes to the next stage: hidden states [t, 1, H] -> [t + l * B, 1, H]."""
        return torch.cat([hidden, *(layer[:, None] for layer in self.layers)])

    def take_from(self, received: torch.Tensor) -> torch.Tensor:
        """The other way: [t + l * B, 1, H] -> [t, 1, H], and the rows behind become the summaries."""
        hidden, rows = received.split([len(self.weights), received.size(0) - len(self.weights)])
        self.layers = list(rows[:, 0].split(self.num_segments))
        return hidden


def watch_layers(layers: nn.ModuleList, num_layers: int) -> None:
    """Let Megatron's layers add their states to the summaries of the pack that goes through; all but the last one of
    the model, behind which the final norm comes first."""

    def summarise(module: nn.Module, args: Sequence, kwargs: dict, output: tuple) -> None:
        kwargs["packed_seq_params"].summaries.add(output[0][:, 0])

    for layer in layers:
        if layer.layer_number < num_layers:
            layer.register_forward_hook(summarise, with_kwargs=True)
