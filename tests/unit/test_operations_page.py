"""docs/operations.md names a test for each promise: all of them exist."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = "tests/reliability/"
NAMED = re.compile(r"`((?:tests/)?[\w/]+\.py)?(?:::(test_\w+))?`")


@lru_cache
def functions_of(path: str) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE))


def named() -> list[tuple[str, str]]:
    """(file, test or nothing) in the order of the page; `::test` alone is of the file named before."""
    found, path = [], ""
    for file, test in NAMED.findall((ROOT / "docs/operations.md").read_text(encoding="utf-8")):
        if file.rpartition("/")[2].startswith("test_"):
            path = file if file.startswith("tests/") else FOLDER + file
        if file.startswith(("tests/", "test_")) or test:
            found.append((path, test))
    return found


def test_every_test_that_the_page_names_is_there():
    tests = named()
    assert len(tests) > 60
    missing = [f"{path}::{test}" for path, test in tests if test and test not in functions_of(path)]
    missing += [path for path, _ in tests if not (ROOT / path).is_file()]
    assert not missing, "\n".join(missing)
