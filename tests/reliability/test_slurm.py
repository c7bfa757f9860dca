"""The job scripts of examples/slurm on a real SLURM with two nodes, one rank on each (tools/local_slurm.sh).

Jobs are submitted together and run beside each other; each test then looks at its own. tests/reliability/
test_slurm_scripts.py has the cases that need no SLURM.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from nvembed_mcore.config import CheckpointConfig, EvalConfig, ModelConfig, RunConfig
from nvembed_mcore.log import read_metrics
from nvembed_mcore.status import read_status
from nvembed_mcore.train import train
from tests.helpers.runs import run_config, write_config, write_inputs
from tests.helpers.slurm import LocalSlurm, Unavailable

TWO_NODES, ONE_NODE = ["--nodes=2"], ["--nodes=1"]
STEPS = 12


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[LocalSlurm]:
    try:
        local = LocalSlurm(tmp_path_factory.mktemp("slurm"))
    except Unavailable as reason:
        pytest.skip(str(reason))
    yield local
    local.down()


@pytest.fixture(scope="module")
def inputs(slurm) -> Path:
    return write_inputs(slurm.folder / "inputs", with_words=True)


def config_of(inputs: Path, run_dir: Path, **changes) -> RunConfig:
    """Twelve steps, a checkpoint after every third."""
    changes = {"eval": EvalConfig(), "checkpoint": CheckpointConfig(every_steps=3), "steps": STEPS, **changes}
    return run_config(inputs, run_dir, **changes)


def losses(run_dir: Path) -> list[tuple[float, float]]:
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [(line["loss"], line["grad_norm"]) for line in lines]


@dataclasses.dataclass(frozen=True)
class Jobs:
    """Numbers of the jobs that are under way, and their run folders."""

    disturbed: str
    misconfigured: str
    chain: dict[str, str]
    folder: Path

    def run(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def jobs(slurm, inputs, world) -> Jobs:
    """All jobs, submitted; and the run that nobody disturbs, here in this session's processes."""
    folder = slurm.folder
    # Builds the token store that all runs use, too.
    world(2).run(train, config_of(inputs, folder / "golden"))
    configs = {name: str(write_config(config_of(inputs, folder / name))) for name in ("disturbed", "wrong")}
    disturbed = slurm.submit(
        "train.sbatch",
        configs["disturbed"],
        options=TWO_NODES,
        PREFLIGHT="0",
        FAULTS_0="kill@step_begin:1:5",
        FAULTS_1="sleep=3@step_begin:0:8",
        FAULTS_2="sleep=3@step_begin:0:11",
    )
    misconfigured = slurm.submit("train.sbatch", configs["wrong"], "--eval.path", "nowhere", options=TWO_NODES)
    return Jobs(disturbed, misconfigured, submit_chain(slurm, inputs, folder / "chain"), folder)


