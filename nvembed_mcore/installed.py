"""What this machine has for training: libraries with their versions, and GPUs with their driver."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

from nvembed_mcore import device

PACKAGES = (
    *("megatron-core", "transformer-engine", "transformer-engine-cu12", "transformer-engine-cu13"),
    *("transformer-engine-torch", "triton", "flash-attn", "transformers", "tokenizers", "datasets", "psutil"),
    *("sentence-transformers", "peft", "faiss-cpu", "tensorboard", "wandb"),
)

Apex = Literal["none", "another package", "without kernels", "with kernels"]


@dataclass(frozen=True)
class Installed:
    """What was found.

    Attributes:
        cuda_build: version of CUDA that torch is built for; None: a build for CPUs.
        cudnn: version that torch loads, such as (9, 19, 0); None: none.
        nccl: version that torch is built with; empty: none.
        devices: those that this process may use.
        driver: what `nvidia-smi` says of the driver, or why it says nothing; empty where there is no such program.
        packages: version by name, of those of `PACKAGES` that are there.
        apex: NVIDIA's, or the package that has its name on the Python index.
    """

    python: str
    torch: str
    cuda_build: str | None
    cudnn: tuple[int, int, int] | None
    nccl: str
    devices: list[device.Gpu]
    driver: str
    packages: dict[str, str]
    apex: Apex

    def lines(self) -> dict[str, str]:
        """For people, by name; what is missing says so."""
        gpus = [
            f"{one.name}, compute capability {one.capability[0]}.{one.capability[1]}, "
            f"{one.memory_bytes / 2**30:.0f} GiB"
            for one in self.devices
        ]
        return {
            "Python": self.python,
            "torch": f"{self.torch}, for {'CUDA ' + self.cuda_build if self.cuda_build else 'CPUs'}",
            "GPUs": "; ".join(f"{gpus.count(one)} x {one}" for one in dict.fromkeys(gpus)) or "none",
            "driver": self.driver or "none",
            "cuDNN": ".".join(map(str, self.cudnn)) if self.cudnn else "none",
            "NCCL": self.nccl or "none",
            **{name: self.packages.get(name, "not installed") for name in PACKAGES},
            "Apex (NVIDIA's)": {"none": "not installed", "another package": "not installed"}.get(self.apex, self.apex),
        }


def look() -> Installed:
    """Look around; imports nothing but torch, and asks `nvidia-smi`."""
    return Installed(
        python=platform.python_version(),
        torch=torch.__version__,
        cuda_build=device.cuda_build(),
        cudnn=_cudnn(torch.backends.cudnn.version()),
        nccl=device.nccl_version(),
        devices=device.gpus(),
        driver=_driver(),
        packages={name: found for name in PACKAGES if (found := _version(name))},
        apex=_apex(),
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _cudnn(number: int | None) -> tuple[int, int, int] | None:
    """91900 is 9.19.0; before 9 it was 8907 for 8.9.7."""
    if not number:
        return None
    major, rest = divmod(number, 10_000 if number >= 90_000 else 1000)
    return major, *divmod(rest, 100)


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30)  # noqa: S603
    except subprocess.TimeoutExpired:
        return "nvidia-smi does not answer within 30 s"
    if found.returncode:
        return f"nvidia-smi ends with {found.returncode}: {(found.stdout + found.stderr).strip()}"
    return ", ".join(sorted(set(found.stdout.split())))


def _apex() -> Apex:
    """By its modules, none of which is imported: the other package may not even import."""
    spec = importlib.util.find_spec("apex")
    folders = [Path(one) for one in (spec.submodule_search_locations or [])] if spec else []
    if not folders:
        return "none"
    if not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        return "another package"
    has_kernels = all(importlib.util.find_spec(name) for name in ("amp_C", "fused_layer_norm_cuda"))
    return "with kernels" if has_kernels else "without kernels"
