"""What the processes of a `World` run. Every function is called on all ranks and returns small results."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch

from nvembed_mcore.config import (
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    StepConfig,
)
from nvembed_mcore.data.packing import make_pack
from tests.helpers import models
from tests.helpers.passes import FGM_WEIGHT, in_view
from tests.helpers.plain import (
    HEADS,
    LATENTS,
    TEMPERATURE,
    lora_config,
    pooling_config,
    random_adapters,
    random_head,
    run_plainly,
    step_config,
    training_batch,
)

_layouts: dict = {}


def layout(tp: int, pp: int, sp: bool, chunks_per_stage: int = 1, cp: int = 1, **more):
    """The layout's configuration and groups; within a job they are made once."""
    from nvembed_mcore.parallel.groups import initialize

    parallel = ParallelConfig(
        tp=tp, pp=pp, cp=cp, sequence_parallel=sp, chunks_per_stage=chunks_per_stage, timeout_minutes=2, **more
    )
    key = (tp, pp, cp, chunks_per_stage)
    if not torch.distributed.is_initialized() or key not in _layouts:
        _layouts.clear()
        _layouts[key] = initialize(parallel)
    return parallel, _layouts[key]


def build(
    hf_config,
    reference,
    head,
    kind,
    parallel,
    groups,
    mask="bidirectional",
    distributed=False,
    temperature=None,
    lora=None,
    fp8="off",
    backend="local",
    dtype="float32",
):
    """Our encoder's chunks with the reference's weights, under Megatron's data parallelism; table and parameters."""
    from nvembed_mcore.checkpoint.names import local_shard, name_table, to_hf
    from nvembed_mcore.model.encoder import Encoder, wrap_data_parallel

    lora = lora or LoraConfig()
    pooling = pooling_config(kind)
    model = ModelConfig(config="unused", attention_mask=mask, pooling=pooling, lora=lora, backend=backend)
    encoders = [
        Encoder(
            hf_config,
            model,
            parallel,
            groups,
            precision=PrecisionConfig(dtype=dtype, fp8=fp8),
            chunk=chunk,
            temperature=temperature,
        )
        for chunk in range(parallel.chunks_per_stage)
    ]
    table = {entry.name: entry for entry in name_table(hf_config, pooling, model.adapters)}
    source = {f"embedding_model.{name}": value for name, value in reference.state_dict().items()}
    source |= random_adapters(hf_config, tuple(lora.targets)) if model.adapters else {}
    for name, value in head.items():
        source.update(to_hf(table[f"pooling.{name}"], value))
    parameters = {}
    for encoder in encoders:
        parameters |= encoder.parameters_by_global_name()
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name in table:  # a learned temperature is not
                parameter.copy_(local_shard(table[name], source.__getitem__, groups.tp_rank, groups.tp_size))
    return wrap_data_parallel(encoders, parallel, distributed_optimizer=distributed), table, parameters


def worst_difference(found, expected, table, groups, least: float = 1e-4) -> float:
    """Largest |difference| of a tensor over the largest |value| that is expected of it, or over `least`.

    `found` by our names, local shards. `expected` by Hugging Face name, whole, and `log_scale`.
    """
    from nvembed_mcore.checkpoint.names import local_shard

    worst = 0.0
    for name, value in found.items():
        if name in table:
            truth = local_shard(table[name], expected.__getitem__, groups.tp_rank, groups.tp_size)
        else:
            truth = expected[name]
        scale = max(truth.abs().max().item(), least)
        worst = max(worst, (value.detach().cpu() - truth).abs().max().item() / scale)
    return worst


@dataclass(frozen=True, kw_only=True)
class Case:
    """One place of the proof grid."""

    world: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    chunks: int = 1
    first: int | None = None
    last: int | None = None
    sp: bool = False
    way: str = "auto"
    budget: int = 100_000
    distributed: bool = True
    overlap: bool = False
    gather: bool = False
    exchange: str = "auto"
    loss: dict = field(default_factory=dict, hash=False)
    kind: str = "latent"
    queries: int = 7
    clip: float = 0.5
    targets: tuple[str, ...] = ()
    lora_dropout: float = 0.0
    fgm: float = 0.0
    fp8: str = "off"
    backend: str = "local"
    dtype: str = "float32"
    ema: float | None = None

    @property
    def layout(self) -> tuple[int, int, bool, int, int, int]:
        """Processes, tensor-parallel size, sequence parallelism, pipeline size, chunks of a stage, context size."""
        return self.world, self.tp, self.sp, self.pp, self.chunks, self.cp

    @property
    def ranks(self) -> int:
        """Data-parallel size."""
        return self.world // (self.tp * self.pp * self.cp)

    def __str__(self) -> str:
        """What differs from the defaults."""
        parts = [f"{self.world} processes"] + [
            f"{name}={value}"
            for name, value in vars(self).items()
            if name != "world" and value != getattr(Case, name, {})
        ]
        return ", ".join(parts)


OPTIM = dict(lr=1e-2, weight_decay=0.1, eps=1e-3)


