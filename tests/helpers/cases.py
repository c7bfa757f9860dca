"""What the processes of a `World` run. Every function is called on all ranks and returns small results."""

from __future__ import annotations

import numpy as np
import torch

from nvembed_mcore.config import LossConfig, ModelConfig, OptimConfig, ParallelConfig, PoolingConfig, StepConfig
from nvembed_mcore.data.batch import Batch, Sample, make_batch
from nvembed_mcore.data.packing import make_pack
from tests.helpers import models

HEADS, LATENTS = 4, 6


def layout(tp: int, pp: int, sp: bool):
    from nvembed_mcore.parallel.groups import initialize

    parallel = ParallelConfig(tp=tp, pp=pp, sequence_parallel=sp, timeout_minutes=2)
    return parallel, initialize(parallel)


def pooling_config(kind: str) -> PoolingConfig:
    return PoolingConfig(kind=kind, num_latents=LATENTS, num_heads=HEADS, head_width=12)


def random_head(hidden: int, kind: str) -> dict[str, torch.Tensor]:
    """Random weights of a head, by the trainer's own names; empty for kinds without."""
    from nvembed_mcore.model.pooling import build_head

    head = build_head(hidden, pooling_config(kind))
    if head is None:
        return {}
    torch.manual_seed(3)
    return {name: torch.randn_like(value) * 0.3 for name, value in head.state_dict().items()}


def build(hf_config, reference, head, kind, parallel, groups, mask="bidirectional", distributed=False):
    """Our encoder with the reference's weights, under Megatron's data parallelism."""
    from nvembed_mcore.checkpoint.names import local_shard, name_table, to_hf
    from nvembed_mcore.model.encoder import Encoder, wrap_data_parallel

    model = ModelConfig(config="unused", attention_mask=mask, pooling=pooling_config(kind))
    encoder = Encoder(hf_config, model, parallel, groups)
    table = {entry.name: entry for entry in name_table(hf_config, pooling_config(kind))}
    source = {f"embedding_model.{name}": value for name, value in reference.state_dict().items()}
    for name, value in head.items():
        source.update(to_hf(table[f"pooling.{name}"], value))
    parameters = encoder.parameters_by_global_name()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(local_shard(table[name], source.__getitem__, groups.tp_rank, groups.tp_size))
    return wrap_data_parallel(encoder, distributed_optimizer=distributed), table, parameters


def encoder_states(tp: int, pp: int, sp: bool, mask: str = "bidirectional", lengths=(7, 16, 3, 12, 2, 24)):
    """Largest differences of embeddings (mean pooling of single tokens = hidden states) and of gradients from HF."""
    from nvembed_mcore.step import pack_multiple, run_schedule

    parallel, groups = layout(tp, pp, sp)
    hf_config = models.tiny_config()
    reference = models.hf_reference(hf_config, is_causal=mask == "causal")
    texts = models.random_texts(list(lengths), hf_config.vocab_size)
    model, table, parameters = build(hf_config, reference, {}, "mean", parallel, groups, mask)
    multiple = pack_multiple(model)
    packs = [make_pack(texts[:4], multiple), make_pack(texts[4:], multiple)]
    total = sum(lengths)
    upstream = torch.randn(total, hf_config.hidden_size, generator=torch.Generator().manual_seed(5))
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    found = {}

    # The head is taken off, so that what comes out of the last stage is every token's state.
    def states_of(states, pack, packing):
        if model.config.sequence_parallel:
            from megatron.core import tensor_parallel

            states = tensor_parallel.gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=False)
        return states[: pack.real_tokens]

    model.module._pool = states_of

    def surrogate(index, states):
        found[index] = states.detach()
        begin, end = (0, bounds[4]) if index == 0 else (bounds[4], total)
        return (states * upstream[begin:end]).sum() * len(packs)

    model.zero_grad_buffer()
    run_schedule(model, packs, surrogate, forward_only=False)
    expected = torch.cat([models.reference_states(reference, text) for text in texts])
    (expected * upstream).sum().backward()
    result = {"gradient": _gradient_difference(parameters, table, reference, {}, groups)}
    if groups.is_last_stage:
        result["states"] = (torch.cat([found[0], found[1]]) - expected).abs().max().item()
    return result


