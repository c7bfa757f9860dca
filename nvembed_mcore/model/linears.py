"""The linears of a layer, by their sizes: what adapters, checkpoints and FLOP counts must agree on.

Letters: `H` hidden size, `F` feed-forward width, `A` query heads, `G` key/value groups, `d` head width.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AdaptedLinear:
    """What an adapter must know of a linear of Megatron's layer.

    Attributes:
        path: the linear, seen from its layer.
        inputs: its global number of inputs.
        rows: projection -> its global number of output rows.
        groups: the output consists of so many groups, each with its rows of all projections in order.
        is_row_parallel: whether tensor ranks split inputs, otherwise they split outputs.
    """

    path: str
    inputs: int
    rows: dict[str, int]
    groups: int = 1
    is_row_parallel: bool = False

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


def adapted_linears(hidden: int, ffn: int, heads: int, groups: int, width: int) -> list[AdaptedLinear]:
    """The four linears of a layer."""
    inner, of_groups = heads * width, groups * width
    return [
        AdaptedLinear("self_attention.linear_qkv", hidden, {"q": inner, "k": of_groups, "v": of_groups}, groups),
        AdaptedLinear("self_attention.linear_proj", inner, {"o": hidden}, is_row_parallel=True),
        AdaptedLinear("mlp.linear_fc1", hidden, {"gate": ffn, "up": ffn}),
        AdaptedLinear("mlp.linear_fc2", ffn, {"down": hidden}, is_row_parallel=True),
    ]
