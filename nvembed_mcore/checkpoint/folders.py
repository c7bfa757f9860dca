"""The checkpoint folders of a run: their names, which one is meant, and whom their files belong to.

RUN/checkpoints/step-00000500/   one checkpoint
RUN/checkpoints/latest           name of the folder to go on from
RUN/checkpoints/best             which one had the best evaluation, if the run is evaluated (best.py)
RUN/checkpoints/.writing-*       of a save that was cut short; removed by the next
RUN/checkpoints/.removing-*      likewise of removing an old one
RUN/checkpoints/.replaced-*      what a folder of the same step replaces, until that one has its name
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
from pathlib import Path

from nvembed_mcore.checkpoint.best import BEST, Best, read_best
from nvembed_mcore.checkpoint.manifest import CheckpointError, faults, read_manifest, sync_folder, write_file
from nvembed_mcore.fault_injection import point

log = logging.getLogger(__name__)

POINTER = "latest"
_NAME = re.compile(r"step-(\d{8,})")
_REPLACED = ".replaced-"


def folder_of(run_dir: str | Path) -> Path:
    """Where a run's checkpoints live."""
    return Path(run_dir) / "checkpoints"


def name_of(step: int) -> str:
    """Name of the folder of a step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step in a folder's name."""
    return int(path.name.removeprefix(_REPLACED).removeprefix("step-"))


def step_folders(root: Path) -> list[Path]:
    """All checkpoint folders, good or not, from new to old."""
    if not root.is_dir():
        return []
    found = {}
    for path in root.iterdir():
        name = path.name.removeprefix(_REPLACED)
        # One that is being replaced counts only while the other has not got its name.
        is_one = _NAME.fullmatch(name) and (path.name == name or not os.path.lexists(root / name))
        if is_one and (path.is_dir() or path.is_symlink()):
            found[path] = step_of(path)
    return sorted(found, key=found.__getitem__, reverse=True)


def candidates(root: Path) -> list[Path]:
    """The folders to try, the one that the pointer names first, then the others from new to old.

    Raises:
        CheckpointError: there is a pointer and no folder at all.
    """
    folders, pointer = step_folders(root), root / POINTER
    try:
        name = pointer.read_bytes()[:200].decode("ascii", "replace").strip()
    except OSError as error:
        if folders:
            log.warning("cannot read %s (%r); taking the newest good checkpoint", pointer, error)
        return folders
    if not folders:
        raise CheckpointError(f"{pointer} names {name!r}, which is gone: remove it to start anew")
    first = [path for path in folders if path.name.removeprefix(_REPLACED) == name]
    if not first:
        log.warning("%s names %r, which is no checkpoint here; taking the newest good one", pointer, name)
    return [*first, *(path for path in folders if path not in first)]


def best_of(root: Path) -> Best | None:
    """What had the best evaluation, as long as its folder is there; a file that says nothing useful is passed over."""
    try:
        best = read_best(root)
    except ValueError as error:
        log.warning("%s", error)
        return None
    if best is not None and not (root / name_of(best.step)).is_dir():
        log.warning("%s names step %d, of which there is no checkpoint", root / BEST, best.step)
        return None
    return best


def is_of_run(path: Path) -> bool:
    """Whether a folder is in the `checkpoints/` of a run."""
    return path.parent.name == folder_of("").name


def check_place(path: Path) -> None:
    """Raise a `CheckpointError` when a run's checkpoint folder is a link that leads out of its `checkpoints/`."""
    if is_of_run(path) and path.is_symlink() and path.parent.resolve() not in path.resolve().parents:
        raise CheckpointError(f"it is a symbolic link that leads out of {path.parent}")


def looks_whole(path: Path) -> bool:
    """Whether a folder has its files in their sizes; their content is not read."""
    try:
        check_place(path)
        return not faults(path, read_manifest(path).files, hashed=())
    except CheckpointError:
        return False


def check_owner(path: Path) -> None:
    """Refuse a folder with files of another user, who may have put anything there; warn of what others may change.

    Raises:
        CheckpointError: somebody else but root owns a file.
    """
    for one in [path.parent, path.parent / POINTER, path.parent / BEST, path, *sorted(path.rglob("*"))]:
        if not one.exists():
            continue
        found = one.stat()
        if found.st_uid not in (os.geteuid(), 0):
            raise CheckpointError(
                f"{one} belongs to user {found.st_uid}, this process is user {os.geteuid()}: set "
                f"checkpoint.any_owner to true if you trust its owner"
            )
        if one.is_dir() and found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            log.warning("%s may be written by others (mode %o): chmod go-w it", one, stat.S_IMODE(found.st_mode))


def clear_leftovers(root: Path) -> None:
    """Remove what saves and removals left that were cut short."""
    left = [path for pattern in (".writing-*", ".removing-*") for path in root.glob(pattern)]
    left += [path for path in root.glob(f"{_REPLACED}*") if os.path.lexists(root / path.name.removeprefix(_REPLACED))]
    for path in left:
        _delete(path)


def publish(aside: Path, final: Path) -> None:
    """Give a folder its name. One that has the name already stays readable until this one has it."""
    replaced = final.with_name(_REPLACED + final.name)
    if os.path.lexists(final):
        os.rename(final, replaced)
    os.rename(aside, final)
    sync_folder(final.parent)
    if os.path.lexists(replaced):
        _remove(replaced)


def move_pointer(root: Path, name: str) -> None:
    """Let the pointer name a folder; there is no moment without a pointer."""
    fresh = root / f".{POINTER}.new"
    write_file(fresh, f"{name}\n".encode())
    os.replace(fresh, root / POINTER)
    sync_folder(root)


def prune(newest: Path, keep: int) -> None:
    """Remove what is older than the newest `keep` folders that look whole, but for the best one.

    Later steps are of a run that was set back by hand: they must not crowd out the folder just written.
    """
    folders, best = step_folders(newest.parent), best_of(newest.parent)
    whole = 0
    for path in folders[folders.index(newest) :]:
        if whole >= keep:
            if best is None or step_of(path) != best.step:
                _remove(path, step_of(newest))
        elif looks_whole(path):
            whole += 1


def _remove(path: Path, step: int | None = None) -> None:
    """Remove a folder after the save of `step`; a part of one has no name that anybody takes for a checkpoint's."""
    going = path.with_name(f".removing-{path.name.lstrip('.')}")
    try:
        os.rename(path, going)
    except OSError as error:
        log.warning("cannot remove %s: %s", path, error)
        return
    point("during_prune", step)
    _delete(going)


def _delete(path: Path) -> None:
    """Remove a folder or a link. A network file system keeps what somebody reads: no reason to end a run that saved
    well. The next save tries again."""
    try:
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    except OSError as error:
        log.warning("cannot remove %s: %s", path, error)
