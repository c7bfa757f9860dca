"""Every command that a page shows is run: here as it stands, or by the tests that its fence names."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from functools import lru_cache
from pathlib import Path

import pytest

from tests.helpers import pages
from tests.helpers.pages import ROOT, Block, blocks

SECONDS = 600
"""That a page may take."""
FIRST = "docs/tutorial/own-data.md"
"""The page whose folder others go on in."""
QUICK = ("docs/tutorial/one-gpu.md",)
"""Pages that the default suite runs besides."""
SLOW = ("docs/tutorial/eight-gpus.md", "docs/tutorial/slurm.md", "examples/scaling/README.md")
"""Pages that `tools/test.sh --all` runs too: in an empty folder,"""
SLOW_AFTER = tuple(f"docs/how-to/{name}.md" for name in ("fp8", "hard-negatives", "import-export", "lora"))
"""and in the folder that `FIRST` left."""
RUN = (FIRST, *QUICK, *SLOW, *SLOW_AFTER)

ALL = [block for page in pages.pages() for block in blocks(page)]


def test_every_fence_says_what_it_is():
    assert len(ALL) > 60
    faults = [f"{block}: {block.fault}" for block in ALL if block.fault]
    assert not faults, "\n".join(faults)


def test_every_block_is_run_by_somebody():
    unknown = [str(block) for block in ALL if block.is_run and block.page not in RUN]
    assert not unknown, "nobody runs these, and no marker says why:\n" + "\n".join(unknown)
    idle = [page for page in RUN if not any(block.is_run for block in blocks(page))]
    assert not idle, f"nothing to run on {idle}"


def test_the_tests_that_a_block_names_run_it():
    assert sum(bool(block.tested_by) for block in ALL) > 5
    wrong = [f"{block}: {why}" for block in ALL if block.tested_by and (why := unproven(block))]
    assert not wrong, "\n".join(wrong)


def unproven(block: Block) -> str:
    """Why the tests that a block names do not run it; nothing where they do.

    One of them reads the page, as `test_data_page.py` does, or among the words of all of them is what the block runs:
    each program, subcommand and option, or what its Python imports.
    """
    for path in block.tested_by:
        if not re.search(r"^def test_", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE):
            return f"{path} has no test"
    words = set().union(*(words_of(path) for path in block.tested_by))
    if any(Path(word).name == Path(block.page).name for word in words) and block.page != "README.md":
        return ""
    wanted = imported(block.text) if block.language == "python" else commanded(block.text)
    missing = sorted(wanted - words)
    return f"{', '.join(block.tested_by)}: no word of {missing}" if missing else ""


@lru_cache
def words_of(path: str) -> set[str]:
    """The words of a file's constants and the names that it uses, and those of the tests' helpers that it imports."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.update(node.value.split(), map(_last, node.value.split()))
        found.update(value for _, value in ast.iter_fields(node) if isinstance(value, str))
        if isinstance(node, ast.ImportFrom) and node.module:
            file = node.module.replace(".", "/") + ".py"
            found |= {_last(file)} | (words_of(file) if file.startswith("tests/helpers/") else set())
    return found


def _last(word: str) -> str:
    return word.rpartition("/")[2].strip(".,;:`'\"()")


def imported(text: str) -> set[str]:
    """The names that a program imports."""
    nodes = ast.walk(ast.parse(text))
    return {alias.name for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}


def commanded(text: str) -> set[str]:
    """Script, subcommands and options of each command; of `curl`, where it asks."""
    found = set()
    for line in text.replace("\\\n", " ").splitlines():
        words = [word for word in shlex.split(line, comments=True) if "=" not in word.partition("-")[0]]
        while words and words[0] in ("nvembed", "python", "bash", "&&"):
            words = words[1:]
        if words[:1] == ["curl"]:
            found.update(re.findall(r"localhost:\d+(\S+)", line))
            continue
        if words and "/" in words[0]:
            words[0] = _last(words[0])
        verbs = [word for place, word in enumerate(words) if all(map(_is_verb, words[: place + 1]))]
        found.update(verbs, (word for word in words if word.startswith("--") and word != "--help"))
    return found - {"cd", "."}


def _is_verb(word: str) -> bool:
    return re.fullmatch(r"[a-z][a-z_-]*(\.py|\.sh)?", word) is not None


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """The folder that `FIRST` leaves, with `printed`: what it said."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "printed").write_text(pages.run(FIRST, folder, SECONDS), encoding="utf-8")
    return folder


def test_the_first_page_ends_with_the_function_that_it_looks_for(first):
    printed = (first / "printed").read_text(encoding="utf-8")
    assert "A run may start; no warnings." in printed
    assert "def shuffle(self, x)" in printed.rpartition("block docs/tutorial/own-data.md")[2]
    # What a random order of the documents would have is 0.004.
    assert float(re.search(r"^recall_at_10 +([\d.]+)$", printed, re.MULTILINE)[1]) > 0.2


@pytest.mark.parametrize("page", QUICK)
def test_a_page(page, tmp_path):
    pages.run(page, tmp_path, SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW)
def test_a_long_page(page, tmp_path):
    pages.run(page, tmp_path, SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW_AFTER)
def test_a_page_that_goes_on_from_the_first(page, first, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(first, folder, symlinks=True)
    pages.run(page, folder, SECONDS)
