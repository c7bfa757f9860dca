"""Layouts: rows of other trainers' data become records, and what is wrong is said in the words of their fields."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from nvembed_mcore.data.faults import Fault
from nvembed_mcore.data.layouts import Layout, find_layout, negative_columns, parse_cell
from nvembed_mcore.data.records import DataError, Record, content_id, read_records

TEVATRON = {
    "query_id": "q7",
    "query": "q",
    "answers": [],
    "positive_passages": [{"docid": "d1", "title": "T", "text": "p"}],
    "negative_passages": [{"docid": "d2", "title": "", "text": "n1"}, {"docid": 3, "text": "n2"}, {"text": "n3"}],
}


def record(query, pos, neg=(), query_id=None, pos_ids=None, neg_ids=None, scores=(None, None)):
    """What a row must become; ids that are not given are those of the texts."""
    ids = [tuple(content_id(text) for text in texts) for texts in (pos, neg)]
    ids = pos_ids or ids[0], neg_ids or ids[1]
    return Record(query, tuple(pos), tuple(neg), query_id or content_id(query), *ids, None, *scores)


EVERY_LAYOUT = {
    "records": ({"query": "q", "pos": ["p1", "p2"], "neg": ["n"]}, record("q", ["p1", "p2"], ["n"])),
    "flag": (
        {
            "query": "q",
            "pos": ["p"],
            "neg": ["n"],
            "pos_scores": [0.9],
            "neg_scores": [0.1],
            "prompt": "Find:",
            "type": "normal",
        },
        record("q", ["p"], ["n"], scores=((0.9,), (0.1,))),
    ),
    "tevatron": (
        TEVATRON,
        record("q", ["T p"], ["n1", "n2", "n3"], "q7", ("d1",), ("d2", "3", content_id("n3"))),
    ),
    "tevatron without negatives": (
        {"query_id": 5, "query": "q", "positive_passages": [{"title": None, "text": "p"}]},
        record("q", ["p"], [], "5"),
    ),
    "anchor": ({"anchor": "q", "positive": "p"}, record("q", ["p"])),
    "triplet": ({"anchor": "q", "positive": "p", "negative": "n"}, record("q", ["p"], ["n"])),
    "many negatives": (
        {"query": "q", "positive": "p", "negative_10": "c", "negative_2": "b", "negative_1": "a", "negative_3": None},
        record("q", ["p"], ["a", "b", "c"]),
    ),
    "a list of negatives": (
        {"query": "q", "positive": "p", "negatives": ["a", " ", "b"], "score": 0.5},
        record("q", ["p"], ["a", "b"]),
    ),
    "a list of scores": (
        {"query": "q", "positive": "p", "negative_1": "a", "negative_2": "b", "label": [3, 1.5, -2.0]},
        record("q", ["p"], ["a", "b"], scores=((3.0,), (1.5, -2.0))),
    ),
    "a list that is no score": ({"query": "q", "positive": "p", "labels": ["x"]}, record("q", ["p"])),
    "question": ({"question": "q", "answer": "p"}, record("q", ["p"])),
    "passage": ({"query": "q", "passage": "p", "query_id": 9}, record("q", ["p"], [], "9")),
    "document": ({"query": "q", "document": "p", "negative": "n"}, record("q", ["p"], ["n"])),
    "response": ({"query": "q", "response": "p"}, record("q", ["p"])),
    "positive beside answer": ({"question": "q", "answer": "x", "positive": "p"}, record("q", ["p"])),
    "sentences": ({"sentence1": "q", "sentence2": "p"}, record("q", ["p"])),
}
LISTS = {
    "a pair": (["q", "p"], record("q", ["p"])),
    "a triplet": (["q", "p", "n"], record("q", ["p"], ["n"])),
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("row,expected", [*EVERY_LAYOUT.values(), *LISTS.values()], ids=[*EVERY_LAYOUT, *LISTS])
def test_lines_of_every_layout(tmp_path, row, expected):
    assert list(read_records(write(tmp_path / "a.jsonl", row, row))) == [expected, expected]


@pytest.mark.parametrize("row,expected", EVERY_LAYOUT.values(), ids=EVERY_LAYOUT)
def test_columns_of_every_layout(tmp_path, row, expected):
    """In Parquet; columns that hold no records are not read."""
    row = {"metadata": {"large": "x" * 100}, **row}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([_of_one_kind(row)] * 2), tmp_path / "a.parquet")
    assert list(read_records(tmp_path / "a.parquet")) == [expected, expected]


def _of_one_kind(row):
    """Arrow wants one type a column: Tevatron's ids as strings."""
    if "negative_passages" in row:
        passages = [
            {**one, "docid": str(one["docid"]) if "docid" in one else None} for one in row["negative_passages"]
        ]
        row = {**row, "negative_passages": passages}
    return row


