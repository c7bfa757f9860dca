"""The wheel and the sdist: complete, alike, and at work where there is no repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import nvembed_mcore
from tests.helpers import runs

ROOT = Path(__file__).parents[2]


def run(*command: object, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked() -> list[str]:
    """The files of the repository that are there, new ones too."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in found if (ROOT / name).is_file() and name.partition("/")[0] not in (".venv", ".ci")]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """Sdist, and the wheel that is built from it, which is what `python -m build` does."""
    if not (ROOT / ".git").exists():
        pytest.skip("no repository to build from")
    folder = tmp_path_factory.mktemp("build")
    for name in tracked():
        target = folder / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    run("-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "tree", folder=folder)
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """A folder for PYTHONPATH."""
    target = tmp_path_factory.mktemp("installed")
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    run("-m", "pip", "install", *options, "--target", target, built[1], folder=target)
    return target


def test_the_sdist_has_all_that_is_tracked(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not {name for name in tracked() if not name.startswith((".git", ".ci"))} - names


def test_the_wheel_has_the_package_and_nothing_else(built):
    """Made from the sdist alone: so the sdist gives the same wheel."""
    sources = [name for name in tracked() if name.startswith(("nvembed_mcore/", "kernels/"))]
    expected = {name if name.startswith("nvembed") else f"nvembed_mcore/{name}" for name in sources}
    with zipfile.ZipFile(built[1]) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == expected
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        described = message_from_string(archive.read(metadata).decode())
    assert described["Version"] == nvembed_mcore.__version__ and "Apache-2.0" in described.values()
    assert described["Description-Content-Type"] == "text/markdown" and "# nvembed_mcore" in described.get_payload()
    assert described["Requires-Python"] in (">=3.10,<3.13", "<3.13,>=3.10")


def test_what_is_installed_trains_and_exports_where_there_is_no_repository(installed, tmp_path):
    """In one process, by a program whose only way to the package is where it was installed."""
    inputs = runs.write_inputs(tmp_path / "inputs", with_words=True)
    config = runs.write_config(runs.run_config(inputs, tmp_path / "run", steps=1, batch_size=4))
    program = f"""
import sys
import nvembed_mcore, nvembed_mcore.kernels.info_nce
from nvembed_mcore.__main__ import run
from nvembed_mcore.cli import main
assert nvembed_mcore.__file__.startswith({str(installed)!r}), nvembed_mcore.__file__
assert nvembed_mcore.kernels.info_nce.__file__.startswith({str(installed)!r})
assert main(["train", {str(config)!r}]) == 0
assert main(["export-hf", {str(tmp_path / "run")!r}, "export"]) == 0
assert main(["data", "prompts", "brainstorm", "prompts.jsonl", "--count", "1"]) == 0
assert main(["plan", {str(config)!r}, "--gpus", "2", "--device", "cpu"]) == 0
sys.argv = ["nvembed", "--version"]
run()
"""
    said = run("-c", program, folder=tmp_path, PYTHONPATH=str(installed))
    assert said.endswith(f"{nvembed_mcore.__version__}\n")
    assert (tmp_path / "export" / "modeling_nvembed.py").is_file()
