"""The average itself, on one process: its definition, and what it is good for."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from nvembed_mcore.checkpoint.optimizer_state import AVERAGE
from nvembed_mcore.ema import decay_of, update_average

STEPS, DIMENSIONS, SEEDS = 400, 20, 8


def noisy_run(seed: int, decay: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Linear regression on four noisy samples a step at a constant rate: all weights [steps, dimensions], the average,
    and the true weights."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(DIMENSIONS, generator=generator)
    weights = torch.nn.Parameter(torch.zeros(DIMENSIONS))
    adam = torch.optim.Adam([weights], lr=0.05)
    optimizer = SimpleNamespace(chained_optimizers=[SimpleNamespace(is_stub_optimizer=False, optimizer=adam)])
    path = []
    for step in range(1, STEPS + 1):
        inputs = torch.randn(4, DIMENSIONS, generator=generator)
        noise = torch.randn(4, generator=generator)
        adam.zero_grad()
        ((inputs @ weights - inputs @ truth - noise) ** 2).mean().backward()
        adam.step()
        update_average(optimizer, decay, step)
        path.append(weights.detach().clone())
    return torch.stack(path), adam.state[weights][AVERAGE], truth


def test_it_is_a_loop_over_all_weights():
    path, average, _ = noisy_run(0, 0.98)
    expected = path[0].double().numpy()
    for step, weights in enumerate(path.double().numpy()[1:], 2):
        decay = min(0.98, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights
    np.testing.assert_allclose(average.numpy(), expected, rtol=0, atol=2e-6)
    # Without the warm-up, after 60 steps a third of the average would be its beginning.
    assert decay_of(0.98, 1) == 2 / 11 and decay_of(0.98, 60) == 61 / 70 and decay_of(0.98, 10_000) == 0.98


def test_it_is_nearer_to_the_truth_than_the_last_weights():
    """Held-out loss, which is the squared distance from the true weights and a constant: over all seeds, and its
    spread, too."""
    last, mean = [], []
    for seed in range(SEEDS):
        path, average, truth = noisy_run(seed, 0.98)
        last.append(float(((path[-1] - truth) ** 2).sum()))
        mean.append(float(((average - truth) ** 2).sum()))
    assert all(one < other for one, other in zip(mean, last, strict=True))
    assert np.mean(mean) < 0.5 * np.mean(last) and np.std(mean) < np.std(last)


def test_a_stage_without_trained_weights_has_none():
    update_average(SimpleNamespace(chained_optimizers=[SimpleNamespace(is_stub_optimizer=True)]), 0.9, 1)
