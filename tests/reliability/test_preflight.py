"""The check before a job, on two processes of which one is not like the other (examples/slurm/README.md)."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml

import nvembed_mcore
from nvembed_mcore import preflight, preflight_rank, resume
from nvembed_mcore.cli import main
from nvembed_mcore.config import CheckpointConfig, EvalConfig, RunConfig
from nvembed_mcore.data.faults import DataError
from nvembed_mcore.exits import Exit
from tests.helpers.models import tiny_config
from tests.helpers.runs import run_config

NODES = ("n1", "n2")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """The files that a configuration names; the check does not look into them."""
    folder = tmp_path_factory.mktemp("preflight")
    for name in ("tokenizer", "beir"):
        (folder / name).mkdir()
    (folder / "train.jsonl").touch()
    (folder / "config.json").write_text(json.dumps(tiny_config().to_dict()), encoding="utf-8")
    return folder


@contextmanager
def as_node(**changes: str):
    """This process as the only rank of a node of its own."""
    before = dict(os.environ)
    rank = int(os.environ["RANK"])
    here = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "SLURMD_NODENAME": NODES[rank], "NVEMBED_HOSTS": "n1 n2"}
    os.environ.update(here | changes)
    try:
        yield rank
    finally:
        os.environ.clear()
        os.environ.update(before)


def checked(config: RunConfig, *, timeout_seconds: float = 20.0, **of_rank_1) -> tuple[list[str], int]:
    """What the check says on this rank, where rank 1 has other fields."""
    with as_node() as rank:
        config = dataclasses.replace(config, **(of_rank_1 if rank == 1 else {}))
        findings, status = preflight.check(lambda: config, timeout_seconds)
        return [f"{one.what}: {one.text}" for one in findings], int(status)


def with_full_disk(config: RunConfig):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        return checked(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def with_own_disk(config: RunConfig, folders: list[str]):
    """A relative `run_dir` that is another folder on each node, as on a disk that is not shared."""
    before, patience = os.getcwd(), preflight._SHARED_SECONDS
    os.chdir(folders[int(os.environ["RANK"])])
    preflight._SHARED_SECONDS = 0.1
    try:
        return checked(dataclasses.replace(config, run_dir="run"))
    finally:
        os.chdir(before)
        preflight._SHARED_SECONDS = patience


def with_other_code(config: RunConfig):
    before = nvembed_mcore.__version__
    nvembed_mcore.__version__ = ("1.0", "1.1")[int(os.environ["RANK"])]
    try:
        return checked(config)
    finally:
        nvembed_mcore.__version__ = before


def with_wrong_clock(config: RunConfig):
    before, ahead = time.time, 60.0 * int(os.environ["RANK"])
    time.time = lambda: before() + ahead
    try:
        return checked(config)
    finally:
        time.time = before


def was_told_before_the_end(config: RunConfig, told: str) -> bool:
    """Whether rank 0, which needs some time for it, had reported when this rank's check ended."""

    def report(_) -> None:
        time.sleep(0.3)
        Path(told).touch()

    with as_node():
        preflight.check(lambda: config, 20.0, report)
        return Path(told).exists()


def without_rank_1(config: RunConfig):
    return checked(config, timeout_seconds=0.5) if os.environ["RANK"] == "0" else None


def with_rank_1_lost(config: RunConfig):
    """Rank 1 appears and then says nothing, as a node does whose network card fails."""
    if os.environ["RANK"] == "0":
        before, preflight._GRACE_SECONDS = preflight._GRACE_SECONDS, 0.2
        try:
            return checked(config, timeout_seconds=3)
        finally:
            preflight._GRACE_SECONDS = before
    with as_node():
        store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 2, False, timedelta(seconds=20))
        here = preflight_rank.look_around(lambda: config, 1)
        dist.PrefixStore("preflight", store).set("rank/1", json.dumps(dataclasses.asdict(here)))
        preflight_rank.remove_probe(here)
    # A meeting that failed leaves torch's count of groups one further: on both ranks, or they would not meet again.
    with suppress(RuntimeError):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=1, world_size=2, timeout=timedelta(seconds=0.2))


def test_two_ranks_that_agree(world, inputs, tmp_path):
    assert world(2).run(checked, run_config(inputs, tmp_path / "run")) == [([], 0)] * 2
    assert list((tmp_path / "run").iterdir()) == []


def test_no_rank_ends_before_rank_0_has_reported(world, inputs, tmp_path):
    """srun ends rank 0 as soon as another rank ends badly."""
    assert (
        world(2).run(was_told_before_the_end, run_config(inputs, tmp_path / "run"), str(tmp_path / "told"))
        == [True] * 2
    )


def test_another_configuration_is_named_with_both_values(world, inputs, tmp_path):
    results = world(2).run(checked, run_config(inputs, tmp_path), steps=9, checkpoint=CheckpointConfig(every_steps=5))
    lines = [
        "configuration: checkpoint.every_steps is 5 on rank 1 on n2, 3 on rank 0 on n1",
        "configuration: steps is 9 on rank 1 on n2, 8 on rank 0 on n1",
    ]
    assert results == [(lines, Exit.CONFIGURATION)] * 2


def test_a_path_that_one_node_lacks(world, inputs, tmp_path):
    results = world(2).run(checked, run_config(inputs, tmp_path), eval=EvalConfig(path="/nowhere/beir"))
    for lines, status in results:
        assert status == Exit.CONFIGURATION
        assert "configuration: rank 1 on n2: eval.path: there is no /nowhere/beir" in lines


