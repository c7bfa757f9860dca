"""Saving in one layout and loading in another: what the processes do, and whole tensors put together from theirs.

Whole tensors are read from the live model and optimizer of all ranks, and not by the code that saves.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nvembed_mcore.config import CheckpointConfig
from tests.helpers.cases import Case, build_step
from tests.helpers.plain import lora_config, pooling_config, step_config, training_batch

STEPS_BEFORE, STEPS_AFTER = 3, 5
RATE = 2e-3
Whole = dict[str, np.ndarray]
"""Whole tensors: `weight NAME`, and of the optimizer `main NAME`, `exp_avg NAME`, `exp_avg_sq NAME` and perhaps
`average NAME`, and `step`."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is trained in every layout. `changes`: to the architecture."""

    name: str
    kind: str = "latent"
    targets: tuple[str, ...] = ()
    loss: dict = field(default_factory=dict, hash=False)
    ema: float | None = None
    changes: dict = field(default_factory=dict, hash=False)

    def case(self, where: Case) -> Case:
        return dataclasses.replace(where, kind=self.kind, targets=self.targets, loss=self.loss, ema=self.ema)


class Trial:
    """A model in a layout, on this rank."""

    def __init__(self, model: Model, where: Case) -> None:
        from nvembed_mcore.optim import set_learning_rate

        self.model, self.config = model, step_config(**model.changes)
        self.step, self.groups, _, self.parameters = build_step(model.case(where), **model.changes)
        set_learning_rate(self.step.optimizer, RATE)

    def take(self, first: int, last: int) -> list[float]:
        """Steps `first` to `last`; their losses."""
        from nvembed_mcore.metrics import PhaseTimer

        batches = [training_batch(7, number, self.config.vocab_size) for number in range(first, last + 1)]
        return [self.step(batch, number, PhaseTimer()).loss for number, batch in enumerate(batches, first)]

    def facts(self) -> dict[str, Any]:
        lora = dataclasses.asdict(lora_config(self.model.targets)) if self.model.targets else None
        model = {"pooling": dataclasses.asdict(pooling_config(self.model.kind)), "lora": lora}
        optim = {"ema_decay": self.model.ema}
        return {
            "config": {"model": model, "loss": self.model.loss, "optim": optim},
            "hf_config": self.config.to_dict(),
        }

    def save(self, folder: Path) -> None:
        from nvembed_mcore.checkpoint.saver import Saver

        saver = Saver(CheckpointConfig(), folder, self.groups)
        saver.save(STEPS_BEFORE, self.step.chunks, self.step.optimizer, self.facts())

    def load(self, folder: Path) -> None:
        """Load a checkpoint over weights that are not numbers, so that none may stay."""
        from nvembed_mcore.checkpoint.store import find_checkpoint, load_checkpoint

        with torch.no_grad():
            for parameter in self.parameters.values():
                parameter.fill_(torch.nan)
        load_checkpoint(find_checkpoint(folder), self.step.chunks, self.step.optimizer)

    def parts(self) -> dict[str, Any]:
        """What this rank has of every tensor: its shard of weights, and of the optimizer's the flat part from a place
        in the shard on."""
        optimizers = getattr(self.step.optimizer, "chained_optimizers", [self.step.optimizer])
        names = {parameter: name for name, parameter in self.parameters.items()}
        found, steps = {}, set()
        for optimizer in optimizers:
            steps |= {group["step"] for group in optimizer.param_groups}
            for parameter, begin, main in _mains(optimizer):
                tensors = {"main": main, **optimizer.optimizer.state[main]}
                found[names[parameter]] = begin, {key: _copy(value).ravel() for key, value in tensors.items()}
        return {
            "tp_rank": self.groups.tp_rank,
            "weights": {name: _copy(parameter) for name, parameter in self.parameters.items()},
            "optimizer": found,
            "steps": steps,
        }


def _copy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy().copy()


def _mains(optimizer: Any):
    """Each parameter that this rank's optimizer updates, where its part begins, and that part."""
    if not hasattr(optimizer, "model_param_group_index_map"):
        yield from ((parameter, 0, parameter) for group in optimizer.param_groups for parameter in group["params"])
        return
    for parameter, (group, place) in optimizer.model_param_group_index_map.items():
        begin = optimizer._get_model_param_range_map(parameter)["param"].start
        yield parameter, begin, optimizer.optimizer.param_groups[group]["params"][place]


def save_all(models: list[Model], where: Case, folder: Path) -> dict[str, dict]:
    """Train each model for some steps in a layout and save it; this rank's parts, by model."""
    found = {}
    for model in models:
        trial = Trial(model, where)
        trial.take(1, STEPS_BEFORE)
        trial.save(folder / model.name)
        found[model.name] = trial.parts()
    return found


def load_all(sources: list[tuple[Model, Path]], where: Case) -> list[tuple[dict, list[float], dict]]:
    """Load each checkpoint in a layout and go on: parts after loading, losses of the next steps, parts at the end."""
    found = []
    for model, folder in sources:
        trial = Trial(model, where)
        trial.load(folder / model.name)
        loaded = trial.parts()
        losses = trial.take(STEPS_BEFORE + 1, STEPS_BEFORE + STEPS_AFTER)
        found.append((loaded, losses, trial.parts()))
    return found


def straight(models: list[Model]) -> list[tuple[list[float], dict]]:
    """What nobody saves and loads: losses of the steps after those of `save_all`, and parts at the end."""
    found = []
    for model in models:
        trial = Trial(model, Case())
        losses = trial.take(1, STEPS_BEFORE + STEPS_AFTER)
        found.append((losses[STEPS_BEFORE:], trial.parts()))
    return found


def whole(model: Model, by_rank: list[dict]) -> Whole:
    """Whole tensors from the parts of all ranks; what several ranks have must be the same on all of them."""
    from nvembed_mcore.checkpoint.names import join_shards, name_table

    table = name_table(step_config(**model.changes), pooling_config(model.kind), lora_config(model.targets))
    entries = {entry.name: entry for entry in table}
    found = {}
    for name, by_tp in _shards(by_rank).items():
        shards = [by_tp[tp] for tp in sorted(by_tp)]
        entry = entries.get(name.split(" ", 1)[1])
        if entry is None or entry.layout == "replicated":
            assert all(np.array_equal(shards[0], other) for other in shards), name
            found[name] = shards[0]
        else:
            found[name] = join_shards(entry, [torch.from_numpy(shard) for shard in shards]).numpy()
        assert not np.isnan(found[name]).any(), name
    (step,) = {step for one in by_rank for step in one["steps"]}
    return found | {"step": np.array(step)}


def _shards(by_rank: list[dict]) -> dict[str, dict[int, np.ndarray]]:
    """Tensor rank's shards by name and tensor rank."""
    shards: dict[str, dict[int, np.ndarray]] = {}
    for one in by_rank:
        for name, weight in one["weights"].items():
            same = shards.setdefault(f"weight {name}", {}).setdefault(one["tp_rank"], weight)
            assert np.array_equal(same, weight), name
    for one in by_rank:
        for name, (begin, tensors) in one["optimizer"].items():
            weight = shards[f"weight {name}"][one["tp_rank"]]
            for key, flat in tensors.items():
                by_tp = shards.setdefault(f"{key} {name}", {})
                shard = by_tp.setdefault(one["tp_rank"], np.full_like(weight, np.nan))
                shard.reshape(-1)[begin : begin + len(flat)] = flat
    return shards
