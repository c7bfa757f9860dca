"""Saving: what is stored, beside training or before it goes on; room that is not there; and what is kept."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
import os
import resource
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from nvembed_mcore import fault_injection
from nvembed_mcore.build import build_model, read_architecture
from nvembed_mcore.checkpoint import optimizer_state, store, writing
from nvembed_mcore.checkpoint.saver import Saver
from nvembed_mcore.config import CheckpointConfig
from nvembed_mcore.optim import build_optimizer
from nvembed_mcore.parallel.groups import every_rank_does, first_rank_does, initialize
from tests.helpers import runs
from tests.helpers.models import tiny_config


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """An architecture whose checkpoint has less than a megabyte."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    return folder


class Trainer:
    """A model whose weights and moments change by random gradients; its checkpoints go to `run_dir`."""

    def __init__(self, inputs: Path, run_dir: Path, **settings) -> None:
        self.config = runs.run_config(inputs, run_dir)
        self.groups = initialize(self.config.parallel)
        hf_config = read_architecture(self.config.model)
        self.facts = {"config": {"loss": {}, "model": {"pooling": vars(self.config.model.pooling)}}}
        self.facts["hf_config"] = hf_config.to_dict()
        self.chunks = build_model(self.config, hf_config, self.groups)
        self.optimizer = build_optimizer(self.config.optim, self.chunks)
        self.go_to(run_dir, **settings)

    def go_to(self, run_dir: Path, **settings) -> None:
        self.run_dir = run_dir
        self.saver = Saver(CheckpointConfig(**settings), run_dir, self.groups)

    def step(self, seed: int) -> None:
        torch.manual_seed(seed)
        for chunk in self.chunks:
            for parameter in chunk.module.parameters():
                parameter.main_grad.normal_()
        self.optimizer.step()

    def save(self, step: int) -> None:
        self.saver.save(step, self.chunks, self.optimizer, self.facts)

    def load(self, step: int) -> None:
        found = store.read_checkpoint(self.run_dir / "checkpoints" / f"step-{step:08d}")
        store.load_checkpoint(found, self.chunks, self.optimizer)

    def digest(self) -> str:
        """Of this rank's weights and moments."""
        state = hashlib.sha256()
        for chunk in self.chunks:
            for parameter in chunk.module.parameters():
                state.update(parameter.detach().numpy().tobytes())
        for one in self.optimizer.chained_optimizers if hasattr(self.optimizer, "chained_optimizers") else []:
            for values in one.optimizer.state.values():
                state.update(values["exp_avg"].numpy().tobytes() + values["exp_avg_sq"].numpy().tobytes())
        return state.hexdigest()

    def folders(self) -> list[str]:
        dist.barrier()
        found = sorted(os.listdir(self.run_dir / "checkpoints"))
        dist.barrier()
        return found


@contextlib.contextmanager
def fault(asked: str) -> Iterator[None]:
    os.environ[fault_injection.VARIABLE] = asked
    fault_injection._done.clear()
    try:
        yield
    finally:
        del os.environ[fault_injection.VARIABLE]


@contextlib.contextmanager
def held_up(name: str) -> Iterator[None]:
    """An asynchronous save that is begun inside comes to the point `name`, and goes on behind the block."""
    go_on = threading.Event()
    with mock.patch.object(writing, "point", lambda at, step: at != name or go_on.wait(60)):
        yield
    go_on.set()


def error_of_save(trainer: Trainer, step: int) -> str:
    """What a save, or a poll after it, raises."""
    try:
        trainer.save(step)
        for _ in range(1000):
            trainer.saver.poll()
            time.sleep(0.01)
            if trainer.saver._pending is None:
                return ""
        return "still pending"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def with_faults(inputs: Path, root: Path, faults: list[str]) -> list:
    trainer, found = Trainer(inputs, root), []
    trainer.step(0)
    gc.freeze()  # Megatron collects garbage at each save: not among all that the process has imported
    for is_async in (False, True):
        for one in faults[2 * is_async :: 1 + is_async]:
            trainer.go_to(root / f"{is_async}-{one}", async_save=is_async)
            trainer.save(1)
            trainer.saver.wait()
            with fault(one):
                error = error_of_save(trainer, 2)
            folders = trainer.folders()
            good = store.newest_good(CheckpointConfig(), trainer.run_dir)
            if not is_async:
                trainer.save(3)
            found.append((one, error, folders, good.step, trainer.folders()))
    gc.unfreeze()
    return found


BEFORE = ["full@before_shard:0", "full@before_shard:1", "full@mid_shard:0", "full@mid_shard:1", "full@after_shard:1"]
BEFORE += ["error@mid_shard:1", "full@before_publish:0"]
AFTER = ["full@before_pointer:0", "full@after_pointer:0"]