def _gradient_difference(parameters, table, reference, head, groups) -> float:
    """Largest |difference| of a parameter's gradient over the reference's largest |gradient| of that parameter."""
    from nvembed_mcore.checkpoint.names import local_shard, to_hf

    source = {f"embedding_model.{name}": p.grad for name, p in reference.named_parameters()}
    for name, value in head.items():
        source.update(to_hf(table[f"pooling.{name}"], value.grad))
    worst = 0.0
    for name, parameter in parameters.items():
        expected = local_shard(table[name], source.__getitem__, groups.tp_rank, groups.tp_size)
        scale = max(expected.abs().max().item(), 1e-3)
        worst = max(worst, (parameter.main_grad - expected).abs().max().item() / scale)
    return worst


def contrastive_batch(num_queries: int, vocab_size: int, hf_max: int = 40) -> Batch:
    """Unequal numbers of negatives, a shared document, several positives, and queries without in-batch negatives."""
    rng = np.random.default_rng(7)
    samples = []
    for i in range(num_queries):
        negatives = (i + 1) % 4
        lengths = [int(n) for n in rng.integers(2, hf_max, 2 + negatives)]
        texts = models.random_texts(lengths, vocab_size, seed=100 + i)
        ids = np.arange(10 * i, 10 * i + 1 + negatives)
        if i == 3:
            ids[0] = 0  # the document of query 0's positive
        positives = np.array([ids[0], 1000 + i]) if i % 3 == 0 else ids[:1]
        if i == 1 and negatives:
            ids[-1] = 1000  # another positive of query 0 stands among query 1's negatives
        samples.append(Sample(texts[0], texts[1:], ids, positives, in_batch=i % 5 != 4))
    return make_batch(samples)


def brute_force_loss(embeddings: torch.Tensor, batch: Batch, temperature: float) -> torch.Tensor:
    """Mean InfoNCE by a plain double loop over queries and passages."""
    queries, passages = embeddings[: batch.num_queries], embeddings[batch.num_queries :]
    total = 0.0
    for i in range(batch.num_queries):
        scores = []
        positive = batch.positive[i]
        for j in range(len(passages)):
            if j != positive:
                if batch.passage_ids[j] in batch.positive_ids[i]:
                    continue
                if batch.passage_query[j] != i and not batch.in_batch[i]:
                    continue
            score = (queries[i] @ passages[j]) / temperature
            if j == positive:
                right = score
            scores.append(score)
        total = total + torch.stack(scores).logsumexp(0) - right
    return total / batch.num_queries


def contrastive_step(
    tp: int,
    pp: int,
    sp: bool,
    way: str,
    kind: str = "latent",
    num_queries: int = 7,
    budget: int = 100_000,
    distributed: bool = True,
    clip: float = 0.5,
):
    """One step against one process holding the batch: loss, gradients, clip norm and the parameters afterwards."""
    from nvembed_mcore.metrics import PhaseTimer
    from nvembed_mcore.optim import build_optimizer, set_learning_rate
    from nvembed_mcore.step import ContrastiveStep

    parallel, groups = layout(tp, pp, sp)
    hf_config = models.tiny_config()
    reference = models.hf_reference(hf_config)
    head = {name: value.requires_grad_() for name, value in random_head(hf_config.hidden_size, kind).items()}
    batch = contrastive_batch(num_queries, hf_config.vocab_size)
    detached = {name: value.detach() for name, value in head.items()}
    model, table, parameters = build(hf_config, reference, detached, kind, parallel, groups, distributed=distributed)
    optim = OptimConfig(lr=1e-2, clip_norm=clip, weight_decay=0.1, distributed=distributed, eps=1e-3)
    optimizer = build_optimizer(optim, model)
    set_learning_rate(optimizer, optim.lr)
    step = ContrastiveStep(
        model,
        optimizer,
        groups,
        step=StepConfig(way=way, tokens_per_microbatch=budget),
        loss=LossConfig(temperature=0.1),
        seed=0,
    )
    output = step(batch, 1, PhaseTimer())

    expected = torch.stack([models.reference_embedding(reference, head, text, kind, HEADS) for text in batch.texts])
    loss = brute_force_loss(expected, batch, 0.1)
    loss.backward()
    norm = torch.sqrt(
        sum(p.grad.double().pow(2).sum() for p in [*reference.parameters(), *head.values()] if p.grad is not None)
    ).item()
    result = {
        "loss": abs(output.loss - loss.item()) / abs(loss.item()),
        "norm": abs(output.grad_norm - norm) / norm,
        "microbatches": output.num_microbatches,
    }
    if not distributed:
        # Clipping scales the gradients in place.
        factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        for p in [*reference.parameters(), *head.values()]:
            p.grad.mul_(factor)
        result["gradient"] = _gradient_difference(parameters, table, reference, head, groups)
        for p in [*reference.parameters(), *head.values()]:
            p.grad.div_(factor)
    result["parameters"] = _step_difference(parameters, table, reference, head, groups, optim, norm)
    return result


