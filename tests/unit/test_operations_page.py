"""docs/operations.md names a test for each promise: all of them exist."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from tests.helpers.pages import blocks

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


IN_SHORT = {
    "nvembed train stage1.yaml": "tests/reliability/test_resume.py::test_goes_on_by_bits",
    "touch RUN/STOP": "tests/reliability/test_stop.py::test_a_stop_file_stops_the_run_and_must_be_removed",
    "kill -USR1 PID": "tests/reliability/test_stop.py::test_a_signal_to_one_rank_stops_all_after_the_same_step",
    "nvembed status RUN": "tests/unit/test_ends.py::test_status_in_words_and_one_field",
    "cat RUN/logs/*/first-failure.json": (
        "tests/reliability/test_stop.py::test_a_crash_of_one_rank_is_told_as_the_first_failure"
    ),
}
"""The commands at the top of the page, and the test of what each is said to do."""


def test_every_command_in_short_has_its_test():
    (block,) = (one for one in blocks("docs/operations.md") if one.language == "bash")
    commands = [line.partition("  ")[0] for line in block.text.splitlines()]
    assert commands == list(IN_SHORT)
    for path, test in (one.split("::") for one in IN_SHORT.values()):
        assert test in functions_of(path)
