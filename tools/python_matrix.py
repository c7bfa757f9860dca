"""Install the wheel under every supported Python, where there is no repository, and run a train of tests there.

Run from the root of the repository: PYTHONPATH=. python tools/python_matrix.py [--versions 3.10 3.12] [--json FILE]

For each version: a virtual environment, the wheel (built here, from the sdist) with all that it needs, from pip's own
configuration, and copies of tests/, tools/ and examples/ beside it, without the package: what the tests import is what
was installed. An interpreter is looked for as `python3.10` on the PATH, then among those of pyenv. A version without
one is reported and makes the exit status 1, as does a test that fails.

Figures of --json, for each version as `3.10 passed`, `3.10 failed` and so on:
  python, torch, transformers    versions that were used
  passed, failed, skipped        tests, of those that TESTS names or `--tests` gives
  seconds                        of the tests, without the installation
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
VERSIONS = ("3.10", "3.11", "3.12")
TORCH = "torch==2.13.0"  # as tools/venv.sh: this release has a CPU build
NEEDED = (
    "pytest>=8",
    "faiss-cpu>=1.8",
    "tensorboard>=2.16",
    "peft>=0.17,<0.22",
    "sentencepiece>=0.2",
    "sentence-transformers>=5.1,<7",
)
TESTS = (
    "test_config test_yaml_loader test_progress test_log test_comfort test_cli test_cli_encode "
    "test_records test_sources test_token_build test_tokens test_tokenizer test_packing test_blend "
    "test_loss test_kernels test_lora test_pooling test_export test_names test_search test_retrieval "
    "test_mining_run test_mining_approximate test_convert_tasks test_convert_questions test_decontaminate "
    "test_check test_plan test_scaling_command test_python_source test_python_docs "
).split()
"""Of tests/unit: each room of the package, and what depends on Python most: types, parsing of source, argparse."""


def interpreter(version: str) -> str | None:
    """A Python of this version that runs, if there is one."""
    pyenv = os.environ.get("PYENV_ROOT", str(Path.home() / ".pyenv"))
    for candidate in (f"python{version}", *sorted(glob.glob(f"{pyenv}/versions/{version}.*/bin/python"))):
        code = "import sys; print('.'.join(map(str, sys.version_info[:2])))"
        try:
            found = subprocess.run([candidate, "-c", code], capture_output=True, text=True)  # noqa: S603
        except OSError:
            continue
        if found.stdout.strip() == version:
            return candidate
    return None


def run(*command: object, folder: Path, check: bool = True) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)  # noqa: S603
    if check and done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout


def build(folder: Path) -> Path:
    """The wheel of the tracked files as they are now, from their sdist."""
    tree = folder / "tree"
    for name in run("git", "ls-files", folder=ROOT).splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", tree, folder=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    for name in ("nvembed_mcore", "kernels"):
        shutil.rmtree(tree / name)
    return wheel


def try_version(version: str, wheel: Path, folder: Path, tests: list[str]) -> dict[str, Any]:
    """Install and test under one version; see the figures of --json."""
    given = interpreter(version)
    if given is None:
        return {"python": None}
    python = folder / version / "bin" / "python"
    if not python.exists():
        run(given, "-m", "venv", folder / version, folder=folder)
    pip = (python, "-m", "pip", "install", "-qq", "--disable-pip-version-check")
    run(*pip, TORCH, folder=folder)
    run(*pip, "--force-reinstall", "--no-deps", wheel, folder=folder)
    run(*pip, wheel, *NEEDED, folder=folder)
    code = "import sys, torch, transformers as t; print(sys.version.split()[0], torch.__version__, t.__version__)"
    found = run(python, "-c", code, folder=folder).split()
    versions = dict(zip(("python", "torch", "transformers"), found, strict=True))
    start = time.monotonic()
    files = [f"tests/unit/{name}.py" for name in tests]
    options = ["-q", "-W", "ignore", "-p", "no:cacheprovider", "-m", "not slow", "--tb=short"]
    said = run(python, "-m", "pytest", *options, *files, folder=folder / "tree", check=False)
    print(said[-3000:])
    counts = {word: int((re.findall(rf"(\d+) {word}", said) or [0])[-1]) for word in ("passed", "failed", "skipped")}
    counts["failed"] += int((re.findall(r"(\d+) errors?\b", said.rpartition("\n=")[2] or said) or [0])[-1])
    return versions | counts | {"seconds": round(time.monotonic() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=VERSIONS, choices=VERSIONS)
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="NAME", help="of tests/unit, without .py")
    parser.add_argument("--folder", type=Path, help="for the environments, which are kept (default: a temporary one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    arguments = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build(Path(scratch))
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if folder != Path(scratch):
            shutil.copytree(Path(scratch) / "tree", folder / "tree", dirs_exist_ok=True)
        for version in arguments.versions:
            found[version] = try_version(version, wheel, folder.resolve(), arguments.tests)
            print(version, json.dumps(found[version]), flush=True)
    if arguments.json:
        flat = {f"{version} {name}": value for version, one in found.items() for name, value in one.items()}
        arguments.json.write_text(json.dumps(flat, indent=1) + "\n", encoding="utf-8")
    return int(any(one["python"] is None or one["failed"] or not one["passed"] for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
