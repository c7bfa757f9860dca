"""Distillation in the scorer, against the plain loss. The function is called on all ranks."""

from __future__ import annotations

import numpy as np
import torch

from nvembed_mcore.config import DistillationConfig, LossConfig
from tests.helpers.cases import layout
from tests.helpers.plain import TEMPERATURE, plain_loss, training_batch


def taught_views(exchange: str) -> tuple[float, float]:
    """What distillation adds to the scores of two embeddings of each text (R-Drop), symmetric, at two sizes: largest
    relative difference from the plain loss of each view, of the loss and of this rank's gradient."""
    from nvembed_mcore.score import Scorer

    _, groups = layout(1, 1, False)
    batch = training_batch(7, 1)
    on = DistillationConfig(weight=0.7, teacher_temperature=0.5)
    numbers = np.random.default_rng(2).permutation(len(batch.texts))
    owned = np.array_split(numbers, groups.dp_size)
    mine = torch.as_tensor(owned[groups.dp_rank])
    vectors = torch.randn(2, len(numbers), 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    vectors = torch.nn.functional.normalize(vectors, dim=2)
    options, found, expected = dict(symmetric=True, matryoshka_dims=[4]), [], []
    for distillation in (DistillationConfig(), on):
        config = LossConfig(temperature=TEMPERATURE, r_drop_weight=0.4, distillation=distillation, **options)
        scorer = Scorer(config, groups, exchange, torch.float32)
        scores = scorer(batch, owned, vectors[:, mine].float(), TEMPERATURE)
        torch.distributed.all_reduce(scores.totals)
        found.append((scores.totals[0], scores.grad / groups.dp_size))
        leaf = vectors.clone().requires_grad_()
        plain = [plain_loss(view, batch, TEMPERATURE, distillation=distillation, **options) for view in leaf]
        loss = sum(plain) / 2
        expected.append((loss.detach() * batch.num_queries, torch.autograd.grad(loss, leaf)[0][:, mine]))
    differences = []
    for (plain, taught), (truth, more) in zip(zip(*found, strict=True), zip(*expected, strict=True), strict=True):
        added, right = (taught - plain).double(), more - truth
        # The plain loss sees vectors of any length, the scorer unit vectors: what leads along them says nothing.
        if added.dim():
            unit = vectors[:, mine]
            added = added - (added * unit).sum(2, keepdim=True) * unit
        differences.append(float((added - right).abs().max() / right.abs().max()))
    return tuple(differences)