def submit_chain(slurm: LocalSlurm, inputs: Path, output: Path) -> dict[str, str]:
    """Numbers of the chain's jobs by what they do."""
    output.mkdir()
    first = config_of(inputs, output / "stage1", steps=3)
    dataset = dataclasses.replace(
        first.data.datasets[0], path=str(output / "mined" / "records.jsonl"), in_batch_negatives=False
    )
    second = dataclasses.replace(
        first,
        run_dir=str(output / "stage2"),
        stage=2,
        data=dataclasses.replace(first.data, datasets=[dataset]),
        model=ModelConfig(init_from=str(output / "stage1"), pooling=first.model.pooling),
    )
    stages = [str(write_config(config)) for config in (first, second)]
    options = [*ONE_NODE, "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    arguments = [*stages, str(inputs / "train.jsonl"), str(output), str(inputs / "beir"), *options]
    printed = slurm.command("bash", "examples/slurm/chain.sh", *arguments, PREFLIGHT="0", NEGATIVES="2")
    lines = [line.split(" ", 1) for line in printed.splitlines()]
    assert lines[-1] == ["name", "nvembed-chain"]
    return {what: number for number, what in lines[:-1]}


def reached(slurm: LocalSlurm, jobs: Jobs, attempt: int, step: int) -> None:
    """Wait until the disturbed run's attempt has saved a step."""

    def has() -> bool:
        found = read_status(jobs.run("disturbed"))
        return found is not None and found.attempt == attempt and found.checkpoint_step == step

    slurm.until(has, 90, lambda: f"{read_status(jobs.run('disturbed'))}\n{slurm.output(jobs.disturbed)}")


def test_two_nodes_go_on_by_bits_after_a_kill_a_warning_and_a_requeue(slurm, jobs):
    """First a rank dies; then SLURM warns the job's shell, as `--signal` does; then an operator requeues the job."""
    reached(slurm, jobs, 2, 6)
    slurm.command("scancel", "--signal=USR1", "--batch", jobs.disturbed)
    reached(slurm, jobs, 3, 9)
    slurm.command("scontrol", "requeue", jobs.disturbed)
    facts = slurm.ended(jobs.disturbed)
    output = slurm.output(jobs.disturbed)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "3"), output
    assert facts["NodeList"] == "n[1-2]"
    # How far rank 0 tells that it came depends on whether srun leaves it the time to.
    assert re.search(r"requeue: failed with 137, but made progress \(0 to (27|36) samples\)", output), output
    assert "first to fail: 137 rank 1 on n2; output in " in output
    assert "got USR1: asking the run to save and stop" in output and "requeue: preempted" in output
    assert output.rstrip().endswith(f"job {jobs.disturbed}.3: done")
    logs = jobs.run("disturbed") / "logs"
    assert len((logs / f"slurm-{jobs.disturbed}-failures").read_text().splitlines()) == 1
    for attempt in range(4):
        names = {file.name for file in (logs / f"slurm-{jobs.disturbed}.{attempt}").iterdir()}
        assert {"rank-0.out", "rank-1.out"} <= names
    assert read_status(jobs.run("disturbed")).state == "done"
    assert losses(jobs.run("disturbed")) == losses(jobs.run("golden"))


def test_a_configuration_that_cannot_work_is_not_tried_again(slurm, jobs):
    facts = slurm.ended(jobs.misconfigured)
    output = slurm.output(jobs.misconfigured)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "78:0", "0"), output
    for node, rank in (("n1", 0), ("n2", 1)):
        assert f"configuration: rank {rank} on {node}: eval.path: there is no nowhere" in output


@pytest.mark.slow
def test_a_run_that_makes_no_progress_is_not_tried_for_ever(slurm, inputs, jobs):
    """It dies before every fourth step: its first attempt saves three steps, the second none."""
    config = str(write_config(config_of(inputs, jobs.run("hopeless"))))
    fault = dict(PREFLIGHT="0", NVEMBED_FAULT="kill@step_begin:0:4")
    job = slurm.submit("train.sbatch", config, options=ONE_NODE, **fault)
    facts, output = slurm.ended(job), slurm.output(job)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "137:0", "1"), output
    assert "requeue: failed with 137, but made progress (0 to 27 samples)" in output
    assert "end: failed with 137 and made no progress (27 samples seen)" in output


