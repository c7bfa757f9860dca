"""Context parallelism: a pack that several ranks share, seen from one of them (docs/design.md).

Letters: `t` tokens of a rank, with those that fill sequences; `S` tokens of all sequences, without them; `B`
sequences; `G` key/value groups, `d` head width.

Each token of a text attends to all others, so a rank needs the keys and values of the whole pack for its own queries.
Everything else in the model is done for each token on its own, but the sum over a text's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist

from nvembed_mcore.data.packing import Split
from nvembed_mcore.parallel.gather import gather_tokens


@dataclass(frozen=True)
class Context:
    """The ranks that share a pack.

    Attributes:
        group: the ranks.
        split: which part this one has.
        lengths: int64 [B], tokens of each sequence of the whole pack.
        device: where tensors are to be.
    """

    group: dist.ProcessGroup
    split: Split
    lengths: np.ndarray
    device: torch.device

    @cached_property
    def own_lengths(self) -> np.ndarray:
        """Tokens of each sequence on this rank, with those that fill it: int64 [B], each at least 2."""
        return self.split.filled(self.lengths) // self.split.size

    @cached_property
    def own_bounds(self) -> torch.Tensor:
        """Running sum of `own_lengths`: int32 [B + 1]."""
        return bounds_of(self.own_lengths, self.device)

    @cached_property
    def filled_bounds(self) -> torch.Tensor:
        """Running sum of the sequences' tokens on all ranks, with those that fill them: int32 [B + 1]."""
        return bounds_of(self.split.filled(self.lengths), self.device)

    @cached_property
    def is_filler(self) -> torch.Tensor | None:
        """Bool [t], true at tokens that only fill a sequence; None where no sequence has any on any rank."""
        _, is_filler = self._places
        return torch.as_tensor(is_filler[self._own_places]).to(self.device) if is_filler.any() else None

    @cached_property
    def rows(self) -> torch.Tensor:
        """Where the pack's tokens stand among those of all ranks, one rank behind the other: int64 [S]."""
        row_of, is_filler = self._places
        return torch.as_tensor(row_of[~is_filler]).to(self.device)

    @cached_property
    def _own_places(self) -> np.ndarray:
        return self.split.places(self.split.filled(self.lengths))

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each place of the filled pack, its row among those of all ranks, and whether it only fills a sequence."""
        filled, size = self.split.filled(self.lengths), self.split.size
        order = np.concatenate([Split(rank, size).places(filled) for rank in range(size)])
        row_of = np.empty_like(order)
        row_of[order] = np.arange(len(order))
        positions = np.arange(len(order)) - np.repeat(np.cumsum(filled) - filled, filled)
        return row_of, positions >= np.repeat(self.lengths, filled)

    def gather(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [t, G, d] of this rank's tokens -> those of the whole pack, [S, G, d] each."""
        both = gather_tokens(torch.cat([key, value], dim=1), self.rows, self.group)
        return both.split([key.size(1), value.size(1)], dim=1)


def bounds_of(lengths: np.ndarray, device: torch.device) -> torch.Tensor:
    """Where sequences of these lengths [B] begin, and the end of the last: int32 [B + 1]."""
    return torch.as_tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32).to(device)
