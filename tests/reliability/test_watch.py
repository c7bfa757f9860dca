"""Ranks that freeze, stall, part ways or die: the others end in time, non-zero, and name them."""

from __future__ import annotations

import ipaddress
import os
import re
import signal
from pathlib import Path

import pytest
import torch.distributed as dist

from nvembed_mcore.config import CheckpointConfig, EvalConfig, ParallelConfig
from nvembed_mcore.exits import Exit
from nvembed_mcore.parallel.groups import every_rank_does, first_rank_does, initialize
from nvembed_mcore.watchdog import Watch
from tests.helpers import runs
from tests.helpers.supervisor import Ranks, last_step

TIMEOUT_SECONDS = 5.0
"""`parallel.timeout_minutes` of these runs. They end a second or two later on a machine that is idle."""
BUSY_SECONDS = 20.0
"""What a busy machine may take on top; gloo itself would wait for half an hour."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return runs.write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def start(inputs, tmp_path):
    """Starts two ranks on a run that would go on for minutes; ends whatever is left of them."""
    config = runs.run_config(
        inputs,
        tmp_path / "run",
        steps=5000,
        parallel=ParallelConfig(timeout_minutes=TIMEOUT_SECONDS / 60),
        checkpoint=CheckpointConfig(every_steps=5000),
        eval=EvalConfig(),
    )
    started = []

    def begin(**env: str) -> Ranks:
        file = runs.write_config(config)
        started.append(Ranks([str(file)], 2, tmp_path / "output", env=env, kill_others_after=None))
        return started[-1]

    yield begin
    for ranks in started:
        ranks.stop()


def wait_for(ranks: Ranks, rank: int, seconds: float) -> int:
    """The exit status of one rank, which must come within `seconds`."""
    process = ranks.processes[rank]
    process.join(timeout=seconds)
    assert process.exitcode is not None, f"rank {rank} still runs after {seconds} s\n{ranks.outputs()}"
    return process.exitcode


def written(tmp_path, name: str) -> str:
    (file,) = (tmp_path / "run" / "logs").rglob(name)
    return file.read_text(encoding="utf-8")


def log(tmp_path, rank: int) -> str:
    return written(tmp_path, f"rank-{rank}.log")


def stacks(tmp_path, rank: int) -> str:
    return written(tmp_path, f"stacks-rank-{rank}.txt")


@pytest.mark.parametrize("frozen", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_frozen_rank_is_named_by_the_other(start, tmp_path, frozen):
    ranks = start()
    ranks.wait_for_step(2)
    ranks.kill(frozen, signal.SIGSTOP)
    alive = 1 - frozen
    assert wait_for(ranks, alive, TIMEOUT_SECONDS + BUSY_SECONDS) == Exit.HANG
    text, pid = log(tmp_path, alive), ranks.processes[frozen].pid
    assert f"rank {frozen} (host {os.uname().nodename}, pid {pid}) has been silent for" in text, ranks.outputs()
    assert "of step" in text
    assert "in _loop" in stacks(tmp_path, alive)


def test_a_rank_that_stalls_is_named_by_both(start, tmp_path):
    ranks = start(NVEMBED_FAULT="sleep=60@data:1:3")
    ranks.wait_for_step(2)
    assert [wait_for(ranks, rank, TIMEOUT_SECONDS + BUSY_SECONDS) for rank in (0, 1)] == [Exit.HANG, Exit.HANG]
    for rank in (0, 1):
        assert re.search(
            r"rank 1 \(host \S+, pid \d+\) has been in 'data' of step 3 \(fault_injection.py:\d+ in _fail\) for \d+ s "
            r"while rank 0 waits in 'score' of step 3 \(gather.py:\d+ in gather_rows\)",
            log(tmp_path, rank),
        ), ranks.outputs()
    assert "in _fail" in stacks(tmp_path, 1)
    assert "in gather_rows" in stacks(tmp_path, 0)
    assert "has been in 'data'" in written(tmp_path, "first-failure.json")


def test_ranks_in_different_collectives_are_both_named(start, tmp_path):
    ranks = start(NVEMBED_FAULT="barrier@step_end:0:2")
    ranks.wait_for_step(1)
    assert [wait_for(ranks, rank, TIMEOUT_SECONDS + BUSY_SECONDS) for rank in (0, 1)] == [Exit.HANG, Exit.HANG]
    assert re.search(
        r"rank 0 \(.*\) and rank 1 \(.*\) have been in 'end' of step 2 "
        r"\(rank 0: fault_injection.py:\d+ in _fail; rank 1: groups.py:\d+ in largest\) for \d+ s",
        log(tmp_path, 1),
    ), ranks.outputs()


@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_is_named_within_seconds(start, tmp_path, killed):
    # It sleeps for some beats before, or the others might never hear of this step.
    ranks = start(NVEMBED_FAULT=f"sleep=1@step_begin:{killed}:3,kill@data:{killed}:3")
    ranks.wait_for_step(2)
    assert wait_for(ranks, 1 - killed, BUSY_SECONDS) not in (Exit.DONE, Exit.HANG)
    assert f"lost rank {killed} (host {os.uname().nodename}, pid" in ranks.output(1 - killed)
    assert re.search(r"last seen in '\w+' of step 3", ranks.output(1 - killed))


def test_on_one_host_nothing_listens_beyond_it_and_stacks_are_written_on_demand(start, tmp_path):
    ranks = start()
    ranks.wait_for_step(1)
    listening = [address for process in ranks.processes for address in listeners(process.pid)]
    assert len(listening) >= 3  # the store, and gloo in both
    assert all(address.is_loopback for address in listening), listening
    ranks.kill(1, signal.SIGUSR2)
    ranks.wait_until(lambda: "in _loop" in stacks(tmp_path, 1), BUSY_SECONDS)
    assert ranks.exit_codes() == [None, None]
    done = last_step(tmp_path / "run")
    ranks.wait_for_step(done + 2)


def seconds_of_a_beat(folder: Path, frozen: float) -> float:
    """What a rank says of its operation, which began just before it was frozen; its watch has not looked yet."""
    watch = Watch(initialize(ParallelConfig()), TIMEOUT_SECONDS, folder, print)
    watch.enter("data", 3)
    operation, step, began = watch._now
    watch._now, watch._looked = (operation, step, began - frozen), watch._looked - frozen
    return watch._beat().seconds


def test_a_rank_that_was_frozen_with_all_others_is_not_late_when_it_wakes_up(world, tmp_path):
    (seconds,) = world(2).run(seconds_of_a_beat, tmp_path, 3600.0, ranks=1)
    assert seconds < TIMEOUT_SECONDS


def groups_made_by_waiting() -> int:
    initialize(ParallelConfig())
    first_rank_does(int)
    before = len(dist.distributed_c10d._world.pg_map)
    first_rank_does(int)
    every_rank_does(int)
    return len(dist.distributed_c10d._world.pg_map) - before


def test_ranks_that_wait_for_each_other_are_connected_once(world):
    """Each group over gloo is a connection between any two ranks."""
    assert world(2).run(groups_made_by_waiting) == [0, 0]


def listeners(pid: int) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Addresses of the sockets that a process listens on."""
    own = {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir() if file.is_symlink()}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text(encoding="utf-8").splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in own:
                # Words of four bytes, each in the order of this machine.
                raw = bytes.fromhex(local.partition(":")[0])
                words = [raw[i : i + 4][::-1] for i in range(0, len(raw), 4)]
                found.append(ipaddress.ip_address(b"".join(words)))
    return found
