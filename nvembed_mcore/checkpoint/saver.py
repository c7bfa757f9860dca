"""Saving while training: what is stored, when the run waits for it, and which older checkpoints go."""

from __future__ import annotations

import io
import json
import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlanner, mcore_to_pyt_state_dict
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from nvembed_mcore.checkpoint import folders
from nvembed_mcore.checkpoint.best import Best, write_best
from nvembed_mcore.checkpoint.store import sharded_state
from nvembed_mcore.checkpoint.writing import Writing, check_space, check_writable
from nvembed_mcore.config import CheckpointConfig
from nvembed_mcore.fault_injection import point
from nvembed_mcore.parallel.groups import Groups, every_rank_does, first_rank_does, patient_group
from nvembed_mcore.parallel.param_gather import finish_param_gather

log = logging.getLogger(__name__)


def bytes_of_optimizer(averages: bool) -> int:
    """What a trained parameter has of the optimizer: a float32 copy, two moments, and perhaps an average."""
    return 16 if averages else 12


@dataclass
class _Pending:
    """A checkpoint that is written but not yet published."""

    step: int
    writing: Writing
    common: bytes
    facts: bytes
    thread: threading.Thread | None
    best: Best | None


class Saver:
    """Writes a run's checkpoints. Every rank makes one and calls every method, in the same order.

    A save is staged by the main thread (the tensors to store, their sizes, room for them), written by the main thread
    or, with `checkpoint.async_save`, by another from a copy in host memory, and published when all ranks have written:
    complete, renamed, the pointer moved, and then older checkpoints removed. All traffic goes over a gloo group of its
    own. A rank that fails raises the same error on every rank, and nothing of its checkpoint remains.

    Attributes:
        published: step of the newest checkpoint that this saver completed; None before the first.
        best: what `checkpoints/best` says; None where it says nothing.
    """

    def __init__(
        self, config: CheckpointConfig, run_dir: str | Path, groups: Groups, *, averages: bool = False
    ) -> None:
        """
        Args:
            averages: whether the weights are averaged.
        """
        self.config, self.root, self._averages = config, folders.folder_of(run_dir), averages
        self.published: int | None = None
        self.best: Best | None = None
        self._groups, self._group = groups, patient_group()
        self._pending: _Pending | None = None

    def prepare(self, chunks: list[DistributedDataParallel], restored: Path | None) -> None:
        """Make the folder of checkpoints, or do in it what an interrupted save left undone. Refuse to start what
        cannot write its first one: for want of permission, or of room, as the model's size tells. Nothing is made or
        refused where nothing is to be saved (`checkpoint.every_steps` 0).

        Args:
            restored: the checkpoint that the run goes on from.

        Raises:
            StorageError: on every rank.
        """
        if self.config.every_steps == 0:
            return
        mine = [p for chunk in chunks for p in chunk.module.parameters()] if self._groups.dp_cp.rank() == 0 else []
        bytes = sum(p.numel() * (p.itemsize + bytes_of_optimizer(self._averages) * p.requires_grad) for p in mine)
        total = torch.tensor(bytes)
        dist.all_reduce(total, group=self._group)

        def check() -> None:
            self.root.mkdir(parents=True, exist_ok=True)
            # Here too, for a run that was killed at its last save never saves again.
            folders.clear_leftovers(self.root)
            if restored:
                folders.prune(restored, self.config.keep)
            check_space(self.root, int(total), self._groups.world_size, "a checkpoint of this run")

        first_rank_does(check, self._group)
        every_rank_does(lambda: check_writable(self.root), self._group)
        self.best = first_rank_does(lambda: folders.best_of(self.root), self._group)

    def save(
        self,
        step: int,
        chunks: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        facts: dict[str, Any],
        best: Best | None = None,
    ) -> None:
        """Store weights and optimizer as they are now. A save that is still pending is finished first.

        Args:
            step: optimizer steps done.
            facts: JSON values for `run.json`; `step` is added.
            best: the evaluation of this step, which is the best so far.

        Raises:
            StorageError: this checkpoint, or the pending one, cannot be written.
        """
        self.wait()
        first_rank_does(lambda: folders.clear_leftovers(self.root), self._group)
        finish_param_gather(chunks)
        self._pending = self._stage(step, chunks, optimizer, facts)
        self._pending.best = best
        if self._pending.thread:
            self._pending.thread.start()
        else:
            self._pending.writing.write()
            self.wait()

    def beats(self, best: Best) -> bool:
        """Whether an evaluation is better than all of those whose checkpoint is saved or being saved."""
        pending = self._pending.best if self._pending else None
        return first_rank_does(lambda: best.beats(pending or self.best), self._group)

    def keep_best(self, best: Best) -> None:
        """Name the newest checkpoint, saved or being saved, the best so far.

        Raises:
            StorageError: as `poll`.
        """
        self.wait()
        newest = self.root / folders.name_of(best.step)

        def name() -> None:
            write_best(self.root, best)
            folders.prune(newest, self.config.keep)

        first_rank_does(name, self._group)
        self.best = best

    def poll(self) -> None:
        """Publish what an asynchronous save has written by now; costs nothing when none is pending.

        Raises:
            StorageError: the pending checkpoint could not be written by some rank.
        """
        if self._pending is None:
            return
        is_written, is_well = not self._pending.thread.is_alive(), self._pending.writing.failure is None
        everywhere = torch.tensor([is_written, is_well], dtype=torch.int32)
        dist.all_reduce(everywhere, dist.ReduceOp.MIN, self._group)
        if everywhere[0] or not everywhere[1]:
            self.wait()

    def wait(self) -> None:
        """Finish what is pending.

        Raises:
            StorageError: as `poll`.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.thread:
            pending.thread.join()
        pending.writing.finish(pending.common, pending.facts, lambda: self._publish(pending))
        self.published, self.best = pending.step, pending.best or self.best

    def _stage(
        self, step: int, chunks: list[DistributedDataParallel], optimizer: MegatronOptimizer, facts: dict[str, Any]
    ) -> _Pending:
        """All that is needed of the run to write a checkpoint; what an asynchronous save needs is copied."""
        pieces, common = save_preprocess(sharded_state(chunks, optimizer, is_loading=False))
        # Data- and context-parallel ranks have the same tensors: each writes some of them.
        shares = determine_main_replica_uniform_distribution(pieces, self._groups.dp_cp)
        if shares is not None:
            distribute_main_replicas_with_precomputed_distribution(pieces, self._groups.dp_cp, shares)
        mine: dict[str, list[ShardedTensor | ShardedObject]] = {}
        for piece in nested_values(pieces):
            if is_main_replica(piece.replica_id):
                key = piece.unique_key if isinstance(piece, ShardedObject) else piece.key
                mine.setdefault(key, []).append(piece)
                if self.config.async_save and isinstance(piece, ShardedTensor):
                    piece.data = piece.data.detach().to("cpu", copy=True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.set_up_planner(mcore_to_pyt_state_dict(mine), is_coordinator=self._groups.rank == 0)
        serialized = io.BytesIO()
        torch.save(common, serialized)
        return _Pending(
            step,
            writing := Writing(self.root / f".writing-{folders.name_of(step)}", step, planner, self._group),
            serialized.getvalue(),
            json.dumps({"step": step, **facts}, indent=1, sort_keys=True).encode(),
            threading.Thread(target=writing.write, name="checkpoint", daemon=True) if self.config.async_save else None,
            None,
        )

    def _publish(self, pending: _Pending) -> None:
        final = self.root / folders.name_of(pending.step)
        folders.publish(pending.writing.aside, final)
        if pending.best:
            write_best(self.root, pending.best)
        point("before_pointer", pending.step)
        folders.move_pointer(self.root, final.name)
        point("after_pointer", pending.step)
        folders.prune(final, self.config.keep)