def test_a_failure_of_one_rank_is_raised_on_all_and_leaves_nothing(world, inputs, tmp_path):
    """`full` is `No space left on device` where a write would give it."""
    first, second = world(2).run(with_faults, inputs, tmp_path, BEFORE + AFTER)
    assert first == second and len(first) == 9 + 4
    for number, (asked, error, folders, good, later) in enumerate(first):
        if asked.startswith("error"):
            assert error == f"RuntimeError: the failure that {asked} asked for"
        else:
            assert error.startswith("StorageError: No space left on device: ") and "checkpoints has " in error
            assert " bytes free, the checkpoint of step 2 needs " in error and "unexpected" not in error
        # Before it has its name nothing is left; after that it is complete, and only the pointer may be behind.
        kept = ["step-00000001"] if asked in BEFORE else ["step-00000001", "step-00000002"]
        assert folders == ["latest", *kept]
        assert good == (2 if asked == "full@after_pointer:0" else 1)
        assert later == (["latest", kept[-1], "step-00000003"] if number < 9 else folders)


def saved_twice(inputs: Path, root: Path) -> list[bool]:
    """Whether the asynchronous one is there while its writer is held up, and when it was waited for."""
    trainer = Trainer(inputs, root)
    trainer.step(0)
    trainer.save(5)
    trainer.go_to(root / "async", async_save=True)
    with held_up("mid_shard"):
        trainer.save(5)
        for seed in range(1, 4):
            trainer.saver.poll()
            trainer.step(seed)
        seen = [os.path.lexists(root / "async/checkpoints/step-00000005")]
    trainer.saver.wait()
    return [*seen, os.path.lexists(root / "async/checkpoints/step-00000005")]


def test_an_asynchronous_save_equals_a_synchronous_one_by_bits(world, inputs, tmp_path):
    """While training goes on and a slow disk writes."""
    assert world(2).run(saved_twice, inputs, tmp_path) == [[False, True]] * 2
    plain, beside = (tmp_path / name / "checkpoints/step-00000005" for name in (".", "async"))
    files, others = (sorted(p.relative_to(at) for p in at.rglob("*") if p.is_file()) for at in (plain, beside))
    assert len(files) == 7 and others == files
    for file in files:
        assert (plain / file).read_bytes() == (beside / file).read_bytes(), file


def saved_and_loaded(inputs: Path, root: Path) -> tuple[list[str], list[str], str]:
    """Digests of three states when they were saved, and of what was loaded, by us and at last by plain Megatron."""
    from megatron.core import dist_checkpointing

    trainer, saved, loaded = Trainer(inputs, root, async_save=True, keep=3), [], []
    for step in (1, 2, 3):
        trainer.step(step)
        saved.append(trainer.digest())
        trainer.save(step)
    trainer.step(4)
    trainer.saver.wait()
    for step in (1, 2, 3):
        trainer.load(step)
        loaded.append(trainer.digest())
    trainer.step(9)
    state = store.sharded_state(trainer.chunks, trainer.optimizer, is_loading=True)
    state = dist_checkpointing.load(state, str(root / "checkpoints/step-00000003/state"))
    trainer.chunks[0].module.load_state_dict(state["model"]["0"])
    optimizer_state.load(trainer.optimizer, {"0": store.weights_of(trainer.chunks[0].module)}, state["optimizer"])
    return saved, loaded, trainer.digest()


def test_each_save_has_the_weights_of_its_step_and_megatron_reads_it(world, inputs, tmp_path):
    for saved, loaded, by_megatron in world(2).run(saved_and_loaded, inputs, tmp_path):
        assert len({*saved}) == 3 and loaded == saved and by_megatron == saved[2]


def complaints(inputs: Path, run_dir: Path) -> list[str]:
    """What Megatron says of a save in which rank 1 has the end of one parameter only and nothing else."""
    trainer, said = Trainer(inputs, run_dir), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    trainer.step(0)
    logging.getLogger("megatron.core.dist_checkpointing").addHandler(handler)
    trainer.save(1)
    logging.getLogger("megatron.core.dist_checkpointing").removeHandler(handler)
    return said


def test_a_rank_without_a_share_of_its_own_saves_in_silence(world, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(vocab_size=20_000).to_dict()))
    assert world(2).run(complaints, tmp_path, tmp_path / "run") == [[], []]


def pruned(inputs: Path, root: Path) -> list:
    trainer, found = Trainer(inputs, root), []
    trainer.step(0)
    for step in (1, 2, 3, 4):
        trainer.save(step)
    found.append(trainer.folders())
    if trainer.groups.rank == 0:
        os.truncate(root / "checkpoints/step-00000004/run.json", 5)
        (root / "checkpoints/.writing-step-00000007").mkdir()
        (root / "checkpoints/.removing-step-00000001").mkdir()
    trainer.save(5)
    found.append(trainer.folders())
    trainer.step(1)
    before = os.stat(root / "checkpoints/step-00000003").st_ino, os.stat(root / "checkpoints/step-00000005").st_ino
    trainer.save(5)
    after = os.stat(root / "checkpoints/step-00000003").st_ino, os.stat(root / "checkpoints/step-00000005").st_ino
    found.append((trainer.folders(), before[0] == after[0], before[1] != after[1]))
    with fault("error@during_prune:0"):
        found.append((error_of_save(trainer, 6), trainer.folders()))
    found.append((root / "checkpoints/latest").read_text())
    trainer.saver.prepare(trainer.chunks, root / "checkpoints" / "step-00000006")
    found.append(trainer.folders())
    return found


