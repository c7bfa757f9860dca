"""Every command that a page shows is run: here as it stands, or by the test that its fence names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.helpers import pages
from tests.helpers.pages import ROOT, Block, blocks

QUICK = {"docs/tutorial/own-data.md": 240}
"""Pages that the default suite runs, and the seconds that each may take."""
SLOW = {}
"""Pages that `tools/test.sh --all` runs besides."""

ALL = [block for page in pages.pages() for block in blocks(page)]


def test_every_fence_says_what_it_is():
    assert len(ALL) > 60
    faults = [f"{block}: {block.fault}" for block in ALL if block.fault]
    assert not faults, "\n".join(faults)


def test_every_block_is_run_by_somebody():
    unknown = [str(block) for block in ALL if block.is_run and block.page not in {**QUICK, **SLOW}]
    assert not unknown, "nobody runs these, and no marker says why:\n" + "\n".join(unknown)
    idle = [page for page in {**QUICK, **SLOW} if not any(block.is_run for block in blocks(page))]
    assert not idle, f"nothing to run on {idle}"


def test_a_test_that_a_block_names_runs_it():
    wrong = [f"{block}: {why}" for block in ALL if block.tested_by and (why := unproven(block))]
    assert not wrong, "\n".join(wrong)


def unproven(block: Block) -> str:
    """Why the test that a block names does not run it; nothing where it does.

    It reads the page, as `test_data_page.py` does, or has each command of the block among its own words.
    """
    file = ROOT / block.tested_by
    if not file.is_file():
        return f"there is no {block.tested_by}"
    source = file.read_text(encoding="utf-8")
    if not re.search(r"^def test_", source, re.MULTILINE):
        return f"{block.tested_by} has no test"
    words = {node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)}
    if block.page in words or Path(block.page).name in words:
        return ""
    missing = [command for command in commands(block.text) if not any(command in str(word) for word in words)]
    return f"{block.tested_by} names neither the page nor {missing}" if missing else ""


def commands(text: str) -> list[str]:
    """The lines of a block without comments and blank ones."""
    lines = (re.sub(r"(^|\s+)#.*", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


@pytest.mark.parametrize("page", QUICK)
def test_a_page(page, tmp_path):
    pages.run(page, tmp_path, QUICK[page])


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW)
def test_a_long_page(page, tmp_path):
    pages.run(page, tmp_path, SLOW[page])
