"""Every file of a good checkpoint deleted, cut, emptied or changed: what is damaged is never loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nvembed_mcore.checkpoint import store
from nvembed_mcore.checkpoint.manifest import MANIFEST
from nvembed_mcore.checkpoint.store import CheckpointError
from nvembed_mcore.cli import main
from nvembed_mcore.config import CheckpointConfig
from nvembed_mcore.log import close_logging
from nvembed_mcore.parallel.groups import initialize
from nvembed_mcore.resume import restore
from nvembed_mcore.train import train
from tests.helpers import runs
from tests.helpers.checkpoints import rewrite, seal

OLD, NEW = "step-00000001", "step-00000002"
FILES = ["manifest.json", "run.json", *(f"state/{name}" for name in (".metadata", "__0_0.distcp", "common.pt"))]
FILES += ["state/metadata.json"]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A run with checkpoints of steps 1 and 2."""
    root = tmp_path_factory.mktemp("good")
    config = runs.run_config(runs.write_inputs(root / "inputs"), root / "run", steps=2)
    quiet = dataclasses.replace(config.eval, path=None)
    train(dataclasses.replace(config, eval=quiet, checkpoint=CheckpointConfig(every_steps=1)))
    close_logging()
    return root / "run"


@pytest.fixture
def run(good, tmp_path) -> Path:
    """A copy to damage."""
    initialize(runs.run_config(good, good).parallel)
    shutil.copytree(good, tmp_path / "run")
    return tmp_path / "run"


def found(run_dir: Path, **settings) -> Path | None:
    """The folder that a resume takes, by its name."""
    one = store.newest_good(CheckpointConfig(**settings), run_dir)
    return one and one.path.name


def delete(file: Path) -> None:
    file.unlink()


def cut(file: Path) -> None:
    os.truncate(file, random.Random(1).randrange(file.stat().st_size))


def empty(file: Path) -> None:
    file.write_bytes(b"")


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def flip(file: Path) -> None:
    """One bit in the middle."""
    with open(file, "r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        (byte,) = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 8]))


HOW = [delete, cut, empty, zero, flip]


@contextlib.contextmanager
def damaged(file: Path, how: Callable[[Path], None]) -> Iterator[None]:
    kept = file.read_bytes()
    how(file)
    try:
        yield
    finally:
        file.write_bytes(kept)


def test_every_file_is_covered(good):
    folder = good / "checkpoints" / NEW
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == sorted(FILES)
    assert sorted(json.loads((folder / MANIFEST).read_text())["files"]) == sorted({*FILES} - {MANIFEST})


@pytest.mark.parametrize("how", HOW, ids=lambda how: how.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_passed_over_or_refused_by_name(run, caplog, name, how):
    file, other = run / "checkpoints" / NEW / name, run / "checkpoints" / OLD / name
    # A bit of the manifest may be one of another file's hash.
    said = ".json" if name == MANIFEST else file.name
    with damaged(file, how), caplog.at_level(logging.WARNING):
        assert found(run) == OLD
        assert NEW in caplog.text and said in caplog.text
        # An explicit path, and the run's newest for whatever reads one: refused, and told what to take instead.
        with pytest.raises(CheckpointError, match=f"{NEW} is damaged.*{OLD}$") as caught:
            store.open_weights(store.read_checkpoint(run / "checkpoints" / NEW))
        assert said in str(caught.value)
        with pytest.raises(CheckpointError, match=f"{NEW} is damaged.*{OLD}$"):
            store.open_weights(store.find_checkpoint(run))
        with damaged(other, how), pytest.raises(CheckpointError, match="no checkpoint of this run is good") as caught:
            found(run)
        assert OLD in str(caught.value) and NEW in str(caught.value) and str(caught.value).count(said) >= 2
    assert found(run) == NEW


def test_commands_name_the_one_to_take(run, capsys, tmp_path):
    flip(run / "checkpoints" / NEW / "state" / "__0_0.distcp")
    assert main(["export-hf", str(run), str(tmp_path / "export")]) == 78
    text = " ".join(capsys.readouterr().err.split())
    assert f"{NEW} is damaged" in text and "content is not what was written" in text and OLD in text
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"\xff\xfe\x00",
        b"../../elsewhere",
        b"/etc",
        b"step-00000009\n",
        b"step-1\0",
        b"step-00000001/..",
    ],
)
def test_a_pointer_that_means_nothing(run, caplog, content):
    """The newest good folder is taken, and the log says why."""
    pointer = run / "checkpoints" / "latest"
    pointer.unlink() if content is None else pointer.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert found(run) == NEW and str(pointer) in caplog.text
    assert store.find_checkpoint(run).path.name == NEW


def test_a_pointer_set_back_by_hand_counts(run):
    (run / "checkpoints" / "latest").write_text(f"{OLD}\n")
    assert found(run) == OLD


