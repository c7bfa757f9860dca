"""The fenced blocks of the repository's pages: which there are, who runs each, and running a page as a reader would.

A block with a file's name behind its language is that file. A ```` ```bash ```` or ```` ```python ```` block is run,
unless a marker says who does it or what it needs:

    ```bash {.gpu}  ```bash {.cluster}  ```bash {.download}     GPUs, a cluster, the network: run by nobody here
    ```bash {.tested-by tests/unit/test_x.py}                   that test runs it; several files share the commands
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDS = ("gpu", "cluster", "download")
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*) *(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S
)
_TESTED_BY = re.compile(r"\{\.tested-by ([\w./ -]+)\}")
_FILE = re.compile(r"[\w-][\w./-]*\.\w+")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: path from the root of the repository.
        line: of the fence, from 1.
        file: its name, where the block is a file.
        needs: `gpu`, `cluster` or `download`.
        tested_by: paths of the tests that run it.
        fault: what is wrong with the fence.
    """

    page: str
    line: int
    language: str
    text: str
    file: str = ""
    needs: str = ""
    tested_by: tuple[str, ...] = ()
    fault: str = ""

    @property
    def is_run(self) -> bool:
        """Whether it is for `run` to run."""
        return self.language in ("bash", "python") and not (self.file or self.needs or self.tested_by or self.fault)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """Every page that a user is sent to, as paths from the root of the repository."""
    found = [
        ROOT / "README.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
    ]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [_block(page, 1 + text.count("\n", 0, match.start()), match) for match in _FENCE.finditer(text)]


def _block(page: str, line: int, match: re.Match[str]) -> Block:
    indent, info = match["indent"], match["info"].strip()
    text = "".join(one.removeprefix(indent) for one in match["text"].splitlines(keepends=True))
    what = {}
    if tested := _TESTED_BY.fullmatch(info):
        what["tested_by"] = tuple(tested[1].split())
    elif info.removeprefix("{.").removesuffix("}") in NEEDS and info.startswith("{."):
        what["needs"] = info[2:-1]
    elif _FILE.fullmatch(info):
        what["file"] = info
    elif info:
        what["fault"] = f"{info!r} is neither a file's name nor a marker"
    return Block(page, line, match["language"], text, **what)


def run(page: str, folder: Path, timeout: float) -> str:
    """Run a page's blocks in `folder`, one after the other in one shell; returns what they print.

    Raises:
        AssertionError: one failed; the message has the block and the end of the output.
    """
    for name in ("examples", "tools"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        ["bash"],
        input=script(page),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    at = re.findall(r"^block (.*)$", done.stdout, re.MULTILINE)
    assert done.returncode == 0, (
        f"{at[-1:]} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    )
    return done.stdout


def script(page: str) -> str:
    """A shell's program that does what a reader does: write the files and run the commands, from top to bottom."""
    parts = ["set -euo pipefail"]
    for block in blocks(page):
        if block.file:
            parts += [f"mkdir -p \"$(dirname '{block.file}')\"", _here(f"cat > '{block.file}'", block.text)]
        elif block.is_run:
            parts += [
                f"echo 'block {block}'",
                block.text if block.language == "bash" else _here("python -", block.text),
            ]
    return "\n".join(parts) + "\n"


def _here(command: str, text: str) -> str:
    return f"{command} <<'END-OF-BLOCK'\n{text}END-OF-BLOCK"
