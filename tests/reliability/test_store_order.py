"""What is on the disk before what: all bytes of all files before the folder has its name; old folders that stay."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from nvembed_mcore.checkpoint import folders
from nvembed_mcore.checkpoint.weights_store import save_weights
from nvembed_mcore.checkpoint.writing import _Writer
from nvembed_mcore.config import ParallelConfig
from nvembed_mcore.parallel.groups import initialize


@pytest.fixture
def done(monkeypatch) -> list[tuple[str, str, int]]:
    """What is asked of the disk: (`sync` or `name`, last part of a path, its bytes then)."""
    events, fsync, rename = [], os.fsync, os.rename

    def sync(handle: int) -> None:
        fsync(handle)
        events.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}")), os.fstat(handle).st_size))

    def name(old: str, new: str) -> None:
        rename(old, new)
        events.append(("name", os.path.basename(new), 0))

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", name)
    return events


def save(folder: Path) -> None:
    initialize(ParallelConfig())
    save_weights(folder, {name: ((3, 4), torch.float32) for name in "ab"}, lambda _: torch.ones(3, 4), {"step": 0})


def test_every_byte_is_on_the_disk_before_its_name(done, tmp_path):
    save(tmp_path / "saved")
    files = {path.name: path.stat().st_size for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    assert len(files) == 6
    files[".metadata.tmp"] = files.pop(".metadata")
    synced = {name: size for kind, name, size in done if kind == "sync" and name in files}
    assert synced == files
    order = [(kind, name) for kind, name, _ in done]
    after = [("sync", "manifest.json"), ("sync", "state"), ("sync", ".saved.partial"), ("name", "saved")]
    assert order[-5:] == [*after, ("sync", tmp_path.name)]


def test_a_tensor_that_nobody_wrote_is_missed(monkeypatch, tmp_path):
    honest = _Writer.write_data

    def lossy(self, plan, planner):
        written = honest(self, plan, planner)
        written.value().pop()
        return written

    monkeypatch.setattr(_Writer, "write_data", lossy)
    with pytest.raises(RuntimeError, match="1 of 2 tensors of a rank were written"):
        save(tmp_path / "saved")
    assert not os.listdir(tmp_path)


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_a_run(monkeypatch, caplog, tmp_path):
    """As on a network file system while somebody reads it; the next save tries again."""
    for step in (1, 2, 3):
        save(tmp_path / folders.name_of(step))
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        busy = OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        patch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(busy))
        folders.prune(tmp_path / folders.name_of(3), 2)
        folders.clear_leftovers(tmp_path)
    left = tmp_path / ".removing-step-00000001"
    assert caplog.text.count(f"cannot remove {left}: [Errno {errno.ENOTEMPTY}]") == 2 and left.is_dir()
    assert [path.name for path in folders.step_folders(tmp_path)] == ["step-00000003", "step-00000002"]
    os.symlink(tmp_path / "step-00000002", tmp_path / ".replaced-step-00000003")
    folders.clear_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["step-00000002", "step-00000003"]