def build_step(case: Case, **changes):
    """The step of a case, its groups, and the model's name table and parameters. `changes` to the architecture."""
    from nvembed_mcore.optim import build_optimizer, set_learning_rate
    from nvembed_mcore.step import ContrastiveStep

    # Small buckets, so that there are several to overlap.
    overlap = dict(overlap_grad_reduce=case.overlap, bucket_size=4000 if case.overlap else None)
    overlap |= dict(overlap_param_gather=case.gather)
    overlap |= dict(layers_in_first_stage=case.first, layers_in_last_stage=case.last)
    parallel, groups = layout(case.tp, case.pp, case.sp, case.chunks, case.cp, **overlap)
    hf_config = step_config(**changes)
    loss = LossConfig(**{"temperature": TEMPERATURE, **case.loss})
    chunks, table, parameters = build(
        hf_config,
        models.hf_reference(hf_config),
        random_head(hf_config.hidden_size, case.kind),
        case.kind,
        parallel,
        groups,
        distributed=case.distributed,
        temperature=loss.temperature if loss.learn_temperature else None,
        lora=dataclasses.replace(lora_config(case.targets), dropout=case.lora_dropout) if case.targets else None,
        fp8=case.fp8,
        backend=case.backend,
        dtype=case.dtype,
    )
    optimizer = build_optimizer(OptimConfig(clip_norm=case.clip, distributed=case.distributed, **OPTIM), chunks)
    set_learning_rate(optimizer, OPTIM["lr"])
    config = StepConfig(
        way=case.way,
        tokens_per_microbatch=case.budget,
        gradient_exchange=case.exchange,
        fgm_epsilon=case.fgm,
        fgm_weight=FGM_WEIGHT,
    )
    step = ContrastiveStep(chunks, optimizer, groups, step=config, loss=loss, seed=0, ema_decay=case.ema)
    return step, groups, table, parameters


def many_training_steps(many: list[Case]) -> list[dict[str, float]]:
    """Cases of one layout, one after the other."""
    return [training_steps(case) for case in many]


def training_steps(case: Case, sabotage: str | None = None) -> dict[str, float]:
    """Two steps against one process holding the batch: the largest relative difference of each thing compared.

    `sabotage` breaks the step on purpose: `factor` leaves out the factor W, `detached` drops what other ranks say of
    a passage.
    """
    from nvembed_mcore import score
    from nvembed_mcore.metrics import PhaseTimer

    step, groups, table, parameters = build_step(case)
    if step.scorer.views == 2:
        second_view(step)
    if sabotage == "factor":
        step.scorer = _WithoutFactor(step.scorer, groups.dp_size)
    result = {"loss": 0.0, "norm": 0.0, "gradient": 0.0}
    plainly = run_plainly(case.queries, case.kind, case.clip, case.targets, epsilon=case.fgm, **case.loss)
    for number, truth in enumerate(plainly, 1):
        batch = training_batch(case.queries, number)
        own = lambda values, owned, group: values[torch.as_tensor(owned[groups.dp_rank])]  # noqa: E731
        with mock.patch.object(score, "scatter_sum", own) if sabotage == "detached" else nullcontext():
            output = step(batch, number, PhaseTimer())
        result["loss"] = max(result["loss"], abs(output.loss - truth.loss) / abs(truth.loss))
        result["norm"] = max(result["norm"], abs(output.grad_norm - truth.norm) / truth.norm)
        if not case.distributed:  # the distributed optimizer keeps only a part of each rank's sums
            found = {name: p.main_grad for name, p in parameters.items() if p.requires_grad}
            result["gradient"] = max(result["gradient"], worst_difference(found, truth.grads, table, groups))
    result["parameters"] = worst_difference(parameters, truth.parameters, table, groups, least=1e-3)
    return result | {"microbatches": output.num_microbatches, "temperature": output.temperature}


