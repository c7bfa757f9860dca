"""A real SLURM with two nodes on this machine (tools/local_slurm.sh), and jobs in it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.2
# `env.sh` puts it in front of the PATH. A requeued job keeps its variables, so those of one attempt have its number.
PYTHON = """\
#!/usr/bin/env bash
faults=FAULTS_${{SLURM_RESTART_COUNT:-0}}
if [ -n "${{!faults:-}}" ]; then export NVEMBED_FAULT=${{!faults}}; fi
exec {python} "$@"
"""


class Unavailable(Exception):
    """SLURM cannot be started here; says why."""


class LocalSlurm:
    """Two nodes, n1 and n2, until `down`.

    Attributes:
        folder: for its files and for what jobs print.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons = folder / "daemons"
        found = self._tool("up")
        if found.returncode:
            raise Unavailable(found.stderr.strip().splitlines()[-1])
        (folder / "venv" / "bin").mkdir(parents=True)
        python = folder / "venv" / "bin" / "python"
        python.write_text(PYTHON.format(python=sys.executable), encoding="utf-8")
        python.chmod(0o755)
        self._environment = {
            **os.environ,
            "SLURM_CONF": str(self._daemons / "slurm.conf"),
            "NVEMBED_VENV": str(folder / "venv"),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        # Jobs start many a Python; not each is to compile the package.
        self._environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def _tool(self, command: str) -> subprocess.CompletedProcess:
        # Into files, because daemons keep open what they inherit.
        words = ["bash", str(ROOT / "tools" / "local_slurm.sh"), command, str(self._daemons)]
        with open(self.folder / "out.txt", "w") as out, open(self.folder / "err.txt", "w") as err:
            status = subprocess.run(words, stdout=out, stderr=err).returncode
        return subprocess.CompletedProcess(words, status, stderr=(self.folder / "err.txt").read_text())

    def down(self) -> None:
        self._tool("down")

    def command(self, *words: str, **environment: str) -> str:
        """What one of SLURM's programs (or a script that calls them) prints."""
        found = subprocess.run(
            words, cwd=ROOT, env=self._environment | environment, capture_output=True, text=True, timeout=60
        )
        assert found.returncode == 0, (words, found.returncode, found.stdout, found.stderr)
        return found.stdout.strip()

    def submit(self, script: str, *arguments: str, options: list[str], **environment: str) -> str:
        """A job of one of examples/slurm's scripts, one rank a node; returns its number."""
        tiny = ["--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
        output = (
            f"--output={self.folder}/%A_%a.out" if script.startswith("array") else f"--output={self.folder}/%j.out"
        )
        words = ["sbatch", "--parsable", *tiny, output, *options, f"examples/slurm/{script}", *arguments]
        return self.command(*words, **environment)

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, ExitCode, Restarts, ..."""
        words = self.command("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self, job: str, seconds: float = 120.0) -> dict[str, str]:
        """Wait until a job is neither running nor waiting any more; its facts."""
        self.until(
            lambda: self.facts(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"),
            seconds,
            lambda: f"job {job} did not end: {self.facts(job)}\n{self.output(job)}",
        )
        return self.facts(job)

    def output(self, job: str) -> str:
        """What the job's script printed, over all its attempts."""
        file = self.folder / f"{job}.out"
        return file.read_text(encoding="utf-8") if file.exists() else ""

    @staticmethod
    def until(condition: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, what()
            time.sleep(POLL_SECONDS)
