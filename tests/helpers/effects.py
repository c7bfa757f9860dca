"""Small trainings that show what FGM and R-Drop are for. Run by the processes of a `World`."""

from __future__ import annotations

import numpy as np

from nvembed_mcore.data.batch import Batch, Sample, make_batch
from nvembed_mcore.data.packing import Text
from tests.helpers.cases import Case, build_step

TOPICS, STEPS, HELD_OUT = 16, 60, 6
SMALL = {"num_hidden_layers": 2, "initializer_range": 0.1}


def topical_batch(number: int, seed: int) -> Batch:
    """A query and a passage for each topic, of words that only this topic has and of words that all have."""
    random = np.random.default_rng([seed, number])

    def text(topic: int, own: int, common: int) -> Text:
        words = np.concatenate([10 + 8 * topic + random.integers(0, 8, own), random.integers(200, 250, common)])
        return Text(random.permutation(words).astype(np.int32), 0)

    samples = [
        Sample(text(topic, 3, 3), [text(topic, 4, 8)], np.array([topic]), np.array([topic]), in_batch=True)
        for topic in range(TOPICS)
    ]
    return make_batch(samples)


def term_after(training: dict, measure: dict, dropout: float, seed: int) -> float:
    """Mean over held-out batches of the one term that steps with the options `measure` have, after as many steps with
    those of `training`. Options: `fgm`, `r_drop`."""
    from nvembed_mcore.metrics import PhaseTimer
    from nvembed_mcore.optim import set_learning_rate

    def step_of(rate: float, fgm: float = 0.0, r_drop: float = 0.0):
        case = Case(kind="mean", fgm=fgm, loss={"temperature": 0.05, "r_drop_weight": r_drop})
        step, _, _, parameters = build_step(case, **SMALL, attention_dropout=dropout)
        set_learning_rate(step.optimizer, rate)
        return step, parameters

    step, parameters = step_of(2e-3, **training)
    for number in range(1, STEPS + 1):
        step(topical_batch(number, seed), number, PhaseTimer())
    other, copies = step_of(0.0, **measure)
    for name, parameter in copies.items():
        parameter.data.copy_(parameters[name].data)
    found = [other(topical_batch(STEPS + number, seed), number, PhaseTimer()) for number in range(1, HELD_OUT + 1)]
    return float(np.mean([value for output in found for value in output.terms.values()]))
