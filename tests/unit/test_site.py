"""The documentation as a site: built without a warning, and complete in itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nvembed_mcore

ROOT = Path(__file__).parents[2]
# What a browser fetches by itself; a link that a reader follows may lead anywhere.
FETCHED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    # Strict stops at warnings; a file that no menu leads to is one, and so is a link or an anchor that leads nowhere.
    assert "WARNING" not in done.stderr
    return folder


def test_nothing_is_fetched_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    fetched = {(page.name, link) for page in pages for link in FETCHED.findall(page.read_text(encoding="utf-8"))}
    assert not fetched


def test_it_can_be_searched(site):
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "tutorial/own-data.html" in index and "positive-aware" in index


def test_every_page_of_the_repository_is_in_the_site(site):
    pages = [path for path in (ROOT / "docs").rglob("*.md")]
    missing = [path for path in pages if not (site / path.relative_to(ROOT / "docs").with_suffix(".html")).is_file()]
    assert not missing


def test_every_public_name_is_in_the_reference(site):
    text = (site / "reference" / "python.html").read_text(encoding="utf-8")
    names = [name for name in nvembed_mcore.__all__ if not name.endswith("Config")]
    assert len(names) > 15
    assert not [name for name in names if f'id="nvembed_mcore.{name}"' not in text]


def test_every_field_and_command_is_in_the_reference(site):
    fields = (site / "reference" / "configuration.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in fields for name in ("run_dir", "data.datasets.path", "model.lora.rank", "step.way"))
    commands = (site / "reference" / "command-line.html").read_text(encoding="utf-8")
    assert all(f'id="nvembed-{name}"' in commands for name in ("train", "data-split", "data-convert-sts", "plan"))