def test_a_link_that_leads_out_is_refused(run, tmp_path, caplog):
    os.rename(run / "checkpoints" / NEW, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", run / "checkpoints" / NEW)
    assert found(run) == OLD and "symbolic link that leads out" in caplog.text
    with pytest.raises(CheckpointError, match="symbolic link that leads out"):
        store.find_checkpoint(run)
    # What leads to another folder of the run is harmless, and so is a user's own link to one.
    (run / "checkpoints" / NEW).unlink()
    os.rename(tmp_path / "elsewhere", run / "checkpoints" / "kept")
    os.symlink("kept", run / "checkpoints" / NEW)
    assert found(run) == NEW
    os.symlink(run / "checkpoints" / "kept", tmp_path / "best")
    assert store.find_checkpoint(tmp_path / "best").step == 2


@pytest.mark.parametrize(
    "name", ["../../../outside", "/etc/passwd", "state/../../x", "a\0b", "./run.json", "", "\ud800"]
)
def test_a_manifest_that_leads_out(run, caplog, name):
    file = run / "checkpoints" / NEW / MANIFEST
    tree = json.loads(file.read_text())
    tree["files"][name] = [3, "0" * 32]
    file.write_text(json.dumps(tree))
    assert found(run) == OLD and "does not stay in the folder" in caplog.text


@pytest.mark.parametrize(
    "one", [[float("inf"), "0" * 32], [float("nan"), "0" * 32], ["3", "0" * 32], [3, None], 3, []]
)
def test_a_manifest_without_sense(run, caplog, one):
    file = run / "checkpoints" / NEW / MANIFEST
    file.write_text(json.dumps({"format": 1, "step": 2, "files": {"run.json": one}}))
    assert found(run) == OLD and "manifest.json is damaged" in caplog.text


@pytest.mark.parametrize(
    "facts",
    [[], {"step": 2}, {"step": "2"}, {"step": 2, "config": 5}, {"step": 2, "config": {"loss": [], "model": {}}}, None],
)
def test_a_run_file_without_sense(run, caplog, facts):
    """It is what was written, says the manifest; it describes no model all the same."""
    rewrite(run / "checkpoints" / NEW / "run.json", facts)
    assert found(run) == OLD and "run.json" in caplog.text
    with pytest.raises(CheckpointError, match=r"cannot use .*run\.json"):
        store.find_checkpoint(run)


def test_a_step_that_the_manifest_does_not_have(run, caplog):
    seal(run / "checkpoints" / NEW, step=7)
    assert found(run) == OLD and "its step is 2, manifest.json says 7" in caplog.text


def test_an_interrupted_first_save_is_no_checkpoint(run):
    shutil.rmtree(run / "checkpoints" / NEW)
    os.rename(run / "checkpoints" / OLD, run / "checkpoints" / f".writing-{OLD}")
    os.unlink(run / "checkpoints" / "latest")
    assert found(run) is None and store.find_checkpoint(run) is None


def test_a_pointer_to_nothing_is_no_fresh_start(run):
    for name in (NEW, OLD):
        shutil.rmtree(run / "checkpoints" / name)
    with pytest.raises(CheckpointError, match=f"latest names '{NEW}', which is gone: remove it to start anew"):
        found(run)


def test_a_replaced_folder_counts_until_the_new_one_has_its_name(run):
    os.rename(run / "checkpoints" / NEW, run / "checkpoints" / f".replaced-{NEW}")
    assert found(run) == f".replaced-{NEW}"
    shutil.copytree(run / "checkpoints" / f".replaced-{NEW}", run / "checkpoints" / NEW)
    assert found(run) == NEW


def test_files_of_another_user(run, caplog):
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    file = run / "checkpoints" / NEW / "state" / "common.pt"
    os.chown(file, 4321, -1)
    with pytest.raises(
        CheckpointError, match="belongs to user 4321, this process is user 0: set checkpoint.any_owner"
    ):
        found(run)
    assert found(run, any_owner=True) == NEW
    os.chown(file, 0, -1)
    os.chmod(file.parent, 0o775)  # noqa: S103
    assert found(run) == NEW and "may be written by others (mode 775)" in caplog.text


def test_the_manifest_to_begin_from(run):
    sha = store.fingerprint(store.find_checkpoint(run))
    assert found(run, manifest_sha256=sha) == NEW
    with pytest.raises(CheckpointError, match=f"has SHA-256 {sha}, checkpoint.manifest_sha256 asks for {'0' * 64}"):
        found(run, manifest_sha256="0" * 64)
    with pytest.raises(CheckpointError, match="has no checkpoint, and checkpoint.manifest_sha256 asks for"):
        found(run / "nothing", manifest_sha256=sha)


def resumed(inputs: Path, run_dir: Path, damage: bool) -> list[str]:
    """Resume on several ranks, of which one finds the damage; what each says."""
    config = dataclasses.replace(runs.run_config(inputs, run_dir, steps=2))
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, path=None))
    initialize(config.parallel)
    if damage and dist.get_rank() == 0:
        for name in (OLD, NEW):
            flip(run_dir / "checkpoints" / name / "state" / "common.pt")
    dist.barrier()
    try:
        return [str(restore(config, [], None, {}))]
    except CheckpointError as error:
        return [str(error)]


def test_ranks_share_the_files_and_agree(world, run):
    first, second = world(2).run(resumed, run.parent / "inputs", run, True)
    assert first == second and "no checkpoint of this run is good" in first[0] and first[0].count("common.pt") == 2


def test_a_tensor_is_what_its_name_says_or_refused(run):
    """The reading of one tensor and the whole agree with torch's own reader."""
    from torch.distributed.checkpoint import FileSystemReader, load

    one = store.find_checkpoint(run)
    read, name = store.open_weights(one), "pooling.latents"
    expected = torch.empty(store.stored_tensors(one)[name][0])
    load({name: expected}, storage_reader=FileSystemReader(one.path / "state"), no_dist=True)
    assert torch.equal(read(name), expected) and expected.abs().sum() > 0
