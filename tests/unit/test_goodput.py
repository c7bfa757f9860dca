"""Where the time of simulated runs went, against what the simulation knows."""

from __future__ import annotations

import json
import math
import random
from datetime import datetime, timedelta, timezone

import pytest

from nvembed_mcore import goodput
from nvembed_mcore.run_record import RUN_FILE, RunRecord

BEGAN = datetime(2026, 1, 1, tzinfo=timezone.utc)


class Simulation:
    """A run whose clock moves only when it is told to, and which knows what each second was spent on."""

    def __init__(self, log_every: int = 1) -> None:
        self.clock = 0.0
        self.truth = dict.fromkeys(goodput.BUCKETS, 0.0)
        self.attempts: list[goodput.Attempt] = []
        self.lines: list[dict] = []
        self.seconds_of: dict[int, float] = {}
        self.saved = self.done = 0
        self.last_sign = 0.0
        self._log_every = log_every

    def now(self) -> datetime:
        return BEGAN + timedelta(seconds=self.clock)

    def spend(self, bucket: str, seconds: float) -> None:
        self.clock += seconds
        self.truth[bucket] += seconds

    def start(self, build: float) -> None:
        """A process starts, and reaches its loop `build` seconds later."""
        if self.attempts and self.attempts[-1]["end"] is None:
            sign = BEGAN + timedelta(seconds=self.last_sign)
            goodput.close_killed(self.attempts[-1], sign, self.lines, "killed")
        self.ledger = goodput.Ledger(lambda: self.clock, self.clock)
        begin = self.clock
        self.spend("restart", build)
        before = self.attempts[-1] if self.attempts else None
        self.attempts.append(goodput.opened(before, len(self.attempts) + 1, self.now(), self.clock - begin))
        self.saves = 0
        self.ledger.starts_the_loop()
        goodput.go_on_after(self.attempts, self.saved, self.lines)
        goodput.update(self.attempts[-1], self.ledger, self.saved, 0)
        again = [step for step in self.seconds_of if step > self.saved]
        for step in again:
            self.truth["productive"] -= self.seconds_of[step]
            self.truth["lost"] += self.seconds_of.pop(step)
        self.lines = [line for line in self.lines if line["step"] <= self.saved]
        self.done, self.last_sign = self.saved, self.clock

    def step(self, seconds: float) -> None:
        with self.ledger.spends("productive"):
            self.spend("productive", seconds)
        self.done += 1
        self.seconds_of[self.done] = seconds
        if self.done % self._log_every == 0:
            self.lines.append({"step": self.done, "loss": 1.0, "seconds": seconds})
            self.last_sign = self.clock

    def spends(self, bucket: str, seconds: float) -> None:
        with self.ledger.spends(bucket):
            self.spend(bucket, seconds)

    def save(self, seconds: float) -> None:
        self.spends("save_stall", seconds)
        self.saved, self.saves, self.last_sign = self.done, self.saves + 1, self.clock
        goodput.update(self.attempts[-1], self.ledger, self.done, self.saves)

    def crash(self, seconds: float) -> None:
        """In the middle of a step."""
        with pytest.raises(RuntimeError), self.ledger.spends("productive"):
            self.spend("lost", seconds)
            raise RuntimeError
        self.end("crashed", 70)

    def end(self, state: str, exit_status: int) -> None:
        goodput.update(self.attempts[-1], self.ledger, self.done, self.saves)
        goodput.close(self.attempts[-1], state, exit_status)


def assert_adds_up(attempts: list[goodput.Attempt]) -> None:
    wall = (datetime.fromisoformat(attempts[-1]["end"]) - datetime.fromisoformat(attempts[0]["start"])).total_seconds()
    assert sum(goodput.totals(attempts).values()) == pytest.approx(wall, abs=1e-4)
    assert all(value >= -1e-9 for one in attempts for value in one["seconds"].values())
    for before, after in zip(attempts, attempts[1:], strict=False):
        assert datetime.fromisoformat(before["end"]) <= datetime.fromisoformat(after["start"])