def test_a_scaling_study_is_an_array_with_its_report_behind(slurm, inputs, jobs):
    """Two points in one array, one of which cannot work; the report waits for both, and names it."""
    output = jobs.run("study")
    base = write_config(config_of(inputs, jobs.run("study-base")))
    good = {"name": "good", "batch": 4, "gpus": 1}
    tree = {"base": str(base), "output": str(output), "gpus_per_node": 1, "warmup_steps": 1, "steps": 2, "repeats": 1}
    tree["series"] = [good, good | {"name": "bad", "set": {"data.tokenizer": "nowhere"}}]
    file = jobs.folder / "study.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    command = [sys.executable, "tools/scaling/study.py", "submit", str(file), "--gpus-per-node=0", "--cpus-per-task=1"]
    array, report = [line.split()[0] for line in slurm.command(*command, PREFLIGHT="0").splitlines()]
    ended = [slurm.ended(f"{array}_{task}") for task in (1, 2)]
    assert [facts["ExitCode"] for facts in ended] == ["0:0", "78:0"]
    facts = slurm.ended(report)
    assert facts["JobState"] == "COMPLETED" and facts["StartTime"] >= ended[0]["EndTime"]
    with open(output / "table.csv", newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    assert [(row["row"], row["series"], row["steps"]) for row in rows] == [
        ("point", "good", "2"),
        ("run", "good", "2"),
    ]
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "Runs that failed" in page and "bad-gpus1-tp1pp1-q4-" in page and "nowhere" in page


def test_tasks_of_an_array_that_are_left_end_at_once(slurm, jobs):
    slurm.ended(jobs.disturbed)
    config = str(jobs.folder / "disturbed.yaml")
    array = slurm.submit("array.sbatch", config, options=[*TWO_NODES, "--array=1-2%1"])
    for task in (1, 2):
        assert slurm.ended(f"{array}_{task}")["JobState"] == "COMPLETED"
        assert "done before; nothing left for this task" in slurm.output(f"{array}_{task}")


def test_the_chain_runs_to_its_evaluation(slurm, jobs):
    output = jobs.run("chain")
    what = {file.name: file.read_text(encoding="utf-8") for file in output.glob("slurm-*.out")}
    for name, number in jobs.chain.items():
        assert slurm.ended(number)["JobState"] == "COMPLETED", (name, what)
    starts = [slurm.facts(number) for number in jobs.chain.values()]
    for before, after in zip(starts, starts[1:], strict=False):
        assert before["EndTime"] <= after["StartTime"]
    assert (output / "mined" / "records.jsonl").is_file()
    tree = yaml.safe_load((output / "stage2" / "config.yaml").read_text(encoding="utf-8"))
    assert tree["model"]["init_from"] == str(output / "stage1")
    scores = json.loads((output / "scores.json").read_text(encoding="utf-8"))
    assert 0 < scores["ndcg_at_10"] <= 1


@pytest.mark.slow
def test_torchrun_saves_and_goes_on_by_bits(slurm, inputs, jobs):
    """Its workers' status is kept although torchrun ends with 1; a second signal comes while they save."""
    run = jobs.run("torchrun")
    config = str(write_config(config_of(inputs, run)))
    job = slurm.submit(
        "train_torchrun.sbatch", config, options=TWO_NODES, RANKS_PER_NODE="1", FAULTS_0="sleep=4@step_begin:0:5"
    )
    slurm.until(lambda: saved(run) == 3, 90, lambda: slurm.output(job))
    for _ in range(2):
        slurm.command("scancel", "--signal=USR1", "--batch", job)
    facts = slurm.ended(job)
    output = slurm.output(job)
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), output
    assert "requeue: preempted" in output
    first = run / "logs" / f"slurm-{job}.0" / "first-exit"
    assert first.read_text().startswith("75 rank ")
    assert losses(run) == losses(jobs.run("golden"))


@pytest.mark.slow
def test_tasks_of_an_array_go_on_one_after_the_other(slurm, inputs, jobs):
    run = jobs.run("array")
    config = str(write_config(config_of(inputs, run)))
    options = [*TWO_NODES, "--array=1-3%1"]
    array = slurm.submit(
        "array.sbatch", config, options=options, PREFLIGHT="0", NVEMBED_FAULT="sleep=4@step_begin:0:5"
    )
    slurm.until(lambda: saved(run) == 3, 90, lambda: slurm.output(f"{array}_1"))
    # scancel sends it to a task of an array again and again, and complains when that has ended.
    slurm.command("bash", "-c", f"scancel --signal=USR1 --batch {array}_1 || true")
    states = [slurm.ended(f"{array}_{task}")["ExitCode"] for task in (1, 2, 3)]
    assert states == ["75:0", "0:0", "0:0"]
    assert "nothing left for this task" in slurm.output(f"{array}_3")
    assert losses(run) == losses(jobs.run("golden"))


@pytest.mark.slow
def test_a_job_near_its_time_limit_saves_and_a_cancelled_one_stays_away(slurm, inputs, jobs):
    """SLURM sends the signal up to a minute early, here at once. The requeued job is then ended by its owner."""
    run = jobs.run("limited")
    config = str(write_config(config_of(inputs, run, steps=2000)))
    options = [*TWO_NODES, "--time=2", "--signal=B:USR1@60"]
    job = slurm.submit("train.sbatch", config, options=options, PREFLIGHT="0")
    slurm.until(lambda: slurm.facts(job)["Restarts"] == "1", 150, lambda: slurm.output(job))
    assert "requeue: preempted" in slurm.output(job) and read_status(run).checkpoint_step > 0
    slurm.until(lambda: read_status(run).attempt == 2, 90, lambda: slurm.output(job))
    slurm.command("scancel", job)
    facts = slurm.ended(job)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "1"), slurm.output(job)


def saved(run: Path) -> int | None:
    found = read_status(run)
    return found.checkpoint_step if found else None
