"""The job scripts of examples/slurm without a SLURM: what they decide, with programs of SLURM's names on the PATH.

tests/reliability/test_slurm.py runs them on a real one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "slurm"
TOOLS = [ROOT / "tools" / name for name in ("local_slurm.sh", "ci_setup.sh", "install_gpu.sh")]
SHELL = sorted([*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch"), *TOOLS])

# What `srun` does here: prints the run folder, or behaves as its rank's WORK says. Each call is noted.
SRUN = """\
#!/usr/bin/env bash
echo "srun $*" >>"$CALLS"
case "$*" in
    *--show*) echo "$RUN"; exit 0 ;;
    *" preflight "*) exit "${PREFLIGHT_STATUS:-0}" ;;
esac
eval "$WORK"
"""
# As the real one, `requeue` ends the script that asks for it.
SCONTROL = """\
#!/usr/bin/env bash
echo "scontrol $*" >>"$CALLS"
case "$1 $2" in
    "show hostnames") printf 'gpu-7\\ngpu-8\\n' ;;
    "show job") echo "   JobState=${JOB_STATE:-RUNNING} Reason=None" ;;
    requeue*) kill -TERM "$PPID" ;;
esac
"""
SCANCEL = """\
#!/usr/bin/env bash
echo "scancel $*" >>"$CALLS"
"""


def bash(script: str, **environment: str) -> str:
    """What a piece of shell prints that has sourced lib.sh."""
    prologue = f"set -euo pipefail; . {SCRIPTS}/lib.sh; "
    environment = {**os.environ, "SLURM_JOB_ID": "31234567", **environment}
    return subprocess.run(
        ["bash", "-c", prologue + script], env=environment, check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_the_shell_reads_it(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text(encoding="utf-8")
    assert "set -x" not in text and "set -vx" not in text
    if path.name not in ("env.sh", "lib.sh"):  # sourced by the others
        assert "\nset -euo pipefail\n" in text


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed (tools/ci_setup.sh)")
def test_shellcheck_finds_nothing():
    command = ["shellcheck", "--shell=bash", "--external-sources", *map(str, SHELL)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("n1", "n1"),
        ("gpu-[1,4-6],bigmem7", "gpu-1 gpu-4 gpu-5 gpu-6 bigmem7"),
        ("a[01-03,7],b1", "a01 a02 a03 a7 b1"),
        ("a[098-101]", "a098 a099 a100 a101"),
        ("rack[1-2]-n[1,3],x", "rack1-n1 rack1-n3 rack2-n1 rack2-n3 x"),
        ("n[1-2].gpu.cluster,login", "n1.gpu.cluster n2.gpu.cluster login"),
        ("[1-2]a", "1a 2a"),
    ],
)
def test_node_lists_without_scontrol(nodes, hosts):
    assert bash(f"hosts_of '{nodes}'").split() == hosts.split()


@pytest.mark.parametrize("nodes", ["gpu-[1-", "gpu-1]", ",a"])
def test_what_is_no_node_list(nodes):
    with pytest.raises(subprocess.CalledProcessError) as caught:
        bash(f"hosts_of '{nodes}'")
    assert caught.value.stderr == f"no node list: {nodes}\n"


def test_rendezvous_without_scontrol(tmp_path):
    """Such as inside a container: on the first host, at a port that follows from the job."""
    for name in ("bash", "date"):
        (tmp_path / name).symlink_to(shutil.which(name))
    show = "rendezvous; echo $MASTER_ADDR $MASTER_PORT $NVEMBED_HOSTS"
    assert bash(show, SLURM_JOB_NODELIST="gpu-[4-5]", PATH=str(tmp_path)) == "gpu-4 24567 gpu-4 gpu-5\n"


DECISIONS = [
    # status, signals, failures before, samples before and after, a STOP file -> what and why
    ((0, 0, 0, 0, 80), False, "done"),
    ((0, 1, 0, 0, 80), False, "done"),
    ((75, 1, 0, 0, 40), False, "requeue: preempted"),
    ((75, 0, 10, 40, 40), False, "requeue: preempted"),
    ((138, 1, 0, 0, 0), False, "requeue: preempted"),
    ((75, 1, 0, 0, 40), True, "end: "),
    ((70, 0, 0, 0, 40), True, "end: "),
    ((78, 0, 0, 0, 40), False, "end: the configuration or the data cannot work (78)"),
    ((78, 1, 0, 0, 40), False, "end: the configuration"),
    ((65, 0, 0, 0, 40), False, "end: the loss is not a number"),
    ((70, 0, 0, 0, 40), False, "requeue: failed with 70, but made progress (0 to 40 samples)"),
    ((74, 0, 2, 40, 80), False, "requeue: failed with 74"),
    ((76, 0, 0, 0, 40), False, "requeue: failed with 76"),
    ((137, 0, 0, 0, 40), False, "requeue: failed with 137"),
    ((137, 0, 0, 0, 0), False, "end: failed with 137 and made no progress (0 samples seen)"),
    ((74, 0, 1, 40, 40), False, "end: failed with 74 and made no progress (40 samples seen)"),
    ((137, 0, 2, 0, 40), False, "requeue: failed"),
    ((137, 0, 3, 0, 40), False, "end: failed with 137, after 3 failures (MAX_FAILURES)"),
]


def test_who_goes_on(tmp_path):
    calls = []
    for arguments, stopped, _ in DECISIONS:
        calls.append(f"{'touch' if stopped else 'rm -f'} $run_dir/STOP; decide {' '.join(map(str, arguments))}")
    said = bash(f"run_dir={tmp_path} MAX_FAILURES=3; " + "; ".join(calls)).splitlines()
    for (case, stopped, expected), line in zip(DECISIONS, said, strict=True):
        assert line.startswith(expected), (case, stopped, line)


class Job:
    """A job script with the programs above in the place of SLURM's."""

    def __init__(self, folder: Path, script: str = "train.sbatch", **environment: str) -> None:
        self.run, self.calls = folder / "run", folder / "calls"
        self.run.mkdir(exist_ok=True)
        programs = folder / "bin"
        programs.mkdir(exist_ok=True)
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL}.items():
            (programs / name).write_text(text, encoding="utf-8")
            (programs / name).chmod(0o755)
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu-[7-8]", "SLURM_SUBMIT_DIR": str(ROOT)}
        slurm |= {"SLURM_CPUS_PER_TASK": "4", "NVEMBED_VENV": str(folder), "TMPDIR": str(folder)}
        environment = {**os.environ, **slurm, "RUN": str(self.run), "CALLS": str(self.calls), **environment}
        environment["PATH"] = f"{programs}:{environment['PATH']}"
        command = ["bash", str(SCRIPTS / script), "config.yaml", "--steps", "8"]
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def ended(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=30)
        return self.process.returncode, output

    def called(self, name: str) -> list[str]:
        return [line for line in self.calls.read_text(encoding="utf-8").splitlines() if line.startswith(name)]

    def requeues(self) -> list[str]:
        return self.called("scontrol requeue")


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def work(status: int, samples: int | None = None, first: int | None = None, more: str = "") -> str:
    """What the ranks do: tell of their progress, note the first failure, end."""
    commands = [more]
    if samples is not None:
        told = json.dumps({"state": "running", "samples_seen": samples}, indent=1)
        commands.append(f"echo '{told}' >$RUN/status.json")
    if first is not None:
        commands.append(f"echo '{first} rank 3 on gpu-8' >$ATTEMPT_DIR/first-exit")
    return "\n".join([*commands, f"exit {status}"])


