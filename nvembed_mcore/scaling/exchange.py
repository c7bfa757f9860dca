"""Which way the gradients of texts take to their ranks, decided as `score.Scorer` does."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nvembed_mcore.scaling.balance import Planned
    from nvembed_mcore.scaling.workload import Workload

FLOPS_PER_BYTE = {("cuda", "float32"): 500, ("cuda", "bfloat16"): 7000, ("cpu", "float32"): 50}
"""As in `score`, which this room does not import."""


def recomputes(workload: Workload, plan: Planned, step: int) -> bool:
    """Whether each rank makes its texts' gradients alone, in a sampled step with this plan."""
    if workload.exchange != "auto":
        return workload.exchange == "recompute"
    if workload.loss.false_negative_margin is not None:
        return False
    num_texts, ranks, size = len(plan.sizes), len(plan.packs), workload.architecture.hidden_size
    passages = int((plan.texts - plan.queries).max())
    pairs = int(workload.is_positive[step].sum())
    bytes_saved = 4 * num_texts * size * (ranks - 1) / ranks
    flops = 2 * size * (2 * pairs * passages - math.ceil(pairs / ranks) * (num_texts - workload.num_queries))
    products = workload.dtype if workload.device_type == "cuda" else "float32"
    return flops < bytes_saved * FLOPS_PER_BYTE[workload.device_type, products]