def test_a_run_with_a_crash_and_a_kill_is_accounted_for():
    run = Simulation()
    run.start(30)
    run.spends("evaluation", 5)
    for _ in range(4):
        run.step(10)
    run.save(2)
    run.step(11)
    run.crash(3)
    run.spend("idle", 60)
    run.start(40)
    for _ in range(3):
        run.step(10)
    # Killed 4 seconds after its last line: nobody knows of these, they count as idle.
    run.spend("idle", 4 + 100)
    run.start(50)
    run.step(10)
    run.spend("other", 1)
    run.end("done", 0)
    expected = {"productive": 50, "evaluation": 5, "save_stall": 2, "lost": 14 + 30, "restart": 120, "idle": 164}
    assert goodput.totals(run.attempts) == pytest.approx(expected | {"other": 1})
    assert run.attempts[1]["state"] == "killed" and run.attempts[1]["end_is_estimated"]
    assert [(one["from_step"], one["last_step"], one["kept_step"]) for one in run.attempts] == [
        (0, 5, 4),
        (4, 7, 4),
        (4, 5, 5),
    ]
    assert_adds_up(run.attempts)
    assert goodput.share(run.attempts) == pytest.approx(50 / 386)
    best, save, between = goodput.best_interval(run.attempts)
    assert (save, between) == (2, pytest.approx((386 - 164) / 2)) and best == pytest.approx(math.sqrt(2 * 2 * 111))
    assert goodput.describe(run.attempts) == (
        "goodput 13.0 %: productive 50.0 s, evaluation 5.0 s, save stall 2.0 s, lost 44.0 s, restart 120 s, "
        "idle 164 s, other 1.0 s; attempts: 3; a save costs 2.0 s, a failure came every 111 s: best saved every "
        "21.1 s (Young)"
    )


def test_no_hint_without_failures():
    run = Simulation()
    run.start(1)
    run.step(9)
    run.save(1)
    run.end("preempted", 75)
    assert goodput.best_interval(run.attempts) is None
    assert "Young" not in goodput.describe(run.attempts)


def test_going_back_behind_the_newest_checkpoint_is_lost_time_too():
    """As where the newest one is damaged: steps of two attempts are taken again."""
    run = Simulation()
    for _ in range(2):
        run.start(1)
        run.step(10)
        run.step(20)
        run.save(0)
        run.end("preempted", 75)
    run.saved = 1
    run.start(1)
    run.end("preempted", 75)
    assert goodput.totals(run.attempts)["lost"] == pytest.approx(20 + 10 + 20)
    assert [one["kept_step"] for one in run.attempts] == [1, 2, 1]
    assert_adds_up(run.attempts)


def test_an_attempt_never_begins_before_the_other_ended():
    """Clocks of two hosts differ."""
    run = Simulation()
    run.start(1)
    run.step(10)
    run.save(0)
    run.end("preempted", 75)
    run.clock -= 5
    run.start(1)
    run.end("done", 0)
    assert run.attempts[1]["seconds"]["idle"] == 0
    assert_adds_up(run.attempts)


@pytest.mark.parametrize("log_every", [1, 3])
def test_seconds_add_up_whatever_happens(log_every):
    for seed in range(150):
        draw = random.Random(seed)
        run = Simulation(log_every)
        for _ in range(draw.randint(1, 8)):
            run.spend("idle", draw.choice([0, draw.uniform(0, 500)]) if run.attempts else 0)
            run.start(draw.uniform(1, 60))
            for _ in range(draw.randint(0, 20)):
                run.step(draw.uniform(0.1, 9))
                run.spend("other", draw.uniform(0, 0.1))
                if draw.random() < 0.2:
                    run.spends("evaluation", draw.uniform(1, 9))
                if draw.random() < 0.3:
                    run.save(draw.uniform(0, 5))
            how = draw.choice(["crash", "kill", "stop"])
            if how == "crash":
                run.crash(draw.uniform(0, 9))
            elif how == "stop":
                run.save(1)
                run.end("preempted", 75)
        run.start(1)
        run.end("done", 0)
        assert_adds_up(run.attempts)
        found = goodput.totals(run.attempts)
        if log_every == 1:
            # An evaluation between the last save and a kill is known only as time; of the rest nothing is guessed.
            assert found["productive"] == pytest.approx(run.truth["productive"], abs=1e-4), seed
            assert found["lost"] == pytest.approx(run.truth["lost"], abs=1e-4), seed
        assert found["restart"] == pytest.approx(run.truth["restart"], abs=1e-4)
        assert sum(found.values()) == pytest.approx(sum(run.truth.values()), abs=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"attempts": 1}',
        '{"attempts": [{}]}',
        '{"attempts": [{"number": 1, "start": "today", "end": null, "seconds": {}}]}',
        '{"attempts": [{"number": 1, "start": "2026-01-01T00:00:00+00:00", "end": null, "seconds": {"idle": 1}}]}',
    ],
)
def test_a_file_of_another_shape_costs_the_account_only(tmp_path, caplog, text):
    (tmp_path / RUN_FILE).write_text(text, encoding="utf-8")
    RunRecord(tmp_path).begin(2, 1.0, "killed", {})
    assert "the account of the run's time begins anew" in caplog.text
    assert [one["number"] for one in json.loads((tmp_path / RUN_FILE).read_text())["attempts"]] == [2]
    caplog.clear()
    RunRecord(tmp_path).begin(3, 1.0, "killed", {})
    assert [one["number"] for one in json.loads((tmp_path / RUN_FILE).read_text())["attempts"]] == [2, 3]
    assert not caplog.text
