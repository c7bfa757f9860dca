"""Averaged weights in a checkpoint (ema.py): whether there are some, and which tensors they are.

Whoever goes on from a run, encodes with it or exports it has the same model: the averaged one where the run has one.
Only a run that is resumed has both.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from nvembed_mcore.checkpoint.manifest import CheckpointError
from nvembed_mcore.checkpoint.optimizer_state import AVERAGE, stored_name

if TYPE_CHECKING:
    from nvembed_mcore.checkpoint.store import Checkpoint

Weights = Literal["ema", "last"]
"""Which of a run's weights: the averaged ones, or those of the last step."""


def has_averages(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is of a run that averages its weights."""
    return bool(checkpoint.facts["config"].get("optim", {}).get("ema_decay"))


def takes_averages(checkpoint: Checkpoint, weights: Weights | None) -> bool:
    """Whether `weights` means the averaged ones, as None does where there are some.

    Raises:
        CheckpointError: it asks for them, and there are none.
    """
    if weights == "ema" and not has_averages(checkpoint):
        raise CheckpointError(f"{checkpoint.path} has no averaged weights: its run has no optim.ema_decay")
    return has_averages(checkpoint) and weights != "last"


def name_of_average(name: str, stored: Collection[str]) -> str:
    """The name in a checkpoint of a weight's average, or the weight's own where it has none: a frozen one."""
    average = stored_name(AVERAGE, name)
    return average if average in stored else name


def averaged(
    one: ShardedTensor | ShardedTensorFactory, stored: Collection[str]
) -> ShardedTensor | ShardedTensorFactory:
    """What is to be loaded into a weight's place."""
    return replace(one, key=name_of_average(one.key, stored))
