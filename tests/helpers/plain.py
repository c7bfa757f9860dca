"""Training on one process that holds the whole batch, written as plainly as possible; shares no code with the step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from transformers import MistralConfig, MistralModel

from nvembed_mcore.checkpoint.names import name_table, to_hf
from nvembed_mcore.config import LoraConfig, PoolingConfig
from nvembed_mcore.config_step import DistillationConfig
from nvembed_mcore.data.batch import Batch, Sample, make_batch
from tests.helpers import models
from tests.helpers.passes import whole_loss

HEADS, LATENTS = 4, 6
TEMPERATURE = 0.3
"""Lower ones magnify the rounding of the scores, and that is all that they would add here."""


def step_config(**changes) -> MistralConfig:
    """The tiny model, with weights that are drawn smaller: two steps magnify the rounding of the first one less."""
    return models.tiny_config(**{"initializer_range": 0.05, **changes})


def pooling_config(kind: str) -> PoolingConfig:
    return PoolingConfig(kind=kind, num_latents=LATENTS, num_heads=HEADS, head_width=12)


def random_head(hidden: int, kind: str, num_layers: int = 4) -> dict[str, torch.Tensor]:
    """Random weights of a head, by the trainer's own names; empty for kinds without."""
    from nvembed_mcore.model.pooling import build_head

    head = build_head(hidden, pooling_config(kind), num_layers)
    if head is None:
        return {}
    torch.manual_seed(3)
    return {name: torch.randn_like(value) * 0.3 for name, value in head.state_dict().items()}


def lora_config(targets: tuple[str, ...]) -> LoraConfig | None:
    return LoraConfig(rank=3, alpha=5.0, dropout=0.0, targets=list(targets)) if targets else None


