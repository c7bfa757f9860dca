"""The pictures of docs/concepts show what the pages say of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.docs.figures import STEP_WAYS, operations, part_of_columns

CONCEPTS = Path(__file__).parents[2] / "docs" / "concepts"


def test_who_is_a_negative_of_whom():
    part, names = part_of_columns()
    assert names == ["p0", "h0", "p1", "p2", "h2", "p3", "h3", "p4", "h4", "h4′", "p5"]
    for query, row in enumerate(part):
        assert [name for name, value in zip(names, row, strict=True) if value < 0] == [f"p{query}"]
        left_out = {name for name, value in zip(names, row, strict=True) if value == 0}
        own = {"p4", "h4", "h4′"}
        assert left_out == {2: {"p5"}, 5: {"p2"}, 4: {*names} - own}.get(query, set())


def test_a_folded_token_has_a_ninth_of_the_operations():
    plain, folded, once = operations()
    assert plain / folded == pytest.approx(9)
    assert 8000 < once / folded < 8400


@pytest.mark.parametrize("way", STEP_WAYS)
def test_a_step_does_each_pack_once_and_no_graph_is_made_for_nothing(way):
    order = STEP_WAYS[way].split()
    scored = order.index("S")
    assert order[:scored] == ["E0", "E1", "E2", "E3"]
    behind = order[scored + 1 :]
    assert sorted(word for word in behind if word[0] == "B") == ["B0", "B1", "B2", "B3"]
    again = [word for word in behind if word[0] == "E"]
    assert again == (["E2", "E1", "E0"] if way == "cached" else [])


def test_every_picture_is_on_a_page_and_small():
    used = {name for page in CONCEPTS.glob("*.md") for name in re.findall(r"\]\((\w[\w-]*\.svg)\)", page.read_text())}
    files = {file.name: file.stat().st_size for file in CONCEPTS.glob("*.svg")}
    assert used == set(files)
    assert sum(files.values()) < 1_000_000
