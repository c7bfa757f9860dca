"""tools/install_gpu.sh on a machine that is made up: which commands it runs, and what it refuses to begin without.

That the shell reads it, and shellcheck, are in tests/reliability/test_slurm_scripts.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "install_gpu.sh"
HEADERS = "cuda_runtime.h crt/host_config.h cublas_v2.h cudnn.h nccl.h".split()

# Answers what the script asks, and notes what it is told to do, with the settings that a build would see.
PYTHON = """\
#!/usr/bin/env bash
case "$2" in
    *version_info*) echo "${VERSION:-3.12}" ;;
    *"import torch; print(torch.__version__)"*) echo "${TORCH-2.11.0+cu130}" ;;
    *torch.version.cuda*) echo "${CUDA-13}" ;;
    *"import nvidia"*) echo "$PACKAGES" ;;
    *) echo "$* | $NVTE_CUDA_ARCHS $NVTE_BUILD_USE_NVIDIA_WHEELS $TORCH_CUDA_ARCH_LIST $MAX_JOBS" >>"$CALLS" ;;
esac
"""
NVIDIA_SMI = "#!/usr/bin/env bash\nprintf '9.0\\n9.0\\n'\n"


class Machine:
    """Programs, headers and answers of a machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        (folder / "bin").mkdir()
        for name, text in {"python": PYTHON, "nvidia-smi": NVIDIA_SMI, "c++": NVIDIA_SMI, "git": NVIDIA_SMI}.items():
            (folder / "bin" / name).write_text(text, encoding="utf-8")
            (folder / "bin" / name).chmod(0o755)
        for header in HEADERS:
            self.add(folder / "cuda" / "include" / header)

    @staticmethod
    def add(file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()

    def run(self, *options: str, **changes: str) -> tuple[int, str, list[str]]:
        """Status, output and what Python was told to do."""
        environment = dict(os.environ, CALLS=str(self.calls), CUDA_HOME=str(self.folder / "cuda"), MAX_JOBS="8")
        environment |= {"PACKAGES": "", "PATH": f"{self.folder}/bin:{os.environ['PATH']}", "CXX": "c++", **changes}
        command = ["bash", str(SCRIPT), "--python", str(self.folder / "bin" / "python"), *options]
        found = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        calls = self.calls.read_text(encoding="utf-8").splitlines() if self.calls.exists() else []
        return found.returncode, found.stdout + found.stderr, calls


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_what_it_does(machine):
    status, output, calls = machine.run()
    assert status == 0, output
    told = [call.partition(" | ")[0] for call in calls]
    assert told[:3] == [
        f"-m pip install --editable {SCRIPT.parents[1]}[gpu]",
        "-m pip install setuptools wheel ninja packaging pybind11 einops onnxscript pydantic",
        "-m pip install --no-deps transformer-engine==2.20.2 transformer-engine-cu13==2.20.2",
    ]
    build, install = calls[3:5]
    assert "pip wheel --no-build-isolation --no-deps --no-binary transformer-engine-torch" in build
    assert build.endswith("transformer-engine-torch==2.20.2 | 90 0  8")
    assert "pip install --no-index --no-deps --find-links wheels transformer-engine-torch==2.20.2" in install
    assert told[5] == "-m nvembed_mcore doctor"
    assert "te.autocast" in machine.calls.read_text(encoding="utf-8") and "apex" not in " ".join(told[:5])


def test_a_machine_without_a_network(machine):
    (machine.folder / "carried").mkdir()
    status, output, calls = machine.run("--wheels", "carried", CUDA="12", TORCH="2.11.0+cu126")
    assert status == 0, output
    pip = [call for call in calls if " pip " in call]
    assert len(pip) == 5 and all("--no-index" in call for call in pip)
    assert all("--find-links carried" in call for call in pip[:4]), "the last one is what was built here"
    assert "transformer-engine-cu12==2.20.2" in pip[2]


def test_apex_comes_from_its_source(machine):
    (machine.folder / "checkout").mkdir()
    machine.add(machine.folder / "cuda" / "bin" / "nvcc")
    (machine.folder / "cuda" / "bin" / "nvcc").chmod(0o755)
    status, output, calls = machine.run("--apex", "checkout", "--arch", "90;100")
    assert status == 0, output
    build, install = [call for call in calls if "apex" in call]
    assert "--no-build-isolation --no-deps --wheel-dir wheels/apex checkout" in build and "9.0;10.0" in build
    assert "--no-index" in install, "never the package of that name on the index"
    _, output, _ = machine.run("--dry-run", "--apex")
    assert "git clone --depth 1 https://github.com/NVIDIA/apex wheels/apex-source" in output


def test_headers_of_torch_packages(machine):
    (machine.folder / "cuda" / "include" / "cudnn.h").unlink()
    for header in HEADERS:
        part = "cudnn" if header == "cudnn.h" else "cu13"
        machine.add(machine.folder / "nvidia" / part / "include" / header)
    status, output, calls = machine.run(PACKAGES=str(machine.folder / "nvidia"))
    assert status == 0, output
    assert calls[3].endswith(" | 90 1  8")


@pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="what is taken away here may be there as well")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"VERSION": "3.13"}, "Python is 3.13, and nvembed_mcore needs 3.10 to 3.12"),
        ({"TORCH": ""}, "torch is not installed"),
        ({"CUDA": ""}, "torch 2.11.0+cu130 is built for CPUs, and TransformerEngine 2.20.2 needs CUDA 12 or 13"),
        ({"CUDA": "11"}, "torch 2.11.0+cu130 is built for CUDA 11, and"),
        ({"CXX": "no-such-compiler"}, "there is no C++ compiler (no-such-compiler)"),
        ({"options": "--apex"}, "there is no nvcc, which Apex is compiled with"),
        ({"options": "--wheels nowhere"}, "there is no folder nowhere"),
        ({"without": "bin/nvidia-smi"}, "there is no GPU to build for"),
        ({"without": "cuda/include/nccl.h"}, "no nccl.h, in "),
    ],
    ids=str,
)
def test_what_it_needs_first(machine, changes, words):
    changes = dict(changes)
    if without := changes.pop("without", ""):
        (machine.folder / without).unlink()
    options = changes.pop("options", "").split()
    status, output, calls = machine.run(*options, PATH=f"{machine.folder}/bin:/usr/bin:/bin", **changes)
    assert (status, calls) == (1, []) and f"install_gpu: cannot: {words}" in output
    # A dry run tells it and goes on; it does nothing either.
    status, output, calls = machine.run(*options, "--dry-run", PATH=f"{machine.folder}/bin:/usr/bin:/bin", **changes)
    assert (status, calls) == (0, []) and words in output and "transformer-engine-torch==2.20.2" in output
    assert output.count("install_gpu: cannot: ") == 1, "one reason, and not what only follows from it"


def test_a_torch_that_was_replaced_on_the_way(machine):
    """By a package that wants another one: what was built does not fit it."""
    script = machine.folder / "bin" / "python"
    text = script.read_text(encoding="utf-8").replace(
        'echo "${TORCH-2.11.0+cu130}"', 'if [ -e "$CALLS" ]; then echo 2.12.0; else echo 2.11.0; fi'
    )
    script.write_text(text, encoding="utf-8")
    status, output, _ = machine.run()
    assert status == 1 and "torch was 2.11.0 and is 2.12.0 now" in output


def test_an_unknown_option(machine):
    status, output, calls = machine.run("--nonsense")
    assert (status, calls) == (2, []) and "--dry-run" in output
