"""Two short proofs: another layout computes the same gradient, and a killed run goes on with the same losses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from safetensors import safe_open

from nvembed_mcore.checkpoint.names import join_shards, name_table
from nvembed_mcore.config import PoolingConfig
from nvembed_mcore.log import read_metrics
from nvembed_mcore.model.mistral import read_mistral_config

STEPS, KILLED_AFTER = 8, 5


def same_gradient_in_another_layout(folder: Path, config: Path) -> str:
    """Gradients of one step at TP 2 x PP 2 on four processes against those of one process, parameter by parameter."""
    program = str(Path(__file__).with_name("one_step.py"))
    one, four = folder / "one-process", folder / "tp2-pp2"
    _run([sys.executable, program, str(config), str(one)])
    torchrun = ["torchrun", "--nproc-per-node", "4", program, str(config), str(four)]
    _run([*torchrun, "--tp", "2", "--pp", "2"])
    tree = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]
    table = name_table(read_mistral_config(tree["config"]), PoolingConfig(**tree["pooling"]))
    alone, split = _gradients(one), _gradients(four)
    worst, where = 0.0, ""
    for entry in table:
        expected = join_shards(entry, alone[entry.name])
        # Without a tensor-parallel dimension every rank of the stage holds the whole.
        shards = split[entry.name] if entry.layout != "replicated" else split[entry.name][:1]
        difference = (join_shards(entry, shards) - expected).abs().max() / expected.abs().max()
        if difference > worst:
            worst, where = difference.item(), entry.name
    return (
        f"One step at TP 2 x PP 2 on 4 processes against 1 process: the gradients of {len(table)} parameters differ "
        f"by at most {worst:.1e} of their largest value ({where})."
    )


def _gradients(folder: Path) -> dict[str, list[torch.Tensor]]:
    """Parameter name -> shards by tensor rank."""
    shards: dict[str, dict[int, torch.Tensor]] = {}
    for path in sorted(folder.glob("rank-*.safetensors")):
        with safe_open(path, "pt") as file:
            tp_rank = int(file.metadata()["tp"])
            for name in file.keys():  # noqa: SIM118
                shards.setdefault(name, {})[tp_rank] = file.get_tensor(name)
    return {name: [by_rank[rank] for rank in sorted(by_rank)] for name, by_rank in shards.items()}


def kill_and_resume(folder: Path, config: Path) -> str:
    """A run that is killed with SIGKILL and started again prints the losses of the run that nobody killed."""
    straight, killed = folder / "straight", folder / "killed"
    _run(_short_run(config, straight))
    process = subprocess.Popen(_short_run(config, killed), **_QUIET, start_new_session=True)  # noqa: S603
    while len(_losses(killed)) < KILLED_AFTER and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = len(_losses(killed))
    _run(_short_run(config, killed))
    expected, found = _losses(straight), _losses(killed)
    if expected != found:
        raise SystemExit(f"error: the resumed run differs from the straight one: {expected} against {found}")
    return (
        f"kill -9 after step {before} of {STEPS}, started again from its checkpoint: all {STEPS} losses equal those "
        f"of the run that nobody killed, to the last digit (the last is {found[-1]!r})."
    )


def _short_run(config: Path, run_dir: Path) -> list[str]:
    small = ["--batch_size", "16", "--steps", str(STEPS), "--checkpoint.every_steps", "2", "--eval.path", "null"]
    return [sys.executable, "-m", "nvembed_mcore", "train", str(config), "--run_dir", str(run_dir), *small]


def _losses(run_dir: Path) -> list[float]:
    path = run_dir / "metrics.jsonl"
    return [line["loss"] for line in read_metrics(path) if "loss" in line] if path.is_file() else []


_QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}


def _run(words: list[str]) -> None:
    done = subprocess.run(words, text=True, **_QUIET)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"error: {' '.join(words)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
