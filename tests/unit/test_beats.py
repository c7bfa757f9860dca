"""What ranks conclude from each other's beats; clocks are numbers here."""

from __future__ import annotations

import dataclasses

import pytest

from nvembed_mcore.beats import DISTRESS, ENDED, FAILED, Beat, Table, Verdict, ranks_of
from nvembed_mcore.exits import Exit

PLACES = [f"host n{rank // 2}, pid {100 + rank}" for rank in range(4)]
INTERVAL, TIMEOUT = 1.0, 10.0


def table() -> Table:
    return Table(range(4), PLACES, INTERVAL, TIMEOUT)


def go_on(table: Table, seconds: int, silent: tuple[int, ...] = (), **changes: Beat) -> Verdict | None:
    """Beats every second; those of `silent` ranks stand still, and `r2=Beat(...)` is what rank 2 says."""
    for _ in range(seconds):
        beats = {}
        for rank, last in table.beats.items():
            said = changes.get(f"r{rank}", last)
            beats[rank] = last if rank in silent else dataclasses.replace(said, count=last.count + 1)
        table.see(beats, INTERVAL)
        if verdict := table.judge():
            return verdict
    return None


def test_beats_and_verdicts_travel_as_text():
    beat = Beat(3, "data", 7, 1.5, "source.py:5 in batch", DISTRESS, "why")
    assert Beat.decode(beat.encode().encode()) == beat
    verdict = Verdict(Exit.HANG, "why")
    assert Verdict.decode(verdict.encode().encode()) == verdict
    assert Verdict.decode(b"") is None


def test_ranks_that_go_on_are_left_alone():
    assert go_on(table(), 100) is None


def test_a_silent_rank_is_named_after_the_timeout_and_not_before():
    ranks = table()
    go_on(ranks, 1, r1=Beat(operation="data", step=7))
    assert go_on(ranks, 9, silent=(1,)) is None
    verdict = go_on(ranks, 1, silent=(1,))
    assert verdict.status == Exit.HANG
    assert verdict.message == (
        "rank 1 (host n0, pid 101) has been silent for 10 s: frozen, or its host is gone; it was last in 'data' of "
        "step 7"
    )


def test_who_was_frozen_itself_accuses_nobody():
    ranks = table()
    ranks.see(ranks.beats, 3600.0)
    assert ranks.judge() is None
    assert go_on(ranks, 100) is None


def test_a_rank_that_has_ended_may_be_silent():
    ranks = table()
    go_on(ranks, 1, r1=Beat(state=ENDED))
    assert go_on(ranks, 100, silent=(1,)) is None


def test_building_evaluating_and_saving_may_last():
    for operation in ("start", "evaluation", "checkpoint"):
        slow = Beat(operation=operation, step=7, seconds=3600.0)
        assert go_on(table(), 100, r0=slow, r1=slow, r2=slow, r3=slow) is None


def test_the_rank_that_is_behind_is_named_and_not_those_that_wait_longest():
    late = Beat(operation="data", step=7, seconds=9.5, line="source.py:55 in batch")
    waits = Beat(operation="score", step=7, seconds=10.0, line="gather.py:38 in gather_rows")
    verdict = go_on(table(), 1, r0=waits, r1=waits, r2=late, r3=waits)
    assert verdict == Verdict(
        Exit.HANG,
        "rank 2 (host n1, pid 102) has been in 'data' of step 7 (source.py:55 in batch) for 10 s while ranks 0-1, 3 "
        "wait in 'score' of step 7 (gather.py:38 in gather_rows)",
    )


def test_of_ranks_in_different_collectives_both_are_told():
    alone = Beat(operation="end", step=7, seconds=12.0, line="a.py:1 in f")
    waits = Beat(operation="score", step=8, seconds=11.0, line="b.py:2 in g")
    verdict = go_on(table(), 1, r0=alone, r1=waits, r2=waits, r3=waits)
    assert "rank 0 (host n0, pid 100) has been in 'end' of step 7 (a.py:1 in f) for 12 s" in verdict.message
    assert "while ranks 1-3 wait in 'score' of step 8 (b.py:2 in g)" in verdict.message


def test_where_nobody_is_behind_the_lines_of_code_tell_them_apart():
    one, other = (Beat(operation="embed", step=7, seconds=11.0, line=line) for line in ("a.py:1 in f", "b.py:2 in g"))
    verdict = go_on(table(), 1, r0=one, r1=one, r2=other, r3=one)
    assert verdict.message.endswith(
        "and rank 2 (host n1, pid 102) and 1 more have been in 'embed' of step 7 (ranks 0-1, 3: a.py:1 in f; rank 2: "
        "b.py:2 in g) for 11 s"
    )


def test_others_that_wait_for_a_silent_rank_are_not_blamed():
    ranks = table()
    go_on(ranks, 4, silent=(1,))
    waits = Beat(operation="score", step=7, seconds=10.0)
    assert "rank 1 (host n0, pid 101) has been silent for 5 s" in go_on(ranks, 1, silent=(1,), r0=waits).message


def test_after_a_failed_collective_the_dead_rank_is_named_within_three_beats():
    ranks = table()
    go_on(ranks, 1, r1=Beat(operation="backward", step=7))
    lost = Beat(operation="score", step=8, state=DISTRESS, error="Connection closed by peer")
    verdict = go_on(ranks, 3, silent=(1,), r0=lost)
    assert verdict == Verdict(Exit.CRASHED, "lost rank 1 (host n0, pid 101), last seen in 'backward' of step 7")


def test_after_a_failed_collective_the_rank_that_failed_first_says_why():
    lost = Beat(operation="score", step=8, state=DISTRESS, error="Connection closed by peer")
    failed = Beat(operation="data", step=8, state=FAILED, error="OSError: cannot read a.bin")
    verdict = go_on(table(), 1, r0=lost, r3=failed)
    assert verdict.message == "rank 3 (host n1, pid 103) failed in 'data' of step 8: OSError: cannot read a.bin"


@pytest.mark.parametrize(("error", "status"), [("Timed out waiting 3000ms", Exit.HANG), ("broken", Exit.CRASHED)])
def test_a_collective_that_fails_among_ranks_that_live_ends_the_run_after_a_moment(error, status):
    ranks = table()
    verdict = go_on(ranks, 8, r2=Beat(state=DISTRESS, error=error))
    assert verdict.status == status
    assert f"a collective failed on rank 2 (host n1, pid 102), though all ranks live: {error}" == verdict.message


def test_ranks_are_told_in_short():
    assert ranks_of([5, 0, 1, 2]) == "ranks 0-2, 5"
    assert ranks_of([7]) == "rank 7"
