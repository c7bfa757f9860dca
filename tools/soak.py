"""Strike tiny runs at seeded moments until enough of them were killed, and compare how they end; see tools/soak.sh.

Every round is a run of one case. It is killed at each point of a save and of a step, and between that, at random
moments, killed, asked to stop, frozen or paused; after each it is started again, until it is done. Its weights, its
optimizer state and its losses must be those of the case's run that nobody struck, no start may lose more than it is
allowed to, and nothing half-written may remain.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from nvembed_mcore.checkpoint import folders
from nvembed_mcore.config import CheckpointConfig, EvalConfig, LoraConfig, LossConfig, ParallelConfig, RunConfig
from tests.helpers import kills, runs
from tests.helpers.kills import Attempt, Blow
from tests.helpers.supervisor import Ranks

STEPS, EVERY, KEEP = 15, 3, 2
TIMED = ("SIGKILL", "SIGTERM", "SIGUSR1", "STOP file")
FREEZE_EVERY_ROUNDS = 3
"""A rank that is frozen for good costs the whole timeout of the watchdog."""
TIMEOUT_SECONDS = 12


@dataclasses.dataclass(frozen=True)
class Case:
    """A layout and a way of saving; `adapters`: with dropout, and a learned temperature."""

    ranks: int
    tp: int = 1
    pp: int = 1
    async_save: bool = False
    adapters: bool = False

    def __str__(self) -> str:
        parts = [f"{self.ranks} rank{'s' * (self.ranks > 1)}"]
        parts += [f"TP {self.tp}"] * (self.tp > 1) + [f"PP {self.pp}"] * (self.pp > 1)
        return ", ".join([*parts, "async" if self.async_save else "sync", *["adapters"] * self.adapters])

    @property
    def allowed_loss(self) -> int:
        """Steps that a start may take again: those since a save, or since the one before while that is written."""
        return EVERY * (2 if self.async_save else 1)

    def config(self, inputs: Path, run_dir: Path) -> RunConfig:
        config = runs.run_config(
            inputs,
            run_dir,
            steps=STEPS,
            parallel=ParallelConfig(tp=self.tp, pp=self.pp, timeout_minutes=TIMEOUT_SECONDS / 60),
            checkpoint=CheckpointConfig(every_steps=EVERY, keep=KEEP, async_save=self.async_save),
            loss=LossConfig(temperature=0.1, learn_temperature=self.adapters),
            eval=EvalConfig(),
        )
        lora = LoraConfig(rank=2, alpha=8, dropout=0.2) if self.adapters else LoraConfig()
        return dataclasses.replace(config, model=dataclasses.replace(config.model, lora=lora))


CASES = [
    Case(2, adapters=True),
    Case(2, async_save=True),
    Case(1),
    Case(2, tp=2, async_save=True, adapters=True),
    Case(2, pp=2),
    Case(4, tp=2, async_save=True),
    Case(4, pp=2, adapters=True),
    Case(1, async_save=True, adapters=True),
]


def blows_of(draw: random.Random, case: Case, has_freeze: bool) -> Iterator[Blow]:
    """The schedule of SIGKILLs, some after a pause, and before every second of them something at a random moment."""
    freeze_at = draw.randint(1, 9) if has_freeze and case.ranks > 1 else None
    for number, blow in enumerate(kills.schedule(draw, case.ranks, STEPS, EVERY, KEEP)):
        moment = dict(rank=draw.randrange(case.ranks), seconds=draw.uniform(0.2, 1.0))
        if number == freeze_at:
            yield Blow("SIGSTOP", **moment)
        elif draw.random() < 0.5:
            yield Blow(draw.choice(TIMED), **moment)
        pause = blow.point != "" and draw.random() < 0.3
        yield dataclasses.replace(blow, pause=True, seconds=draw.uniform(0.2, 1.0)) if pause else blow


class Soak:
    """Rounds of cases, and what became of them.

    Attributes:
        counts: blows by what they were, attempts, rounds, steps taken again.
        faults: what should not have happened.
        hashes: by case, those that its runs ended with.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.inputs = runs.write_inputs(folder / "inputs", with_words=True)
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.hashes: dict[str, set[str]] = {}
        self._unharmed: dict[Case, Path] = {}

    def unharmed(self, case: Case) -> Path:
        """The case's run that nobody strikes."""
        if case not in self._unharmed:
            run_dir = self.folder / f"unharmed-{len(self._unharmed)}"
            config = runs.write_config(case.config(self.inputs, run_dir))
            with Ranks([str(config)], case.ranks, self.folder / "output") as ranks:
                codes = ranks.wait(120)
                assert not any(codes), f"the run that nobody struck ended with {codes}\n{ranks.outputs()}"
            self._unharmed[case] = run_dir
        return self._unharmed[case]

    def round(self, case: Case, draw: random.Random) -> Iterator[Attempt]:
        """One run of a case to its end."""
        expected, number = self.unharmed(case), self.counts["rounds"]
        run_dir = self.folder / f"run-{number}"
        config = runs.write_config(case.config(self.inputs, run_dir))
        has_freeze = number % FREEZE_EVERY_ROUNDS == FREEZE_EVERY_ROUNDS - 1
        before = None
        try:
            for attempt in kills.supervise([[str(config)]], run_dir, case.ranks, blows_of(draw, case, has_freeze)):
                self._account(case, attempt, before)
                before = attempt
                yield attempt
            self._compare(case, run_dir, expected)
        except AssertionError as error:
            self.faults.append(f"{case}: {error}")
        self.counts["rounds"] += 1
        for path in self.folder.glob(f"{run_dir.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _account(self, case: Case, attempt: Attempt, before: Attempt | None) -> None:
        self.counts["attempts"] += 1
        if attempt.blow and any(attempt.codes):
            self.counts[attempt.blow.what] += 1
            self.counts["pauses"] += attempt.blow.pause
        if before:
            lost = before.reached - attempt.began
            self.counts["lost"] += max(lost, 0)
            if lost > case.allowed_loss:
                self.faults.append(f"{case}: {lost} steps lost by {before.blow}")
            if len(attempt.checkpoints) < min(KEEP, len(before.checkpoints)):
                self.faults.append(
                    f"{case}: of {before.checkpoints} {attempt.checkpoints} is left after {attempt.blow}"
                )

    def _compare(self, case: Case, run_dir: Path, expected: Path) -> None:
        has = kills.digest(run_dir)
        self.hashes.setdefault(str(case), {kills.digest(expected)}).add(has)
        if len(self.hashes[str(case)]) > 1:
            self.faults.append(f"{case}: ended with {has}, not {kills.digest(expected)}")
        if kills.curve(run_dir) != kills.curve(expected):
            self.faults.append(f"{case}: the losses differ")
        # Beside the last step's there is that of the last save before, which may be one that a signal asked for.
        files = kills.files(run_dir)
        older = files - {folders.POINTER, f"step-{STEPS:08d}"}
        if len(files) != 1 + KEEP or len(older) != KEEP - 1 or not min(older).startswith("step-"):
            self.faults.append(f"{case}: checkpoints/ has {sorted(files)}")


def main() -> int:
    options = parse()
    begin = time.monotonic()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="nvembed-soak-") as folder:
        soak = Soak(Path(folder))
        first = options.seed % len(CASES)
        for case in itertools.cycle(CASES[first:] + CASES[:first]):
            if soak.counts["SIGKILL"] >= options.kills or soak.faults:
                break
            for attempt in soak.round(case, draw):
                codes = " ".join(map(str, attempt.codes))
                print(
                    f"{soak.counts['SIGKILL']:4d}  {case}: steps {attempt.began} to {attempt.reached} in "
                    f"{attempt.seconds:.1f} s, {attempt.blow or 'left alone'}, exit codes {codes}",
                    flush=True,
                )
    seconds = time.monotonic() - begin
    return report(soak, seconds, options)