def _step_difference(parameters, table, reference, head, groups, optim: OptimConfig, norm: float) -> float:
    """Largest difference after one step of torch's AdamW on the clipped reference gradients, over the step's size."""
    from nvembed_mcore.checkpoint.names import local_shard, to_hf

    everything = [*reference.parameters(), *head.values()]
    for p in everything:
        p.grad.mul_(min(1.0, optim.clip_norm / (norm + 1e-6)) if optim.clip_norm else 1.0)
    groups_of = [
        {"params": [p for p in everything if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in everything if p.dim() == 1], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups_of, lr=optim.lr, betas=optim.betas, eps=optim.eps).step()
    source = {f"embedding_model.{name}": p.detach() for name, p in reference.named_parameters()}
    for name, value in head.items():
        source.update(to_hf(table[f"pooling.{name}"], value.detach()))
    worst = 0.0
    for name, parameter in parameters.items():
        expected = local_shard(table[name], source.__getitem__, groups.tp_rank, groups.tp_size)
        worst = max(worst, (parameter.detach() - expected).abs().max().item() / expected.abs().max().item())
    return worst


def gathered_rows(num_rows: list[int]):
    """Rows of the gather in global order, and the gradient that each rank's rows receive."""
    from nvembed_mcore.parallel.gather import gather_embeddings

    _, groups = layout(1, 1, False)
    numbers = np.random.default_rng(0).permutation(sum(num_rows))
    owned = np.split(numbers, np.cumsum(num_rows)[:-1])
    everything = torch.randn(sum(num_rows), 3, generator=torch.Generator().manual_seed(1))
    local = everything[torch.as_tensor(owned[groups.dp_rank])].requires_grad_()
    gathered = gather_embeddings(local, owned, groups.dp)
    (gathered * (groups.dp_rank + 1) * torch.arange(sum(num_rows))[:, None]).sum().backward()
    weight = sum(range(1, groups.dp_size + 1))
    expected = torch.as_tensor(owned[groups.dp_rank])[:, None].float() * weight
    return torch.equal(gathered, everything), (local.grad - expected).abs().max().item() if len(local) else 0.0


def dropout_step(way: str, tp: int = 1, sp: bool = False) -> tuple[float, float]:
    """Loss and gradient norm of a step with attention dropout."""
    from nvembed_mcore.metrics import PhaseTimer
    from nvembed_mcore.optim import build_optimizer
    from nvembed_mcore.step import ContrastiveStep

    parallel, groups = layout(tp, 1, sp)
    hf_config = models.tiny_config(attention_dropout=0.3)
    model, _, _ = build(hf_config, models.hf_reference(hf_config), {}, "mean", parallel, groups)
    optimizer = build_optimizer(OptimConfig(distributed=False), model)
    step = ContrastiveStep(model, optimizer, groups, step=StepConfig(way=way), loss=LossConfig(), seed=0)
    output = step(contrastive_batch(7, hf_config.vocab_size), 1, PhaseTimer())
    return output.loss, output.grad_norm
