"""Averaged weights on all ranks of a layout: what they are, what the model has meanwhile, and what comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.helpers.cases import Case, build_step
from tests.helpers.models import random_texts
from tests.helpers.plain import training_batch
from tests.helpers.resumed import digest, inner_optimizers

STEPS = 4


def averaged(case: Case) -> dict[str, Any]:
    """Some steps, then the averaged weights in the model twice, once in a block that raises, then one more step.

    Returns:
        `off`: how far the model's averaged weights are from a loop over its weights in float64, the largest difference
        over the largest weight of a tensor. `moved`: how far they are from its weights, likewise. `is_back`: whether
        everything had the bits of before after each block. `losses`: of all steps.
    """
    from nvembed_mcore.ema import averaged_weights, decay_of
    from nvembed_mcore.metrics import PhaseTimer
    from nvembed_mcore.parallel.param_gather import finish_param_gather
    from nvembed_mcore.schedule import embed_texts

    step, groups, _, parameters = build_step(case)
    losses, loop = [], {}
    for number in range(1, STEPS + 1):
        losses.append(step(training_batch(case.queries, number), number, PhaseTimer()).loss)
        finish_param_gather(step.chunks)
        decay = decay_of(case.ema, number) if loop else 0.0
        for name, weight in parameters.items():
            loop[name] = decay * loop.get(name, 0.0) + (1 - decay) * weight.detach().double().cpu().numpy()
    before = _bits(step, parameters)
    with averaged_weights(step.chunks, step.optimizer):
        off = max(_distance(parameters[name], average) for name, average in loop.items())
        moved = _digests(parameters) != before["weights"]
        embed_texts(step.chunks, groups, random_texts([9, 3, 20], 250), 60)
    is_back = [_bits(step, parameters) == before]
    try:
        with averaged_weights(step.chunks, step.optimizer):
            raise KeyError("evaluation")
    except KeyError:
        is_back.append(_bits(step, parameters) == before)
    losses.append(step(training_batch(case.queries, STEPS + 1), STEPS + 1, PhaseTimer()).loss)
    return {"off": off, "moved": moved, "is_back": is_back, "losses": losses}


def without(case: Case) -> tuple[list[float], set[str]]:
    """Losses of the same steps where nobody evaluates, and what the optimizer has of a weight."""
    from nvembed_mcore.metrics import PhaseTimer

    step, *_ = build_step(case)
    losses = [step(training_batch(case.queries, n), n, PhaseTimer()).loss for n in range(1, STEPS + 2)]
    return losses, {key for one in inner_optimizers(step.optimizer) for state in one.state.values() for key in state}


def _distance(weight: torch.Tensor, average: np.ndarray) -> float:
    return np.abs(weight.detach().double().cpu().numpy() - average).max() / max(np.abs(average).max(), 1e-3)


def _digests(parameters: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: digest(parameter) for name, parameter in parameters.items()}


def _bits(step: Any, parameters: dict[str, torch.Tensor]) -> dict[str, Any]:
    inner = inner_optimizers(step.optimizer)
    states = [{key: digest(one) for key, one in state.items()} for each in inner for state in each.state.values()]
    mains = [digest(main) for each in inner for main in each.state]
    return {"weights": _digests(parameters), "states": states, "mains": mains}