def test_a_job_that_is_done(tmp_path):
    job = Job(tmp_path, WORK=work(0, 80))
    status, output = job.ended()
    assert status == 0 and output.splitlines()[-1].endswith("job 7.0: done")
    assert not job.requeues()
    preflight, train = job.called("srun")[1:]
    assert preflight.endswith(
        "preflight-%t.out examples/slurm/rank.sh python -m nvembed_mcore preflight config.yaml --steps 8"
    )
    flags = "--kill-on-bad-exit=1 --wait=60 --export=ALL --cpus-per-task=4"
    ranks = "examples/slurm/rank.sh python -m nvembed_mcore train config.yaml --steps 8"
    assert train == f"srun {flags} --output={job.run}/logs/slurm-7.0/rank-%t.out {ranks}"


def test_a_signal_reaches_the_ranks_and_the_job_goes_on(tmp_path):
    """The shell's first `wait` ends with the signal, not with the run; a second signal while it saves does no harm."""
    saving = "touch $RUN/got; trap 'echo got >>$RUN/got' USR1; touch $RUN/ready; "
    saving += "while [ ! -e $RUN/saved ]; do sleep 0.05; done"
    job = Job(tmp_path, WORK=work(143, 40, first=75, more=saving))
    wait_for(lambda: (job.run / "ready").exists())
    for number, one in ((1, signal.SIGUSR1), (2, signal.SIGTERM)):
        job.process.send_signal(one)
        wait_for(lambda number=number: len((job.run / "got").read_text().split()) == number)
    (job.run / "saved").touch()
    status, output = job.ended()
    assert "requeue: preempted" in output and job.requeues() == ["scontrol requeue 7"]
    assert not list((job.run / "logs").glob("*failures"))


def test_a_rank_that_dies_is_named_and_the_job_goes_on_while_there_is_progress(tmp_path):
    dies = work(1, 40, first=137)
    for restart, requeued in ((0, 1), (1, 0)):
        job = Job(tmp_path, WORK=dies, SLURM_RESTART_COUNT=str(restart))
        status, output = job.ended()
        assert "first to fail: 137 rank 3 on gpu-8" in output
        assert len(job.requeues()) == requeued, output
        job.calls.unlink()
    assert status == 137 and "made no progress (40 samples seen)" in output
    assert len((job.run / "logs" / "slurm-7-failures").read_text().splitlines()) == 2


