"""What ranks have of a model that was really built, trained and saved, and what a dry run says of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from nvembed_mcore.config import (
    DataConfig,
    DatasetConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
)
from tests.helpers.cases import Case
from tests.helpers.plain import lora_config, pooling_config, step_config
from tests.helpers.reshard import STEPS_BEFORE, Model, Trial


def real(models: list[Model], cases: list[Case], folder: Path) -> list[dict[str, Any]]:
    """This rank's parts of each model after a step in its layout; the processes are those of all layouts."""
    return [
        _real(model, case, folder / str(number))
        for number, (model, case) in enumerate(zip(models, cases, strict=True))
    ]


def _real(model: Model, case: Case, folder: Path) -> dict[str, Any]:
    trial = Trial(model, case)
    trial.take(1, 1)
    trial.save(folder)
    groups, chunks = trial.groups, trial.step.chunks
    parameters = [*trial.parameters.values()]
    weights = _storages(parameters)
    optimizers = getattr(trial.step.optimizer, "chained_optimizers", [trial.step.optimizer])
    mains = [one for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]]
    moments = [
        state[name]
        for optimizer in optimizers
        for state in optimizer.optimizer.state.values()
        for name in ("exp_avg", "exp_avg_sq", *(["average"] if model.ema else []))
    ]
    copies = [one for one in mains if one.untyped_storage().data_ptr() not in weights]
    return {
        "rank": groups.rank,
        "place": {name: getattr(groups, f"{name}_rank") for name in ("tp", "pp", "cp", "dp")},
        "groups": groups.members(),
        "layers": [[layer.layer_number - 1 for layer in chunk.module.decoder.layers] for chunk in chunks],
        "trained": sum(one.numel() for one in parameters if one.requires_grad),
        "frozen": sum(one.numel() for one in parameters if not one.requires_grad),
        "weights": sum(weights.values()),
        "gradients": sum(_storages(buffer.grad_data for chunk in chunks for buffer in chunk.buffers).values()),
        "optimizer": sum(one.nbytes for one in [*moments, *copies]),
        "checkpoint": _written(folder)[groups.rank],
    }


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of the memory that tensors lie in, by where it begins."""
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}


def _written(folder: Path) -> Counter[int]:
    """Bytes of tensors in each rank's file of a checkpoint, as its table of contents says."""
    from nvembed_mcore.checkpoint.reader import StateReader
    from nvembed_mcore.checkpoint.store import find_checkpoint

    contents = StateReader(find_checkpoint(folder).path / "state").metadata
    found: Counter[int] = Counter()
    for index, stored in contents.storage_data.items():
        tensor = contents.state_dict_metadata[index.fqn]
        (chunk,) = [one for one in tensor.chunks if one.offsets == index.offset]
        rank = int(stored.relative_path.removeprefix("__").partition("_")[0])
        found[rank] += chunk.sizes.numel() * tensor.properties.dtype.itemsize
    return found


def said(models: list[Model], cases: list[Case]) -> list[list[dict[str, Any]]]:
    """What a dry run on one process says of all ranks of each."""
    from nvembed_mcore.scaling.dry_run import dry_run

    found = []
    for model, case in zip(models, cases, strict=True):
        ranks = range(case.world)
        run = dry_run(
            as_config(model, case), case.world, hf_config=step_config(**model.changes), ranks=ranks, device_type="cpu"
        )
        found.append([dataclasses.asdict(one) for one in run.ranks])
    return found


def as_config(model: Model, case: Case) -> RunConfig:
    """The configuration of a run that builds what `Trial` builds."""
    return RunConfig(
        run_dir="unused",
        steps=STEPS_BEFORE,
        data=DataConfig(tokenizer="unused", datasets=[DatasetConfig(path="unused")]),
        model=ModelConfig(
            config="unused",
            pooling=pooling_config(model.kind),
            **({"lora": lora_config(model.targets)} if model.targets else {}),
        ),
        precision=PrecisionConfig(dtype=case.dtype),
        parallel=ParallelConfig(
            tp=case.tp,
            pp=case.pp,
            cp=case.cp,
            sequence_parallel=case.sp,
            chunks_per_stage=case.chunks,
            layers_in_first_stage=case.first,
            layers_in_last_stage=case.last,
            overlap_grad_reduce=case.overlap,
            bucket_size=4000 if case.overlap else None,
        ),
        loss=LossConfig(**model.loss),
        optim=OptimConfig(distributed=case.distributed, ema_decay=model.ema),
    )