def test_a_disk_that_takes_nothing(world, inputs, tmp_path):
    for lines, status in world(2).run(with_full_disk, run_config(inputs, tmp_path / "run")):
        assert status == Exit.STORAGE
        assert lines == [f"storage: rank 1 on n2: cannot write in {tmp_path / 'run'}: [Errno 27] File too large"]


def test_a_run_folder_that_is_not_shared(world, inputs, tmp_path):
    folders = [tmp_path / name for name in NODES]
    for folder in folders:
        folder.mkdir()
    results = world(2).run(with_own_disk, run_config(inputs, tmp_path), [str(folder) for folder in folders])
    for lines, status in results:
        assert status == Exit.STORAGE and len(lines) == 1
        assert lines[0].startswith("storage: rank 1 on n2: cannot read run/.preflight-0-")
        assert "which rank 0 wrote: run_dir must be on a shared file system" in lines[0]


def test_another_version_of_the_code(world, inputs, tmp_path):
    for lines, status in world(2).run(with_other_code, run_config(inputs, tmp_path)):
        assert status == Exit.CONFIGURATION
        assert lines == ["code: nvembed_mcore is '1.1' on rank 1 on n2, '1.0' on rank 0 on n1"]


def test_a_wrong_clock_is_only_told(world, inputs, tmp_path):
    for lines, status in world(2).run(with_wrong_clock, run_config(inputs, tmp_path)):
        assert status == Exit.DONE and len(lines) == 1
        assert lines[0].startswith("clock: the nodes' clocks differ by 60.")


def test_a_rank_that_does_not_appear(world, inputs, tmp_path):
    lines, status = world(2).run(without_rank_1, run_config(inputs, tmp_path))[0]
    assert (lines, status) == (["network: rank 1 on n2 did not appear within 0.5 s"], Exit.HANG)


def test_a_rank_that_hangs_in_the_first_collective(world, inputs, tmp_path):
    lines, status = world(2).run(with_rank_1_lost, run_config(inputs, tmp_path))[0]
    assert status == Exit.HANG
    assert "network: rank 1 on n2 hung in a small all-reduce within 3 s" in lines
    assert any(line.startswith("network: rank 0 on n1: a small all-reduce failed: ") for line in lines)


def test_a_rank_0_that_cannot_be_reached(inputs, tmp_path, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    findings, status = preflight.check(lambda: run_config(inputs, tmp_path), 0.5)
    assert status == Exit.HANG
    assert "cannot talk to rank 0 at 127.0.0.1:1: " in findings[-1].text


def alone(config: RunConfig) -> tuple[list[str], Exit]:
    findings, status = preflight.check(lambda: config)
    return [one.text for one in findings], status


def test_two_checkpoints_must_fit(inputs, tmp_path, monkeypatch):
    huge = tmp_path / "config.json"
    huge.write_text(json.dumps(tiny_config(vocab_size=10**15).to_dict()), encoding="utf-8")
    config = run_config(inputs, tmp_path / "run")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, config=str(huge)))
    lines, status = alone(config)
    assert status == Exit.STORAGE and len(lines) == 1
    assert f"{tmp_path / 'run'} has " in lines[0] and " bytes free, two checkpoints need about " in lines[0]
    # A checkpoint that is there tells better than the architecture.
    step = tmp_path / "run" / "checkpoints" / "step-00000001"
    step.mkdir(parents=True)
    (step / "weights").write_bytes(b"0" * 1000)
    assert alone(config) == ([], Exit.DONE)
    monkeypatch.setattr(preflight_rank, "FEWEST_FREE_FILES", 10**15)
    lines, status = alone(config)
    assert status == Exit.STORAGE and "files (inodes) free, a run needs 1,000,000,000,000,000" in lines[0]


def test_parameters_of_mistral_7b():
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
    # Without the output matrix: 7,241,732,096 in the model card less 32000 x 4096.
    sizes |= {"vocab_size": 32000, "num_hidden_layers": 32}
    assert preflight_rank._parameters(sizes) == 7_241_732_096 - 32000 * 4096


def test_a_configuration_that_cannot_be_read(inputs, tmp_path):
    def read() -> RunConfig:
        raise DataError("line 3 of it is wrong")

    findings, status = preflight.check(read)
    assert status == Exit.CONFIGURATION and findings[0].text.endswith(": line 3 of it is wrong")


def test_errors_of_gpus():
    table = "0, 0, No\n1, 3, No\n2, [N/A], [N/A]\n3, 0, Yes\n"
    assert [text for _, _, text in preflight_rank.gpu_errors(table)] == [
        "GPU 1 has 3 memory errors that it could not correct",
        "GPU 3 has damaged memory that waits for a reset",
    ]


def test_the_command(inputs, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(resume.plain(run_config(inputs, tmp_path / "run"))), encoding="utf-8")
    assert main(["preflight", str(path), "--show", "run_dir"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run'}\n"
    assert main(["preflight", str(path)]) == 0
    assert capsys.readouterr().out == "preflight: all is well\n"
    assert main(["preflight", str(path), "--steps", "9", "--eval.path", "nowhere"]) == 78
    out = capsys.readouterr().out
    assert "FAILED: configuration: rank 0 on " in out and "eval.path: there is no nowhere\n" in out
    assert out.endswith("preflight: ends with 78\n")
