"""Pages as a browser shows them: Debian's Chromium without a window."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

# Behind everything else, so that pictures are there: tells of each whether it is complete, its name, and its width.
_LOOK = """<script>
addEventListener("load", () => {
  const found = [...document.images].map((one) => [one.alt, one.complete ? one.naturalWidth : 0]);
  document.title = JSON.stringify(found);
});
</script>"""


@dataclass(frozen=True)
class Shown:
    """What a page came to. `images`: name -> pixels across, 0 where nothing is shown. `errors`: of the console."""

    images: dict[str, int]
    errors: list[str]


def show(file: Path, folder: Path) -> Shown:
    """Open a page; skips the test where there is no Chromium.

    Args:
        folder: for a copy of the page, and the browser's profile.
    """
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is missing (tools/ci_setup.sh installs it)")
    page = folder / "looked-at.html"
    page.write_text(file.read_text(encoding="utf-8") + _LOOK, encoding="utf-8")
    done = subprocess.run(
        [
            *(program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000"),
            *("--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    images = dict(json.loads(html.unescape(title[1])))
    return Shown(images, [line for line in done.stderr.splitlines() if "CONSOLE" in line])