def second_view(step) -> None:
    """R-Drop without dropout, which draws differently in each layout: the second half of a rank's packs get the
    embedded tokens of `passes.in_view` instead."""
    encoder, walks, reseed, where = step.chunks[0].module, step._walks, step._reseed, {"half": 0, "index": 0}
    step._walks = lambda walk: (where.update(half=len(walk.packs) // 2), walks(walk))[1]
    step._reseed = lambda number, index, chunk: (where.update(index=index), reseed(number, index, chunk))
    if encoder.pre_process:
        encoder.embedding.register_forward_hook(lambda _, __, out: in_view(out, where["index"] >= where["half"]))


class _WithoutFactor:
    """A scorer whose gradients lack the factor W."""

    def __init__(self, scorer, ranks: int) -> None:
        self.scorer, self.ranks = scorer, ranks

    def __getattr__(self, name: str):
        return getattr(self.scorer, name)

    def __call__(self, *args):
        scores = self.scorer(*args)
        return dataclasses.replace(
            scores, grad=scores.grad / self.ranks, grad_log_scale=scores.grad_log_scale / self.ranks
        )


def gathered_rows(num_rows: list[int]):
    """Whether the gather gives global order, and how far the sums of its adjoint are off."""
    from nvembed_mcore.parallel.gather import gather_rows, scatter_sum

    _, groups = layout(1, 1, False)
    numbers = np.random.default_rng(0).permutation(sum(num_rows))
    owned = np.split(numbers, np.cumsum(num_rows)[:-1])
    everything = torch.randn(sum(num_rows), 3, generator=torch.Generator().manual_seed(1))
    mine = torch.as_tensor(owned[groups.dp_rank])
    gathered = gather_rows(everything[mine], owned, groups.dp)
    summed = scatter_sum(everything * (groups.dp_rank + 1), owned, groups.dp)
    expected = everything[mine] * sum(range(1, groups.dp_size + 1))
    return torch.equal(gathered, everything), (summed - expected).abs().max().item() if len(mine) else 0.0


def dropping(dropout: float) -> dict[str, float]:
    """Changes to the architecture: attention weights are dropped, and matter."""
    return {"attention_dropout": dropout, "initializer_range": 0.2}


def dropout_step(case: Case) -> tuple[float, float]:
    """Loss and gradient norm of a step with attention dropout."""
    from nvembed_mcore.metrics import PhaseTimer

    step, *_ = build_step(case, **dropping(0.1))
    output = step(training_batch(case.queries, 1), 1, PhaseTimer())
    return output.loss, output.grad_norm


def dropout_by_rank(case: Case) -> list[float]:
    """The embedding of one text with attention dropout, as the step's seeds draw it on this rank."""
    step, groups, *_ = build_step(case, **dropping(0.1))
    (text,) = models.random_texts([24], 250)
    step._reseed(1, 0, 0)
    return step.chunks[0](make_pack([text], 2))[0].tolist()


def step_traffic(case: Case) -> tuple[dict, dict, int]:
    """Calls and bytes of a step's collectives, and the bytes of this rank's gradients."""
    from nvembed_mcore.metrics import PhaseTimer
    from nvembed_mcore.parallel.traffic import Traffic

    step, groups, _, _ = build_step(case)
    with Traffic(groups) as traffic:
        step(training_batch(case.queries, 1), 1, PhaseTimer())
    gradients = sum(buffer.grad_data.nbytes for chunk in step.chunks for buffer in chunk.buffers)
    return dict(traffic.calls), dict(traffic.bytes), gradients


def rows_and_texts(case: Case) -> tuple[list[int], list[int]]:
    """For each rank, pairs of a query and a positive whose query it holds, and texts."""
    from nvembed_mcore.data.packing import make_plan

    batch = training_batch(case.queries, 1)
    owned = make_plan(batch.lengths, case.world, case.budget).owned()
    queries = batch.passage_query[batch.is_positive]
    return [int(np.isin(queries, numbers).sum()) for numbers in owned], [len(numbers) for numbers in owned]


def clamped_temperature(bounds: tuple[float, float]) -> dict[str, list[float]]:
    """Temperatures of ten steps, and the gradient that the learned one got in each."""
    from nvembed_mcore.metrics import PhaseTimer

    case = Case(distributed=False, clip=0.0, loss={"learn_temperature": True, "temperature_range": bounds})
    step, _, _, parameters = build_step(case)
    found = {"temperatures": [], "pulls": []}
    for number in range(1, 11):
        output = step(training_batch(case.queries, 1), number, PhaseTimer())
        found["temperatures"].append(output.temperature)
        found["pulls"].append(parameters["log_scale"].main_grad.item())
    return found


def dropout_without_replay() -> tuple[float, float, float]:
    """Gradient norms of a cached step with dropout: as it is, with the seeds of the third phase spoiled, without."""
    from nvembed_mcore.metrics import PhaseTimer

    norms = []
    for dropout, is_spoiled in ((0.1, False), (0.1, True), (0.0, False)):
        case = Case(way="cached", budget=60)
        step, *_ = build_step(case, **dropping(dropout))
        if is_spoiled:
            reseed, calls = step._reseed, []
            step._reseed = lambda *key: (calls.append(key), reseed(key[0] + len(calls), *key[1:]))  # noqa: B023
        norms.append(step(training_batch(case.queries, 1), 1, PhaseTimer()).grad_norm)
    return tuple(norms)


def few_texts_at_once(case: Case) -> dict[str, float]:
    """`training_steps` where multi-layer pooling computes two texts at a time."""
    from nvembed_mcore.model import pooling

    with mock.patch.object(pooling, "ROWS_AT_ONCE", 2 * LATENTS):
        return training_steps(case)


def embeddings_of_texts(case: Case, num_texts: int) -> tuple[float, int]:
    """As evaluation embeds texts: largest difference from the reference, and number of embeddings on this rank."""
    from nvembed_mcore.schedule import embed_texts

    step, groups, *_ = build_step(case)
    hf_config = step_config()
    reference, head = models.hf_reference(hf_config), random_head(hf_config.hidden_size, case.kind)
    texts = models.random_texts([3 + 5 * i % 17 for i in range(num_texts)], hf_config.vocab_size)
    found = embed_texts(step.chunks, groups, texts, case.budget)
    if found is None:
        return 0.0, 0
    expected = torch.stack([models.reference_embedding(reference, head, text, case.kind, HEADS) for text in texts])
    return (found - expected).abs().max().item(), len(found)