@pytest.mark.parametrize("first", [78, 65])
def test_what_would_fail_again_ends(tmp_path, first):
    job = Job(tmp_path, WORK=work(1, 40, first=first))
    assert job.ended()[0] == first and not job.requeues()


def test_a_failing_preflight_ends_the_job_before_it_begins(tmp_path):
    job = Job(tmp_path, PREFLIGHT_STATUS="76", WORK="exit 0")
    status, output = job.ended()
    assert status == 76 and not job.requeues() and len(job.called("srun")) == 2


def test_a_signal_between_the_look_and_the_start_reaches_the_ranks(tmp_path):
    """It comes while srun is being forked, when there is no child yet to hand it to."""
    ranks = "trap 'exit 75' USR1; touch $READY; for _ in {1..200}; do sleep 0.05; done"
    # `set_flags` is the last thing before srun; the signal comes there, and is handed on once srun is ready for it.
    script = (
        "CONTAINER=(); pass_on_signals; set_flags() { flags=(); kill -USR1 $$; }; "
        'srun() { eval "$RANKS"; }; until_ready() { until [ -e $READY ]; do sleep 0.05; done; }; '
        'kill() { if [ "$2" != $$ ]; then until_ready; fi; builtin kill "$@"; }; run_ranks; echo status $status'
    )
    said = bash(script, RANKS=ranks, READY=str(tmp_path / "ready"))
    assert said.splitlines()[-1] == "status 75", said


def test_a_controller_that_does_not_answer_at_once_is_asked_again(tmp_path):
    script = (
        "sleep() { :; }; scontrol() { if [ ! -e $ASKED ]; then touch $ASKED; return 1; fi; echo JobState=RUNNING; }; "
        "is_running 7 && echo runs"
    )
    assert bash(script, ASKED=str(tmp_path / "asked")) == "runs\n"


def test_a_cancelled_job_stays_away(tmp_path):
    job = Job(tmp_path, WORK=work(1, 40, first=75), JOB_STATE="COMPLETING")
    status, output = job.ended()
    assert status == 75 and not job.requeues() and "not requeued: the job was cancelled" in output


def test_a_task_of_an_array(tmp_path):
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
    stopped = Job(tmp_path, "array.sbatch", WORK=work(1, 40, first=75), **array)
    assert stopped.ended()[0] == 75 and not stopped.requeues() and not stopped.called("scancel")
    stopped.calls.unlink()
    hopeless = Job(tmp_path, "array.sbatch", WORK=work(1, 40, first=78), **array)
    assert hopeless.ended()[0] == 78 and hopeless.called("scancel") == ["scancel 5"]
    (hopeless.run / "status.json").write_text('{\n "state": "done",\n "samples_seen": 80\n}\n', encoding="utf-8")
    hopeless.calls.unlink()
    left = Job(tmp_path, "array.sbatch", WORK="exit 70", **array)
    status, output = left.ended()
    assert status == 0 and "nothing left for this task" in output and len(left.called("srun")) == 1
    # One that requeues itself names its task.
    requeue = (
        'say() { :; }; scontrol() { echo "$* JobState=RUNNING" >&2; echo JobState=RUNNING; }; sleep() { :; }; requeue'
    )
    command = f". {SCRIPTS}/lib.sh; {requeue}"
    found = subprocess.run(
        ["bash", "-c", command], env={**os.environ, **array, "SLURM_JOB_ID": "9"}, capture_output=True, text=True
    )
    assert "requeue 5_2" in found.stderr


def test_a_rank_notes_how_it_ended_if_it_is_the_first(tmp_path):
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
    environment = {**os.environ, **slurm, "SLURMD_NODENAME": "gpu-8", "ATTEMPT_DIR": str(tmp_path)}
    show = "echo $RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE; "
    for status in (78, 137, 0):
        command = ["bash", str(SCRIPTS / "rank.sh"), "bash", "-c", f"{show} exit {status}"]
        found = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert (found.returncode, found.stdout) == (status, "3 4 1 2\n"), found.stderr
    assert (tmp_path / "first-exit").read_text() == "78 rank 3 on gpu-8\n"


def test_a_container_is_given_to_every_step(tmp_path):
    job = Job(tmp_path, "container.sbatch", WORK="exit 0", IMAGE="i.sqsh", DATA="/data:/data", SECRETS="/s")
    assert job.ended()[0] == 0
    for call in job.called("srun"):
        assert "--container-image=i.sqsh" in call and "--no-container-mount-home" in call
        assert f"--container-mounts={ROOT}:{ROOT},/data:/data,/s:/run/secrets:ro" in call
