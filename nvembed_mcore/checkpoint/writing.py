"""Writing a checkpoint folder aside: what a resume checkpoint and a folder of weights have in common.

Everything that may fail is agreed on, so a failure of one rank is raised on all and leaves nothing behind.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from nvembed_mcore.checkpoint.manifest import Files, HashingFiles, sync_folder, write_file, write_manifest
from nvembed_mcore.exits import StorageError
from nvembed_mcore.fault_injection import point
from nvembed_mcore.parallel.groups import every_rank_does, first_rank_does

BYTES_BESIDE_A_TENSOR = 2048
"""What torch's serializer adds to the numbers of a tensor, at most."""
_BYTES_OF_THE_REST, _FILES_OF_THE_REST = 1 << 20, 8
"""The configuration, the table of contents and so on; and their files and folders."""


class Writing:
    """A checkpoint folder that is being written aside, as one rank sees it. Every rank makes one, and calls `finish`.

    Raises:
        StorageError: there is no room for it; raised on every rank before anything is written.
    """

    def __init__(self, aside: Path, step: int, planner: SavePlanner, group: dist.ProcessGroup) -> None:
        self.aside, self.step, self._planner, self._group = aside, step, planner, group
        self._files = HashingFiles(lambda: point("mid_shard", step))
        self._results: list[WriteResult] = []
        self.failure: Exception | None = None
        try:
            first_rank_does(self._make_folder, group)
            plans, extra = zip(*every_rank_does(self._local_plan, group), strict=True)
            plans, self._metadata = planner.create_global_plan(list(plans))
            self.bytes = _bytes_of(plans) + sum(extra)
            every_rank_does(self._check_space, group)
            self._writer = _Writer(aside / "state", self._files)
            self._plan = self._writer.prepare_global_plan(plans)[dist.get_rank()]
        except BaseException:
            self.discard()
            raise

    def write(self) -> None:
        """Write this rank's tensors; no rank waits for another. What goes wrong is told by `finish`."""
        try:
            point("before_shard", self.step)
            if self._plan.items:
                self._results = self._writer.write_data(self._plan, self._planner).wait()
            point("after_shard", self.step)
        except Exception as error:
            self.failure = self._told(error)

    def finish(self, common: bytes, facts: bytes, publish: Callable[[], None]) -> None:
        """Agree that all is written, complete the folder and publish it; every rank calls this after `write`.

        Args:
            common: content of `common.pt`; this and `facts`, that of `run.json`, are used on rank 0 only.
            publish: gives the folder its name; called on rank 0.

        Raises:
            StorageError: some rank could not write; raised on every rank.
        """
        try:
            written = every_rank_does(self._outcome, self._group)
            first_rank_does(lambda: self._complete(written, common, facts, publish), self._group)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Remove what is written; nothing once the folder has its name."""
        if dist.get_rank() == 0:
            shutil.rmtree(self.aside, ignore_errors=True)

    def _make_folder(self) -> None:
        shutil.rmtree(self.aside, ignore_errors=True)
        try:
            (self.aside / "state").mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"cannot make {self.aside}: {error}") from error

    def _local_plan(self) -> tuple[SavePlan, int]:
        """This rank's plan, and the bytes of the objects in it."""
        plan = self._planner.create_local_plan()
        objects = [item for item in plan.items if item.type == WriteItemType.BYTE_IO]
        return plan, sum(self._planner.resolve_data(item).getbuffer().nbytes for item in objects)

    def _check_space(self) -> None:
        check_space(self.aside.parent, self.bytes, dist.get_world_size(), f"the checkpoint of step {self.step}")

    def _outcome(self) -> tuple[list[WriteResult], Files]:
        if self.failure is not None:
            raise self.failure
        if len(self._results) != len(self._plan.items):
            raise RuntimeError(f"{len(self._results)} of {len(self._plan.items)} tensors of a rank were written")
        return self._results, self._files.files

    def _complete(
        self, written: list[tuple[list[WriteResult], Files]], common: bytes, facts: bytes, publish: Callable[[], None]
    ) -> None:
        try:
            point("before_publish", self.step)
            state = self.aside / "state"
            self._writer.finish(self._metadata, [results for results, _ in written])
            files = dict(self._files.files)
            for _, of_rank in written:
                files |= of_rank
            format = json.dumps(dataclasses.asdict(CheckpointingConfig("torch_dist", 1)))
            files["common.pt"] = write_file(state / "common.pt", common)
            files["metadata.json"] = write_file(state / "metadata.json", format.encode())
            listed = {f"state/{name}": one for name, one in files.items()}
            listed["run.json"] = write_file(self.aside / "run.json", facts)
            write_manifest(self.aside, self.step, listed)
            sync_folder(state)
            sync_folder(self.aside)
            publish()
        except Exception as error:
            raise self._told(error) from error

    def _told(self, error: Exception) -> Exception:
        """An error of storage in words; any other as it is."""
        if isinstance(error, StorageError) or not isinstance(error, OSError):
            return error
        what, folder = f"the checkpoint of step {self.step}", self.aside.parent
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free, _ = _free(folder)
            return _no_space(folder, f"{free:,} bytes", what, f"{self.bytes:,}")
        return StorageError(f"rank {dist.get_rank()} cannot write {what} to {folder}: {error}")


class _Writer(torch_checkpoint.FileSystemWriter):
    """Torch's, with one file a rank that is hashed while it is written. The same state gives the same bytes."""

    def __init__(self, state_dir: Path, files: HashingFiles) -> None:
        # Torch would sync what is not yet out of the file's buffer; the file does it itself.
        super().__init__(state_dir, thread_count=1, per_thread_copy_ahead=0, sync_files=False)
        self.fs = files

    def storage_meta(self) -> StorageMeta | None:
        """Nothing: the path and a random number would make two equal checkpoints differ."""
        return None


def check_space(folder: Path, bytes: int, files: int, what: str) -> None:
    """Raise a `StorageError` when a folder's file system has no room for so many bytes and files more."""
    free, free_files = _free(folder)
    if free < bytes:
        raise _no_space(folder, f"{free:,} bytes", what, f"{bytes:,}")
    if free_files is not None and free_files < files + _FILES_OF_THE_REST:
        raise _no_space(folder, f"{free_files:,} files (inodes)", what, f"{files + _FILES_OF_THE_REST:,}")


def check_writable(folder: Path) -> None:
    """Raise a `StorageError` when this rank cannot write a file in a folder."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StorageError(f"rank {dist.get_rank()} cannot write to {folder}: {error}") from error


def _no_space(folder: Path, free: str, what: str, needed: str) -> StorageError:
    return StorageError(f"{os.strerror(errno.ENOSPC)}: {folder} has {free} free, {what} needs {needed}")


def _free(folder: Path) -> tuple[int, int | None]:
    """Bytes and files that this user may still write; None for the files where the file system has no limit."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None


def _bytes_of(plans: list[SavePlan]) -> int:
    """Bytes of all ranks' tensors in their files, and of the files beside them."""
    total = _BYTES_OF_THE_REST
    for plan in plans:
        for item in plan.items:
            total += BYTES_BESIDE_A_TENSOR
            if item.tensor_data is not None:
                total += item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
    return total