@pytest.mark.parametrize("row,expected", EVERY_LAYOUT.values(), ids=EVERY_LAYOUT)
def test_a_layout_is_pure(row, expected):
    before = json.dumps(row)
    layout = find_layout(row)
    first, again = layout.record_row(row), layout.record_row(row)
    assert first == again and json.dumps(row) == before
    assert set(layout.columns(list(row))) <= set(row)
    kept = {name: row[name] for name in layout.columns(list(row))}
    assert {name: layout.record_row(kept).get(name) for name in ("query", "pos", "neg")} == {
        name: first.get(name) for name in ("query", "pos", "neg")
    }


def test_layouts_by_their_fields():
    assert find_layout({"neg": 1, "pos": 1, "query": 1}) == Layout("records", "query", "pos", "neg")
    assert find_layout(["query_text", "positive_document_ids"]).kind == "document ids"
    assert find_layout(["question", "positive", "answer"]) == Layout("columns", "question", "positive", "negative")
    assert negative_columns(("negative_2", "negative", "x", "negative10", "negative_1", "neg")) == [
        "negative",
        "negative_1",
        "negative_2",
        "negative10",
    ]


def test_cells_of_tables():
    assert parse_cell("pos", "one") == ["one"] and parse_cell("pos", '["a", "b"]') == ["a", "b"]
    assert parse_cell("pos", "") is None and parse_cell("negative_1", "") is None and parse_cell("query", "") == ""
    assert parse_cell("query", "[1]") == "[1]" and parse_cell("neg_ids", "7") == ["7"]
    with pytest.raises(Fault, match="begins with"):
        parse_cell("neg", "[1] Smith")


@pytest.mark.parametrize(
    "first,second,message",
    [
        (TEVATRON, {**TEVATRON, "query": ""}, "29: query is empty"),
        (TEVATRON, {"query": "q", "positive_passages": [{"text": " "}]}, "37: pos[0] is blank (of positive_passages)"),
        (
            TEVATRON,
            {"query": "q", "positive_passages": ["p"]},
            "37: positive_passages[0] must be an object, got a string",
        ),
        (TEVATRON, {"query": "q", "positive_passages": [{}]}, "37: positive_passages[0]: text is missing"),
        (TEVATRON, {"query": "q", "positive_passages": "p"}, "37: positive_passages must be a list, got a string"),
        (
            TEVATRON,
            {"query": "q", "pos": ["p"]},
            "1: another layout than that of the first row (query, positive_passages): the fields are query, pos",
        ),
        (TEVATRON, {"query": "q"}, "1: positive_passages is missing"),
        ({"anchor": "q", "positive": "p"}, {"anchor": "q", "positive": " "}, "29: pos[0] is blank (of positive)"),
        ({"anchor": "q", "positive": "p"}, {"anchor": " ", "positive": "p"}, "12: query is empty (of anchor)"),
        (
            {"anchor": "q", "positive": "p"},
            {"anchor": "q", "positive": "p", "negative": 1},
            "46: neg[0] must be a string, got a number (of negative)",
        ),
        (
            {"anchor": "q", "positive": "p"},
            {"query": "q", "positive": "p"},
            "1: another layout than that of the first row (anchor, positive): the fields are query, positive",
        ),
        (
            {"query": "q", "pos": ["p"]},
            {"query": "q", "positive": "p"},
            "1: another layout than that of the first row (query, pos): the fields are query, positive",
        ),
        (
            {"query": "q", "pos": ["p"]},
            ["q", "p"],
            "1: another layout than that of the first row (query, pos): the fields are [0], [1]",
        ),
        (["q", "p"], ["q", " "], "1: pos[0] is blank (of [1])"),
        (["q", "p"], ["q"], "1: not a JSON object but a list"),
    ],
)
def test_bad_rows_of_other_layouts(tmp_path, first, second, message):
    path = write(tmp_path / "a.jsonl", first, second)
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    assert str(caught.value) == f"{path} has 1 bad line:\n  {path}:2:{message}"
