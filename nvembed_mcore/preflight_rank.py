"""What one rank of a job finds out alone before it: its configuration, paths, disk, code and GPUs (preflight.py)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nvembed_mcore
from nvembed_mcore import device
from nvembed_mcore.config import RunConfig
from nvembed_mcore.exits import Exit

FEWEST_FREE_FILES = 10_000
"""Inodes: a checkpoint is some files a rank, and logs, TensorBoard and the token store are more."""
_BYTES_PER_PARAMETER = 12  # float32 weights and Adam's two moments


@dataclasses.dataclass(frozen=True)
class Rank:
    """What a rank knows of itself, as JSON values.

    Attributes:
        config: the resolved configuration, flat (`optim.lr`: 2e-5); empty where it cannot be read.
        code: versions, and a hash over the package's Python files.
        probe: name and content of the file that it left in `run_dir`; empty where it wrote none.
        findings: (status, what, text) of what is wrong here.
    """

    rank: int
    host: str
    config: dict[str, Any]
    code: dict[str, str]
    probe: list[str]
    findings: list[tuple[int, str, str]]


def look_around(read: Callable[[], RunConfig], rank: int) -> Rank:
    """Everything that needs no other rank. One rank of a node looks at its disk and its GPUs."""
    findings: list[tuple[int, str, str]] = []
    config, probe = None, []
    try:
        config = read()
    except (ValueError, OSError) as error:
        findings.append((Exit.CONFIGURATION, "configuration", str(error)))
    if config is not None:
        findings += [(Exit.CONFIGURATION, "configuration", text) for text in missing_paths(config)]
    if os.environ.get("LOCAL_RANK", "0") == "0":
        findings += _gpu_findings()
        if config is not None:
            try:
                probe = _write_probe(Path(config.run_dir), rank)
                findings += _free_space(config) if config.checkpoint.every_steps else []
            except OSError as error:
                findings.append((Exit.STORAGE, "storage", f"cannot write in {config.run_dir}: {error}"))
    flat = {} if config is None else json.loads(json.dumps(_flat(dataclasses.asdict(config))))
    return Rank(rank, _host(), flat, _code(), probe, findings)


def _host() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def missing_paths(config: RunConfig) -> list[str]:
    """Paths that the configuration names and that are not there."""
    named = {
        "data.tokenizer": config.data.tokenizer,
        "model.config": config.model.config,
        "model.init_from": config.model.init_from,
        "model.lora.init_from": config.model.lora.init_from,
        "eval.path": config.eval.path,
    }
    named |= {f"data.datasets.{i}.path": one.path for i, one in enumerate(config.data.datasets)}
    named |= {f"eval.sets.{i}.path": one.path for i, one in enumerate(config.eval.sets)}
    return [
        f"{field}: there is no {path}"
        for field, path in named.items()
        if path and not str(path).startswith("hf:") and not Path(path).exists()
    ]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": [1]}}` as `{"a.b.0": 1}`."""
    if not isinstance(tree, (dict, list, tuple)):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _code() -> dict[str, str]:
    """Versions of what computes. Uncommitted changes count: the package's files are hashed, not only named."""
    folder = Path(nvembed_mcore.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    versions = {name: version(name) for name in ("torch", "megatron-core", "transformers")}
    return {"nvembed_mcore": nvembed_mcore.__version__, "commit": _commit(folder), **versions} | {
        "the package's files (SHA-256)": digest.hexdigest()[:16]
    }


def _commit(folder: Path) -> str:
    """The git commit of a checkout, `none` where it is none or git is missing."""
    git = shutil.which("git")
    if git is None:
        return "none"
    command = [git, "-c", "safe.directory=*", "-C", str(folder), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=30)  # noqa: S603
    return found.stdout.strip() or "none"


def _write_probe(run_dir: Path, rank: int) -> list[str]:
    """Write, sync, rename and read a small file back, as a checkpoint is written; returns its name and content.

    Raises:
        OSError: one of these failed.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    content = secrets.token_hex(16)
    probe = run_dir / f".preflight-{rank}-{content[:8]}"
    aside = probe.with_name(probe.name + ".tmp")
    try:
        with open(aside, "w", encoding="ascii") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(aside, probe)
    finally:
        aside.unlink(missing_ok=True)
    if (found := probe.read_text(encoding="ascii")) != content:
        raise OSError(f"{probe} holds {found!r} instead of the {content!r} that was written")
    return [str(probe), content]


def remove_probe(here: Rank) -> None:
    if here.probe:
        Path(here.probe[0]).unlink(missing_ok=True)


def _free_space(config: RunConfig) -> list[tuple[int, str, str]]:
    """Room for two checkpoints: a new one is complete before an old one goes."""
    free = os.statvfs(config.run_dir)
    free_bytes, findings = free.f_bavail * free.f_frsize, []
    needed = 2 * _checkpoint_bytes(config)
    if free_bytes < needed:
        text = f"{config.run_dir} has {free_bytes:,} bytes free, two checkpoints need about {needed:,}"
        findings.append((Exit.STORAGE, "storage", text))
    # Some file systems count no files and say 0 of 0.
    if free.f_files and free.f_favail < FEWEST_FREE_FILES:
        text = f"{config.run_dir} has {free.f_favail:,} files (inodes) free, a run needs {FEWEST_FREE_FILES:,}"
        findings.append((Exit.STORAGE, "storage", text))
    return findings


def _checkpoint_bytes(config: RunConfig) -> int:
    """Size of a checkpoint: of the largest there is, of this run or of the one it starts from, or from the
    architecture (the backbone alone, so a little too low); 0 where nobody knows, or where only adapters train."""
    for run in (config.run_dir, config.model.init_from):
        folders = [*Path(run).glob("checkpoints/step-*")] if run else []
        sizes = [sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in folders]
        if sizes:
            return max(sizes)
    path = Path(config.model.config or config.model.init_from)
    path = path / "config.json" if path.is_dir() else path
    if config.model.adapters or not path.is_file():
        return 0
    try:
        return _BYTES_PER_PARAMETER * _parameters(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError):
        return 0  # the trainer says what is wrong with it


def _parameters(mistral: dict[str, Any]) -> int:
    """Weights of a Mistral backbone, without the head for pooling."""
    hidden, heads = mistral["hidden_size"], mistral["num_attention_heads"]
    width = mistral.get("head_dim") or hidden // heads
    attention = 2 * hidden * width * (heads + mistral.get("num_key_value_heads", heads))
    layer = attention + 3 * hidden * mistral["intermediate_size"] + 2 * hidden
    return mistral["vocab_size"] * hidden + mistral["num_hidden_layers"] * layer + hidden


def _gpu_findings() -> list[tuple[int, str, str]]:
    """Memory errors that a GPU could not correct, or rows that wait for a reset; nothing where there is no GPU.

    Xid messages stand in the kernel's log, which a user may not read; the errors behind them are counted here.
    """
    program = shutil.which("nvidia-smi")
    if program is None or not device.has_cuda():
        return []
    fields = "index,ecc.errors.uncorrected.volatile.total,retired_pages.pending"
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30)  # noqa: S603
    except subprocess.TimeoutExpired:
        return [(Exit.HANG, "GPU", "nvidia-smi does not answer within 30 s: the driver or a GPU hangs")]
    if found.returncode:
        return [(Exit.HANG, "GPU", f"nvidia-smi ends with {found.returncode}: {found.stdout.strip()}")]
    return gpu_errors(found.stdout)


def gpu_errors(table: str) -> list[tuple[int, str, str]]:
    """What is wrong in `nvidia-smi`'s lines of index, uncorrected errors and pending pages; `[N/A]` is no error."""
    findings = []
    for line in table.splitlines():
        index, errors, pending = (cell.strip() for cell in line.split(","))
        if errors.isdigit() and int(errors) > 0:
            findings.append((Exit.HANG, "GPU", f"GPU {index} has {errors} memory errors that it could not correct"))
        if pending == "Yes":
            findings.append((Exit.HANG, "GPU", f"GPU {index} has damaged memory that waits for a reset"))
    return findings
