"""Adversarial training of the embedded tokens: FGM (Miyato et al., arXiv 1605.07725).

    e' = e + epsilon g / |g|,   g the gradient of the step's loss to e, the embedded tokens of one text

A step with `epsilon` above 0 walks through its packs twice. The first walk is the step as it is, and keeps `g`; the
second one embeds the moved texts, whose loss is added. The parameters' gradients of both add up before the one update.
As in the paper `g` is a constant, and the norm is that of one text. Programs that wrap a training loop divide by the
norm of the gradient to the whole table instead: then how far a text is moved depends on what else is in its batch, and
on one process of many on how texts were spread over them, and a token that stands in a text twice moves alike in both
places. Here a text's move depends on its own gradient's direction only, so it is the same in every layout and packing.

Dropout is the same in both walks, because its seeds are (step.py): a text is moved against the very network that drops
so. A text without any gradient (all its scores are masked) stays where it is.

Letters: `t` tokens of a pack that this rank has (context-parallel ranks and, under sequence parallelism, tensor ranks
have a part each), `H` hidden size, `B` sequences of the pack.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nvembed_mcore.model.encoder import Encoder
from nvembed_mcore.parallel.gather import sum_over_token_parts
from nvembed_mcore.parallel.groups import Groups

ROWS_AT_ONCE = 1024
"""Tokens whose squares are added up together: in float64, which no gradient is too small for."""


@dataclass(frozen=True)
class _Kept:
    """Of a pack: the gradient to its embedded tokens [t, H], and each token's sequence, int64 [t], of `count`."""

    gradient: Tensor
    segments: Tensor
    count: int


class Adversary:
    """What stands behind the embedding of a model's tokens, on the first pipeline stage; elsewhere it does nothing.

    `select` says which pack comes next: packs are known by number, and R-Drop embeds each pack under two.
    """

    def __init__(self, encoder: Encoder, groups: Groups, epsilon: float) -> None:
        """
        Args:
            encoder: the stage's first chunk.
            epsilon: how far a text's embedded tokens are moved, all together.
        """
        self.encoder, self.groups, self.epsilon = encoder, groups, epsilon
        self._index = 0
        self._kept: dict[int, _Kept] = {}
        self._factors: dict[int, Tensor] = {}

    def select(self, index: int) -> None:
        """The next forward pass is that of pack number `index`."""
        self._index = index

    @property
    def bytes_per_token(self) -> float:
        """What is kept between both walks, for a token of the whole pack: its gradient, or this rank's share of it."""
        config = self.encoder.config
        if not self.encoder.pre_process:
            return 0.0
        split = config.tensor_model_parallel_size if config.sequence_parallel else 1
        return config.hidden_size * config.params_dtype.itemsize / (split * self.groups.cp_size)

    @contextmanager
    def keeps_gradients(self) -> Iterator[None]:
        """The first walk: texts as they are; what backward says of their embedded tokens is kept."""
        self._kept = {}
        with self._behind_embedding(self._keep):
            yield

    @contextmanager
    def moves_texts(self) -> Iterator[None]:
        """The second walk, over the same packs; all ranks of the first stage enter it together."""
        self._factors = self._lengths_to_factors() if self._kept else {}
        with self._behind_embedding(self._move):
            yield
        self._kept, self._factors = {}, {}

    @contextmanager
    def _behind_embedding(self, work) -> Iterator[None]:
        self.encoder.behind_embedding = work if self.encoder.pre_process else None
        try:
            yield
        finally:
            self.encoder.behind_embedding = None

    def _keep(self, hidden: Tensor, segments: Tensor, count: int) -> Tensor:
        """`hidden` [t, 1, H]; `segments` int64 [t], the tokens' sequences, of which there are `count`."""
        if torch.is_grad_enabled():
            index = self._index
            # A frozen table's rows would have none.
            hidden = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
            hidden.register_hook(lambda grad: self._kept.update({index: _Kept(grad[:, 0], segments, count)}))
        return hidden

    def _move(self, hidden: Tensor, segments: Tensor, count: int) -> Tensor:
        factor = self._factors[self._index].index_select(0, segments)
        return hidden + (self._kept[self._index].gradient * factor[:, None]).to(hidden.dtype)[:, None]

    def _lengths_to_factors(self) -> dict[int, Tensor]:
        """For each pack `epsilon / |g|` of its sequences, float32 [B]; 0 where there is no gradient."""
        packs = sorted(self._kept)
        squares = torch.cat([_squares(self._kept[index]) for index in packs])
        sum_over_token_parts(squares, self.groups, is_split=self.encoder.config.sequence_parallel)
        factors = torch.where(squares > 0, self.epsilon / squares.sqrt(), 0.0).float()
        return dict(zip(packs, factors.split([self._kept[index].count for index in packs]), strict=True))


def _squares(kept: _Kept) -> Tensor:
    """Sum of the squares of each sequence's gradient, over this rank's tokens: float64 [B]."""
    rows = [torch.linalg.vector_norm(some.double(), dim=1) for some in kept.gradient.split(ROWS_AT_ONCE)]
    return rows[0].new_zeros(kept.count).index_add_(0, kept.segments, torch.cat(rows).square())