def random_adapters(config: MistralConfig, targets: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Random A and B (which would start at zero and keep A's gradient zero), by Hugging Face name."""
    generator = torch.Generator().manual_seed(4)
    entries = name_table(config, PoolingConfig(kind="mean"), lora_config(targets))
    shapes = {name: shape for entry in entries if entry.is_adapter for name, shape in entry.hf.items()}
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def add_adapters(model: MistralModel, adapters: dict[str, torch.Tensor], scale: float) -> None:
    """Add what adapters compute, `scale * B A x`, to the outputs of the model's own linears."""
    for name in adapters:
        path, _, which = name.rpartition(".lora_")
        if which == "A.weight":
            a, b = adapters[name], adapters[f"{path}.lora_B.weight"]
            module = model.get_submodule(path.removeprefix("embedding_model."))
            module.register_forward_hook(lambda _, x, out, a=a, b=b: out + scale * (x[0] @ a.T) @ b.T)


@lru_cache
def training_batch(num_queries: int, number: int, vocab_size: int = 250) -> Batch:
    """Unequal numbers of negatives, shared documents, several positives, two data sets, queries without in-batch.

    Each but query 5 has a teacher's scores; queries 0 and 3 have one or two passages."""
    rng, teacher = np.random.default_rng(6 + number), np.random.default_rng(60 + number)
    samples = []
    for i in range(num_queries):
        positives, negatives = 1 + (i % 3 == 2), (i + 1) % 4
        lengths = [int(n) for n in rng.integers(2, 40, 1 + positives + negatives)]
        texts = models.random_texts(lengths, vocab_size, seed=100 * number + i)
        ids = np.arange(10 * i, 10 * i + positives + negatives)
        if i == 3:
            ids[0] = 0  # the document of query 0's first positive
        if i == 1 and negatives:
            ids[-1] = 1000  # another positive of query 0, not chosen in this step, stands among query 1's negatives
        positive_ids = np.append(ids[:positives], 1000 + i)
        in_batch, dataset = i % 5 != 4, int(i % 4 == 1)
        scores = None if i == 5 else teacher.normal(size=len(ids)).astype(np.float32)
        of_record = dict(num_positives=positives, dataset=dataset, teacher_scores=scores)
        samples.append(Sample(texts[0], texts[1:], ids, positive_ids, in_batch, **of_record))
    return make_batch(samples)


NO_TEACHER = DistillationConfig()


def plain_loss(
    embeddings: torch.Tensor,
    batch: Batch,
    temperature: float | torch.Tensor,
    *,
    mask_same_document: bool = True,
    in_batch_from: str = "batch",
    share_hard_negatives: bool = True,
    false_negative_margin: float | None = None,
    symmetric: bool = False,
    matryoshka_dims: tuple[int, ...] = (),
    distillation: DistillationConfig = NO_TEACHER,
) -> torch.Tensor:
    """Mean loss of the queries, one score after the other. `embeddings` float [N, D], queries first."""
    directions = [_queries_among_passages] + [_positives_among_queries] * symmetric
    total, terms, divergences = 0.0, 0, 0.0
    for size in (*matryoshka_dims, embeddings.size(1)):
        part = embeddings[:, :size]
        part = part / part.norm(dim=1, keepdim=True)
        cosines = part[: batch.num_queries] @ part[batch.num_queries :].T
        for direction in directions:
            terms += 1
            for i in range(batch.num_queries):
                own = [
                    j for j in range(len(batch.is_positive)) if batch.passage_query[j] == i and batch.is_positive[j]
                ]
                for p in own:
                    right, others = direction(
                        batch, i, p, cosines, mask_same_document, in_batch_from == "dataset", share_hard_negatives,
                        false_negative_margin,
                    )  # fmt: skip
                    scores = torch.stack([right, *others]) / temperature
                    total = total + (scores.logsumexp(0) - scores[0]) / len(own)
        if distillation.is_on:
            for i in range(batch.num_queries):
                divergences = divergences + _divergence(batch, i, cosines[i] / temperature, distillation)
    total = total / terms
    if distillation.is_on:
        total = total + distillation.weight * divergences / (1 + len(matryoshka_dims))
    return total / batch.num_queries


def _divergence(batch, i, scores, distillation):
    """KL of the teacher's distribution over the own passages of query `i` and the student's."""
    own = [j for j in range(len(scores)) if batch.passage_query[j] == i and not np.isnan(batch.teacher_scores[j])]
    if len(own) < 2:
        return 0.0
    teacher = torch.tensor(batch.teacher_scores[own]).to(scores) / distillation.teacher_temperature
    target, student = teacher.softmax(0), scores[own].softmax(0)
    return (target * (target.log() - student.log())).sum()


def plain_divergence(
    first: torch.Tensor,
    second: torch.Tensor,
    batch: Batch,
    temperature: float | torch.Tensor,
    *,
    mask_same_document: bool = True,
    in_batch_from: str = "batch",
    share_hard_negatives: bool = True,
    symmetric: bool = False,
    matryoshka_dims: tuple[int, ...] = (),
    distillation: object = None,
) -> torch.Tensor:
    """Symmetric KL divergence of the score distributions of two embeddings [N, D] of the same texts, as `plain_loss`
    averages its terms; a teacher has no part in it."""
    how = (mask_same_document, in_batch_from == "dataset", share_hard_negatives, None)
    directions = [_queries_among_passages] + [_positives_among_queries] * symmetric
    total, sizes = 0.0, (*matryoshka_dims, first.size(1))
    for size in sizes:
        views = [torch.nn.functional.normalize(view[:, :size], dim=1) for view in (first, second)]
        cosines = [view[: batch.num_queries] @ view[batch.num_queries :].T for view in views]
        for direction in directions:
            for p in np.flatnonzero(batch.is_positive):
                i = batch.passage_query[p]
                weight = 1 / np.sum(batch.is_positive & (batch.passage_query == i))
                rows = [direction(batch, i, p, one, *how) for one in cosines]
                logs = [(torch.stack([right, *others]) / temperature).log_softmax(0) for right, others in rows]
                for one, other in (logs, logs[::-1]):
                    total = total + weight / 2 * (one.exp() * (one - other)).sum()
    return total / batch.num_queries / len(directions) / len(sizes)


def _queries_among_passages(batch, i, p, cosines, same_document, same_dataset, share_hard, margin):
    """The cosine of query `i` and its positive `p`, and those with all its negatives."""
    others = []
    for j in range(len(batch.is_positive)):
        owner = batch.passage_query[j]
        if j == p or (same_document and batch.passage_ids[j] in batch.positive_ids[i]):
            continue
        if owner == i and batch.is_positive[j]:
            continue  # another positive of its own
        if owner != i:
            if not batch.in_batch[i] or (same_dataset and batch.dataset[owner] != batch.dataset[i]):
                continue
            if not (share_hard or batch.is_positive[j]):
                continue
            if margin is not None and cosines[i, j] > cosines[i, p] + margin:
                continue
        others.append(cosines[i, j])
    return cosines[i, p], others


def _positives_among_queries(batch, i, p, cosines, same_document, same_dataset, share_hard, margin):
    """The cosine of positive `p` and its query `i`, and those with all other queries that take part."""
    others = []
    for k in range(batch.num_queries):
        if k == i or not batch.in_batch[i] or (same_dataset and batch.dataset[k] != batch.dataset[i]):
            continue
        if same_document and batch.passage_ids[p] in batch.positive_ids[k]:
            continue
        if margin is not None and cosines[k, p] > cosines[i, p] + margin:
            continue
        others.append(cosines[k, p])
    return cosines[i, p], others


@dataclass(frozen=True)
class PlainStep:
    """One step of the reference. `grads` (clipped) and `parameters` (afterwards) by Hugging Face name, `log_scale`."""

    loss: float
    norm: float
    grads: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]


_runs: dict[str, list[PlainStep]] = {}


def run_plainly(num_queries: int, kind: str, clip: float, targets: tuple[str, ...] = (), **loss) -> list[PlainStep]:
    """Two training steps with torch's AdamW; the same scenario is computed once in a process."""
    key = repr((num_queries, kind, clip, targets, sorted(loss.items())))
    if key not in _runs:
        _runs[key] = _run(num_queries, kind, clip, targets, **loss)
    return _runs[key]


def _run(
    num_queries: int,
    kind: str,
    clip: float,
    targets,
    learn_temperature=False,
    temperature=TEMPERATURE,
    epsilon=0.0,
    r_drop_weight=0.0,
    **loss,
) -> list[PlainStep]:
    from tests.helpers.cases import OPTIM

    config = step_config()
    # In float64, so that the differences are those of our rounding.
    model = models.in_float64(models.hf_reference(config))
    head = {name: value.double().requires_grad_() for name, value in random_head(config.hidden_size, kind).items()}
    log_scale = torch.full((1,), -float(np.log(temperature)), dtype=torch.float64).requires_grad_(learn_temperature)
    adapters = {name: value.double().requires_grad_() for name, value in random_adapters(config, targets).items()}
    if targets:
        model.requires_grad_(False)
        add_adapters(model, adapters, lora_config(targets).scale)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    everything = [*trained, *adapters.values(), *head.values(), *([log_scale] if learn_temperature else [])]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in everything if p.dim() > 1], "weight_decay": OPTIM["weight_decay"]},
            {"params": [p for p in everything if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=OPTIM["lr"],
        betas=(0.9, 0.999),
        eps=OPTIM["eps"],
    )
    steps = []
    for number in (1, 2):
        batch = training_batch(num_queries, number)
        optimizer.zero_grad()

        def embed(batch=batch) -> torch.Tensor:
            return torch.stack([models.reference_embedding(model, head, t, kind, HEADS) for t in batch.texts])

        def score(views: list[torch.Tensor], batch=batch) -> torch.Tensor:
            value = sum(plain_loss(view, batch, torch.exp(-log_scale), **loss) for view in views) / len(views)
            if r_drop_weight:
                value = value + r_drop_weight * plain_divergence(*views, batch, torch.exp(-log_scale), **loss)
            return value

        value = whole_loss(model.get_input_embeddings(), embed, score, epsilon, 2 if r_drop_weight else 1)
        value.backward()
        grads = [p.grad for p in everything if p.grad is not None]
        norm = torch.sqrt(sum(grad.double().pow(2).sum() for grad in grads)).item()
        for grad in grads:
            grad.mul_(min(1.0, clip / (norm + 1e-6)) if clip else 1.0)
        optimizer.step()
        named = {"grads": lambda p: p.grad, "parameters": lambda p: p.detach().clone()}
        found = {
            what: _by_hf_name(config, kind, model, head | adapters, log_scale, read) for what, read in named.items()
        }
        steps.append(PlainStep(loss=value.item(), norm=norm, **found))
    return steps


def _by_hf_name(config, kind, model, others, log_scale, read) -> dict[str, torch.Tensor]:
    """`others`: the head's by the trainer's names, adapters by Hugging Face's."""
    table = {entry.name: entry for entry in name_table(config, pooling_config(kind))}
    found = {f"embedding_model.{name}": read(p) for name, p in model.named_parameters()}
    for name, value in others.items():
        found |= {name: read(value)} if ".lora_" in name else to_hf(table[f"pooling.{name}"], read(value))
    found = {name: value.clone() for name, value in found.items() if value is not None}
    return found | ({"log_scale": read(log_scale).clone()} if log_scale.requires_grad else {})