def report(soak: Soak, seconds: float, options: argparse.Namespace) -> int:
    """Print and write what came of it; returns the exit status."""
    counts = soak.counts
    print()
    for case, hashes in soak.hashes.items():
        print(f"{case}: {' '.join(sorted(hashes))}")
    others = ", ".join(f"{counts[what]} {what}" for what in (*TIMED[1:], "SIGSTOP", "pauses"))
    print(
        f"{counts['SIGKILL']} kills ({others}) in {counts['rounds']} runs and {counts['attempts']} starts; "
        f"{counts['lost']} steps taken again; {seconds:.0f} s"
    )
    for fault in soak.faults:
        print(f"FAULT: {fault}", file=sys.stderr)
    if options.json:
        figures = {what.replace(" ", "_"): counts[what] for what in (*TIMED, "SIGSTOP", "pauses")}
        figures |= {name: counts[name] for name in ("rounds", "attempts", "lost")}
        figures |= {"seconds": round(seconds, 1), "seed": options.seed, "faults": len(soak.faults)}
        figures |= {f"hash {case}": " ".join(sorted(hashes)) for case, hashes in soak.hashes.items()}
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 1 if soak.faults else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "Figures: `SIGKILL` and so on: blows that ended an attempt; `pauses`: before them; `rounds`: runs to "
            "their end; `attempts`: starts; `lost`: steps taken again; `hash CASE`: SHA-256 of the final weights and "
            "optimizer state. Exits with 1 on any difference."
        ),
    )
    parser.add_argument("--kills", type=int, default=100, help="stop after the run in which so many are reached")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule; also which layout is first")
    parser.add_argument("--json", help="file for the figures")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
