"""Steps that `tools/scaling` measures, in the processes of a `World`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tools" / "scaling"))  # its programs import one another

import real_cases
import real_steps

NAMED = {case.name: case for case in real_cases.cases(4)}


def measured(names: list[str]) -> list[real_steps.Measured]:
    """The named cases, one after the other, on this rank."""
    return [real_steps.measure(NAMED[name]) for name in names]


def parameters_by_part(name: str) -> tuple[int, list[dict[str, int]], list[list[int]]]:
    """Stage of this rank, and of the encoder as it is built here: by chunk, numbers of each parameter by its name,
    and of each bucket of Megatron's buffers."""
    from nvembed_mcore.parallel.groups import initialize

    groups = initialize(NAMED[name].config.parallel)
    step = real_steps.build(NAMED[name], groups)
    named = [{key: one.numel() for key, one in chunk.module.named_parameters()} for chunk in step.chunks]
    buckets = [
        [bucket.grad_data.numel() for buffer in chunk.buffers for bucket in buffer.buckets] for chunk in step.chunks
    ]
    return groups.pp_rank, named, buckets
