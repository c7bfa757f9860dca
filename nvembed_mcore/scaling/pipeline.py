"""Packs on their way through pipeline stages: how long it takes, how much of it is waiting, where to cut a model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from nvembed_mcore.scaling.layers import Terms, scaled


def walk(stages: Sequence[Terms], packs: float, chunks: int) -> Terms:
    """Seconds by term until `packs` went through stages that take `stages` for one pack.

    `packs x slowest + (sum of the others) / chunks`: the slowest stage works on one pack after the other; before its
    first and behind its last pack the others run alone, interleaved for a chunk only (arXiv 2104.04473, section 2.2).
    The second part is the term `bubble`. With 1F1B the seconds of a stage are those of both directions.
    """
    totals = [stage.total() for stage in stages]
    slowest = max(range(len(stages)), key=totals.__getitem__)
    terms = scaled(stages[slowest], packs)
    if len(stages) > 1:
        terms["bubble"] += (sum(totals) - totals[slowest]) / chunks
    return terms


def even_layers(layers: int, pp: int, chunks: int, first: float, last: float) -> tuple[int | None, int | None]:
    """Layers of the first and of the last stage that make the slowest stage as short as it can be.

    Of those whose slowest stage is equally long, the most even ones: the first and the last pack wait for each stage.

    Args:
        first, last: what embedding and head take, in layers.

    Returns:
        as in `Layout`; None, None where even stages are as good, or where there is no other way.
    """
    best, shortest = (None, None), (math.inf, math.inf)
    if layers % (pp * chunks) == 0:
        each = layers // pp
        shortest = max(each + first, each + last), 0.0  # kept wherever no other split has a shorter slowest stage
    for in_first in range(chunks, layers, chunks) if pp > 1 else ():
        for in_last in range(chunks, layers - in_first + 1, chunks):
            middle, left = divmod(layers - in_first - in_last, max(1, pp - 2))
            if left or (pp > 2 and middle % chunks) or (middle > 0) != (pp > 2):
                continue
            ends = in_first + first, in_last + last
            now = max(*ends, middle), sum(end**2 for end in ends) + (pp - 2) * middle**2
            if now < shortest:
                best, shortest = (in_first, in_last), now
    return best


def with_host(terms: Terms, host: float) -> Terms:
    """The same with the term `host`: how much longer the host needs to queue this than the device to compute it."""
    return terms + Counter(host=max(0.0, host - terms.total()))
