"""A run of any size, built on one process as some of its ranks would build it.

Groups are those of the whole run, the model is the trainer's own, and what refuses a configuration is the trainer's
own code; only nothing is allocated (torch's `FakeTensorMode`), nothing is sent (its fake process group), and no weight
is read. Batches are the run's own, where its data are on this machine. This is the one module here that imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from megatron.core.distributed import DistributedDataParallel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import MistralConfig

from nvembed_mcore import build
from nvembed_mcore.checkpoint import sizes
from nvembed_mcore.config import ConfigError, RunConfig, StepConfig
from nvembed_mcore.data.packing import Plan, Text
from nvembed_mcore.model.backend import Backend, choose
from nvembed_mcore.model.mistral import check_fp8, head_dim
from nvembed_mcore.parallel import groups as process_groups
from nvembed_mcore.parallel.groups import Groups
from nvembed_mcore.progress import show_each
from nvembed_mcore.scaling.flops import pack_flops
from nvembed_mcore.scaling.lengths import sample_lengths
from nvembed_mcore.scaling.pipeline import even_layers
from nvembed_mcore.schedule import packs_of_rank, plan_texts
from nvembed_mcore.step import check_packs
from nvembed_mcore.train import batch_source, build_stores, open_tokenizer

Device = Literal["cuda", "cpu"]
STEPS = 8
"""Of a run, so many from its first on have their packs planned."""
FP8_HEAD = 128
"""Width of a head that attention in FP8 needs (model/fp8_attention.py)."""
WORTH_A_WORD = 1.05
"""Other stages are proposed where the slowest one is so many times as long as it need be."""


@dataclass(frozen=True)
class Rank:
    """What one rank has.

    Attributes:
        place: its number in each dimension: `tp`, `pp`, `cp`, `dp`.
        groups: ranks of its groups by dimension; those of `dp_cp` have the same parameters.
        layers: numbers of the layers of each of its chunks, from 0.
        trained, frozen: parameters.
        weights, gradients, optimizer: bytes; gradients are Megatron's buffers with their padding.
        checkpoint: bytes of the tensors that it writes.
        largest_checkpoint: those of the rank that writes most, of all with the same parameters.
    """

    rank: int
    place: dict[str, int]
    groups: dict[str, list[int]]
    layers: list[list[int]]
    trained: int
    frozen: int
    weights: int
    gradients: int
    optimizer: int
    checkpoint: int
    largest_checkpoint: int


@dataclass(frozen=True)
class Packing:
    """How the texts of some steps lie on data-parallel ranks.

    Attributes:
        source: where their lengths come from.
        steps: so many.
        texts, tokens: of a step, in the mean.
        fullest, emptiest: tokens of a rank, over all steps.
        imbalance: tokens of a step's fullest rank over the mean of its ranks, the mean over steps.
        most_packs, fewest_packs: of a rank.
        padding: share of tokens that only fill packs.
        ranks_without_text: in a step, at most.
        steps_with_idle_ranks: in which some rank has no text.
    """

    source: str
    steps: int
    texts: float
    tokens: float
    fullest: int
    emptiest: int
    imbalance: float
    most_packs: int
    fewest_packs: int
    padding: float
    ranks_without_text: int
    steps_with_idle_ranks: int


@dataclass(frozen=True)
class DryRun:
    """`layout`: sizes of the dimensions. `stages`: layers of each pipeline stage. `warnings`: what works, but ill."""

    gpus: int
    layout: dict[str, int]
    stages: list[int]
    ranks: list[Rank]
    packing: Packing
    warnings: list[str]


def dry_run(
    config: RunConfig,
    gpus: int,
    *,
    hf_config: MistralConfig | None = None,
    lengths: str | None = None,
    ranks: Sequence[int] | None = None,
    device_type: Device = "cuda",
) -> DryRun:
    """Build some ranks of a run of `gpus` processes; process groups of before are left, and none remains.

    Args:
        hf_config: the backbone, where it is not where the configuration says.
        lengths: of texts, as `scaling.lengths.sample_lengths` takes them; None: those of the run's own batches, or
            what comes nearest to them on this machine.
        ranks: which are built; None: the first of each pipeline stage, and the last of all.
        device_type: where the run is to go. For `cuda` the data type is that of CUDA, and layers are built with the
            local modules, which have the same parameters as TransformerEngine's.

    Raises:
        ConfigError, WeightsError: what `train` raises of such a run before its first step, so far as it does not
            depend on the device itself or on weights.
    """
    try:
        process_groups.pretend(config.parallel, 0, gpus)  # refuses what does not divide, before anything is read
        hf_config = hf_config or build.read_architecture(config.model)
        _check_device(config, hf_config, device_type)
        warnings = _check_start(config, hf_config)
        here = _as_built(config, device_type)
        found = []
        for rank in show_each(_chosen(config, gpus, ranks), "build", "ranks"):
            groups = process_groups.pretend(config.parallel, rank, gpus)
            with FakeTensorMode():
                chunks = build.build_empty_model(here, hf_config, groups)
                found.append(_rank(chunks, groups, config.optim.averages))
        texts, missing = _own_texts(config, hf_config)
        if texts is None or lengths is not None:
            sampled = sample_lengths(config, lengths)
            texts = _Texts([step[step > 0] for step in sampled.tokens], sampled.source)
        packing = _pack(config.step, chunks, groups, texts)
    finally:
        process_groups.shutdown()
    layout = {name: getattr(config.parallel, name) for name in ("tp", "pp", "cp")}
    layout["dp"] = gpus // (layout["tp"] * layout["pp"] * layout["cp"])
    stages = config.parallel.layers_of_stages(hf_config.num_hidden_layers)
    warnings += missing
    warnings += _idle_warnings(layout["dp"], packing)
    warnings += _stage_warnings(config, hf_config, stages, texts)
    return DryRun(gpus, layout, stages, found, packing, warnings)


def _chosen(config: RunConfig, gpus: int, ranks: Sequence[int] | None) -> list[int]:
    pp = config.parallel.pp
    chosen = [*(stage * gpus // pp for stage in range(pp)), gpus - 1] if ranks is None else ranks
    for rank in chosen:
        if not 0 <= rank < gpus:
            raise ConfigError(f"a run of {gpus} processes has ranks 0 to {gpus - 1}, got {rank}")
    return sorted(set(chosen))


def _check_device(config: RunConfig, hf_config: MistralConfig, device_type: Device) -> None:
    """What `Encoder` would refuse on that device, whichever this one is."""
    precision, is_local = config.precision, config.model.backend == "local"
    if device_type == "cpu" or is_local:
        backend = choose(config.model, precision)
    else:
        dtype = _as_built(config, device_type).precision.dtype
        backend = Backend("transformer_engine", dtype, precision.fp8, precision.fp8_attention)
    check_fp8(hf_config, backend, config.parallel)
    if backend.fp8_attention == "on" and head_dim(hf_config) != FP8_HEAD:
        raise ConfigError(
            f"precision.fp8_attention is 'on', but it needs heads of width {FP8_HEAD}, the model's have "
            f"{head_dim(hf_config)}. Use 'off' or 'auto'"
        )


def _check_start(config: RunConfig, hf_config: MistralConfig) -> list[str]:
    """Look at what the run begins with, if it is on this machine; otherwise words that it is not."""
    start = config.model.init_from
    if start and os.path.isdir(start):
        build.check_start(config.model, hf_config)
        return []
    return [f"model.init_from {start} is not on this machine, so it is not compared"] if start else []


@dataclass(frozen=True)
class _Texts:
    """Token lengths of the texts of each of some steps, int64 [N] each, and where they come from."""

    steps: list[np.ndarray]
    source: str


def _own_texts(config: RunConfig, hf_config: MistralConfig) -> tuple[_Texts | None, list[str]]:
    """Texts of the first steps as the run will draw them, where tokenizer and data are on this machine.

    What is not tokenised yet is tokenised, as `train` would do it.
    """
    data = config.data
    places = {f"data.datasets.{number}": one.path for number, one in enumerate(data.datasets)}
    places = {"data.tokenizer": data.tokenizer, **places}
    missing = [f"{field} {path}" for field, path in places.items() if not os.path.exists(path)]
    tokenizer = open_tokenizer(data, hf_config) if os.path.exists(data.tokenizer) else None
    if missing:
        more = f" (nor {len(missing) - 1} more of its files)" if missing[1:] else ""
        return None, [f"{missing[0]} is not on this machine{more}, so the run's own batches are not planned"]
    source = batch_source(config, build_stores(data, tokenizer, config.loss.distillation.is_on))
    steps = [source.batch(step).lengths for step in range(min(STEPS, config.steps))]
    return _Texts(steps, "the run's own batches"), []


def _as_built(config: RunConfig, device_type: Device) -> RunConfig:
    """The configuration with what `auto` means on the device, and with layers that any machine can build."""
    if device_type == "cpu":
        return config
    dtype = "bfloat16" if config.precision.dtype == "auto" else config.precision.dtype
    precision = replace(config.precision, dtype=dtype, fp8_attention="off")
    return replace(config, precision=precision, model=replace(config.model, backend="local"))


def _rank(chunks: list[DistributedDataParallel], groups: Groups, averages: bool) -> Rank:
    written = sizes.written_by_ranks(chunks, groups, averages=averages)
    parameters = [one for chunk in chunks for one in chunk.module.parameters()]
    return Rank(
        rank=groups.rank,
        place={name: getattr(groups, f"{name}_rank") for name in ("tp", "pp", "cp", "dp")},
        groups=groups.members(),
        layers=[[layer.layer_number - 1 for layer in chunk.module.decoder.layers] for chunk in chunks],
        trained=sum(one.numel() for one in parameters if one.requires_grad),
        frozen=sum(one.numel() for one in parameters if not one.requires_grad),
        weights=_weights(chunks),
        gradients=sum(buffer.grad_data.nbytes for chunk in chunks for buffer in chunk.buffers),
        optimizer=sizes.optimizer_bytes(chunks, groups, averages=averages),
        checkpoint=written[groups.rank],
        largest_checkpoint=max(written.values()),
    )


def _weights(chunks: list[DistributedDataParallel]) -> int:
    """Bytes; with the distributed optimizer the trained ones lie in buffers, with their padding."""
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers if buffer.param_data is not None]
    within = {id(one) for buffer in buffers for one in buffer.params}
    outside = [one for chunk in chunks for one in chunk.module.parameters() if id(one) not in within]
    return sum(buffer.param_data.nbytes for buffer in buffers) + sum(one.nbytes for one in outside)


def _pack(step: StepConfig, chunks: list[DistributedDataParallel], groups: Groups, texts: _Texts) -> Packing:
    """Plan the packs of each step as every rank of the run would."""
    per_rank, packs, padded = [], [], 0
    for number, tokens in enumerate(texts.steps, 1):
        plan = plan_texts(tokens, chunks, groups, step.tokens_per_microbatch)
        check_packs(step, plan, number)
        per_rank.append(plan.tokens_per_rank(tokens))
        packs.append([len(one) for one in plan.packs])
        padded += _padded(tokens, plan, chunks, groups)
    loads = np.stack(per_rank)
    idle = (loads == 0).sum(axis=1)
    return Packing(
        source=texts.source,
        steps=len(loads),
        texts=float(np.mean([len(tokens) for tokens in texts.steps])),
        tokens=float(loads.sum(axis=1).mean()),
        fullest=int(loads.max()),
        emptiest=int(loads.min()),
        imbalance=float((loads.max(axis=1) / loads.mean(axis=1)).mean()),
        most_packs=max(map(max, packs)),
        fewest_packs=min(map(min, packs)),
        padding=1 - int(loads.sum()) / padded,
        ranks_without_text=int(idle.max()),
        steps_with_idle_ranks=int((idle > 0).sum()),
    )


def _padded(tokens: np.ndarray, plan: Plan, chunks: list[DistributedDataParallel], groups: Groups) -> int:
    """Tokens of all packs of a step with what fills them."""
    texts = [Text(np.zeros(length, np.int32), 0) for length in tokens.tolist()]
    ranks = range(groups.dp_size)
    return sum(pack.padded_tokens for rank in ranks for pack in packs_of_rank(texts, plan, chunks, groups, rank))


def _idle_warnings(dp: int, packing: Packing) -> list[str]:
    if not packing.steps_with_idle_ranks:
        return []
    return [
        f"in {packing.steps_with_idle_ranks} of {packing.steps} steps up to {packing.ranks_without_text} of the {dp} "
        f"data-parallel ranks have no text (a batch has {packing.texts:.0f}): raise batch_size, or give more ranks to "
        f"parallel.tp, pp or cp"
    ]


def _stage_warnings(config: RunConfig, hf_config: MistralConfig, stages: list[int], texts: _Texts) -> list[str]:
    """Whether other numbers of layers would make the slowest pipeline stage shorter, by FLOPs of layers and head."""
    parallel = config.parallel
    if parallel.pp == 1:
        return []
    head = _head_in_layers(config, hf_config, texts)
    first, last = even_layers(hf_config.num_hidden_layers, parallel.pp, parallel.chunks_per_stage, 0.0, head)
    if first is None:
        better = replace(parallel, layers_in_first_stage=None, layers_in_last_stage=None)
    else:
        better = replace(parallel, layers_in_first_stage=first, layers_in_last_stage=last)
    proposed = better.layers_of_stages(hf_config.num_hidden_layers)
    now, then = (max(*one[:-1], one[-1] + head) for one in (stages, proposed))
    if now <= WORTH_A_WORD * then:
        return []
    how = "null and null" if first is None else f"{first} and {last}"
    return [
        f"the head counts as {head:.1f} layers, and stages have {', '.join(map(str, stages))}: with "
        f"parallel.layers_in_first_stage and layers_in_last_stage {how} the slowest takes {1 - then / now:.0%} less"
    ]


def _head_in_layers(config: RunConfig, hf_config: MistralConfig, texts: _Texts) -> float:
    """FLOPs of the pooling head on a tensor rank over those of a layer, for a full pack."""
    length = int(np.concatenate(texts.steps).mean())
    pack = [length] * max(1, config.step.tokens_per_microbatch // length)
    how = {"causal": config.model.attention_mask == "causal", "lora": config.model.adapters}
    plain = replace(config.model.pooling, kind="mean")
    layers, both = (pack_flops(hf_config, pooling, pack, **how) for pooling in (plain, config.model.pooling))
    # Only the latent head's tokens are split over tensor ranks; the others' head is whole on each.
    parallel = config.parallel
    is_split = config.model.pooling.kind == "latent" and parallel.sequence_parallel
    copies = 1 if is_split else parallel.tp
    return copies * (both - layers) / (layers / hf_config.num_hidden_layers)