def test_what_is_kept(world, inputs, tmp_path):
    step = "step-0000000{}".format
    first, second = world(2).run(pruned, inputs, tmp_path)
    assert first == second
    kept, beside_damaged, saved_again, interrupted, pointer, tidied = first
    assert kept == ["latest", step(3), step(4)]
    assert beside_damaged == ["latest", step(3), step(4), step(5)], "a damaged one does not count"
    assert saved_again == (["latest", step(3), step(4), step(5)], True, True), "a step saved again is replaced"
    error, folders = interrupted
    assert "during_prune" in error and {step(5), step(6)} <= {*folders} and pointer == f"{step(6)}\n"
    assert tidied == ["latest", step(5), step(6)], "the next start does what was cut short"


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 16 MB: room for two checkpoints, and one more while it is written."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m,nr_inodes=200", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def on_a_small_disk(inputs: Path, disk: Path) -> list:
    """The errors of four saves: without room for its bytes, for its files, filled while it is written, and cut off."""
    trainer, found, is_first = Trainer(inputs, disk), [], dist.get_rank() == 0
    trainer.step(0)
    trainer.save(1)
    trainer.save(2)

    def fill(left: int, left_files: int = 9) -> None:
        """Until a file system has only so many bytes and files."""
        if is_first:
            while os.statvfs(disk).f_favail > left_files + 1:
                (disk / f"junk{os.statvfs(disk).f_favail}").touch()
            with open(disk / "junk", "wb", buffering=0) as file:
                while (space := os.statvfs(disk)).f_bavail * space.f_frsize > left:
                    file.write(bytes(space.f_frsize))
        dist.barrier()

    def clean() -> None:
        dist.barrier()
        if is_first:
            for file in disk.glob("junk*"):
                file.unlink()
        dist.barrier()

    fill(1 << 20, 100)
    found.append((error_of_save(trainer, 3), trainer.folders()))
    clean()
    fill(8 << 20)
    found.append((error_of_save(trainer, 3), trainer.folders()))
    clean()
    trainer.go_to(disk, async_save=True)
    with held_up("before_shard"):
        trainer.save(3)
        fill(0, 100)
    found.append((error_of_save(trainer, 4), trainer.folders()))
    clean()
    trainer.go_to(disk)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft if is_first else 1 << 14, hard))
    found.append((error_of_save(trainer, 4), trainer.folders()))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return [*found, store.newest_good(CheckpointConfig(), disk).step]


def test_a_disk_that_is_full(world, inputs, small_disk):
    first, second = world(2).run(on_a_small_disk, inputs, small_disk)
    assert first == second
    *failed, good = first
    assert good == 2
    for error, folders in failed:
        assert error.startswith("StorageError: ") and folders == ["latest", "step-00000001", "step-00000002"], error
    no_bytes, no_files, filled, limited = (error for error, _ in failed)
    for error in (no_bytes, filled):
        assert "No space left on device: " in error and " bytes free, the checkpoint of step 3 needs " in error
    assert " files (inodes) free, the checkpoint of step 3 needs " in no_files
    assert "rank 1 cannot write the checkpoint of step 4" in limited and "File too large" in limited


def without_room(inputs: Path, run_dir: Path) -> str:
    trainer = Trainer(inputs, run_dir)
    try:
        trainer.saver.prepare(trainer.chunks, None)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_run_that_cannot_save_does_not_start(world, inputs, small_disk):
    (small_disk / "junk").write_bytes(bytes((16 << 20) - (1 << 18)))
    first, second = world(2).run(without_room, inputs, small_disk)
    assert first == second and "No space left on device" in first and "a checkpoint of this run needs " in first
    # Where an interrupted save took the room, it is given back.
    os.renames(small_disk / "junk", small_disk / "checkpoints/.writing-step-00000003/state/junk")
    assert world(2).run(without_room, inputs, small_disk) == ["", ""]
    assert not os.listdir(small_disk / "checkpoints")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    first, second = world(2).run(without_room, inputs, small_disk)
    assert first == second and first.startswith(f"StorageError: rank 0 cannot write to {small_disk / 'checkpoints'}: ")
    assert "Read-only file system" in first


class Unportable(OSError):
    """Cannot be pickled, nor be made from its message."""

    def __init__(self, number: int, handle: object) -> None:
        super().__init__(f"failure {number}")
        self.handle = handle


def with_unportable_errors(inputs: Path) -> list[str]:
    initialize(runs.run_config(inputs, inputs).parallel)
    found = []
    for share, rank in ((first_rank_does, 0), (every_rank_does, 0), (every_rank_does, 1)):

        def fail(rank: int = rank) -> None:
            if dist.get_rank() == rank:
                raise Unportable(rank, threading.Lock())

        try:
            share(fail)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def test_an_error_that_cannot_travel_is_told_all_the_same(world, inputs):
    expected = [f"RuntimeError: Unportable: failure {rank}" for rank in (0, 0, 1)]
    assert world(2).run(with_unportable_errors, inputs) == [expected] * 2
