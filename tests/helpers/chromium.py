"""Pages as a browser shows them: Debian's Chromium without a window."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Of each picture its name, and its width where it is complete.
_LOOK = "[...document.images].map((one) => [one.alt, one.complete ? one.naturalWidth : 0])"


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
    images, errors = look(file, folder, _LOOK)
    return Shown(dict(images), errors)


def look(file: Path, folder: Path, script: str) -> tuple[Any, list[str]]:
    """Open a page as `show` does and run a script in it when it is loaded; a policy of the page lets this one in.

    Args:
        script: an expression of JavaScript.

    Returns:
        its value, and the errors of the console.
    """
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is missing (tools/ci_setup.sh installs it)")
    # Behind everything else, so that pictures are there.
    code = f'addEventListener("load", () => {{ document.title = JSON.stringify({script}); }});'
    text = file.read_text(encoding="utf-8") + f"<script>{code}</script>"
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    page = folder / "looked-at.html"
    page.write_text(text.replace("; script-src ", f"; script-src 'sha256-{digest}' ", 1), encoding="utf-8")
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
    return json.loads(html.unescape(title[1])), [line for line in done.stderr.splitlines() if "CONSOLE" in line]
