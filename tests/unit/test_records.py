"""Records and BEIR folders: what is read, and what is said about what cannot be."""

import gzip
import json
import logging

import pyarrow
import pyarrow.parquet
import pytest

from nvembed_mcore.data import files
from nvembed_mcore.data.beir import read_beir
from nvembed_mcore.data.records import (
    DataError,
    Record,
    Tally,
    content_id,
    read_records,
    write_records,
)

GOOD = {"query": "q", "pos": ["p"], "neg": ["n"]}


def validate(path) -> Tally:
    """Read a whole file of records and count what is in it."""
    tally = Tally()
    for _ in read_records(path, tally):
        pass
    return tally


def write(path, *lines):
    """Each line as bytes, text or an object."""
    raw = [x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode() for x in lines]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def fault(path, *lines):
    """The message about a file whose only bad line is the last one, without its first line."""
    with pytest.raises(DataError) as caught:
        validate(write(path, *lines))
    head, body = str(caught.value).split("\n", 1)
    assert head == f"{path} has 1 bad line:"
    assert body.startswith(f"  {path}:{len(lines)}:")
    return body.removeprefix(f"  {path}:{len(lines)}:")


def test_read(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"query": "q1", "pos": ["p1", "p2"], "neg": ["n1"], "extra": {"x": 1}},
        "",
        {"query": "q2", "pos": ["p"], "neg": [], "query_id": "7", "pos_ids": ["d"], "neg_ids": []},
        {"query": "q3\u2028é", "pos": ["p"]},
        {"query": "q4", "pos": ["p"], "neg": None, "neg_ids": None},
    )
    records = list(read_records(path))
    assert records[0] == Record(
        "q1", ("p1", "p2"), ("n1",), content_id("q1"), (content_id("p1"), content_id("p2")), (content_id("n1"),)
    )
    assert records[1] == Record("q2", ("p",), (), "7", ("d",), ())
    assert [record.query for record in records[2:]] == ["q3\u2028é", "q4"]
    assert records[2].neg == () and records[2].pos_ids == records[3].pos_ids == records[0].pos_ids[:0] + (
        content_id("p"),
    )
    assert content_id("p") == "148de9c5a7a44d19"


def test_mark_line_ends_and_gzip(tmp_path):
    text = b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n  \r\n" + json.dumps(GOOD).encode()
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
    plain, packed = list(read_records(tmp_path / "a.jsonl")), list(read_records(tmp_path / "a.jsonl.gz"))
    assert plain == packed and len(plain) == 2


def test_blank_negatives_are_dropped_with_their_ids(tmp_path, caplog):
    path = write(
        tmp_path / "a.jsonl", {"query": "q", "pos": ["p"], "neg": ["a", " ", "b"], "neg_ids": ["1", "2", "3"]}
    )
    tally = Tally()
    with caplog.at_level(logging.WARNING):
        (record,) = read_records(path, tally)
    assert record.neg == ("a", "b") and record.neg_ids == ("1", "3")
    assert tally == validate(path) == Tally(records=1, positives=1, negatives=2, blank_negatives=1)
    assert "1 blank negatives were left out" in caplog.text


@pytest.mark.parametrize(
    "line,column,reason",
    [
        ('{"query": "q", "pos": ["p"] "neg": []}', 29, "not JSON: Expecting ',' delimiter"),
        ('{"query": "q"', 14, "not JSON: Expecting ',' delimiter"),
        ("[" * 100_000, 1, "not usable JSON"),
        ("[1]", 1, "not a JSON object but a list"),
        ("3", 1, "not a JSON object but a number"),
        ("null", 1, "not a JSON object but null"),
        ({"pos": ["p"]}, 1, "query is missing"),
        ({"query": "q"}, 1, "pos is missing"),
        ({"query": None, "pos": ["p"]}, 11, "query is null"),
        ({"query": 3, "pos": ["p"]}, 11, "query must be a string, got a number"),
        ({"query": "  \n", "pos": ["p"]}, 11, "query is empty"),
        ({"query": 'the "pos": [', "pos": "p"}, 36, "pos must be a list of strings, got a string"),
        ({"query": "q", "pos": []}, 23, "pos is empty: a record needs at least one positive"),
        ({"query": "q", "pos": ["p", " "]}, 23, "pos[1] is blank"),
        ({"query": "q", "pos": ["p", None]}, 23, "pos[1] must be a string, got null"),
        ({"x": [{"neg": 1}], "query": "q", "pos": ["p"], "neg": [["n"]]}, 56, "neg[0] must be a string, got a list"),
        ({**GOOD, "neg": {}}, 37, "neg must be a list of strings, got an object"),
        ({**GOOD, "pos_ids": []}, 55, "pos_ids has 0 ids for the 1 texts of pos"),
        ({**GOOD, "neg_ids": ["a", "b"]}, 55, "neg_ids has 2 ids for the 1 texts of neg"),
        ({**GOOD, "neg_ids": [5]}, 55, "neg_ids[0] must be a string, got a number"),
        ({**GOOD, "neg_ids": [" "]}, 55, "neg_ids[0] is blank"),
        ({**GOOD, "query_id": True}, 56, "query_id must be a string, got true"),
        ({**GOOD, "pos": ["a\0b"]}, 23, "pos[0] holds a NUL character (U+0000) at character 2"),
        ({**GOOD, "query": "é\ud83d"}, 11, "query holds a lone surrogate (U+D83D) at character 2"),
    ],
)
def test_bad_lines(tmp_path, line, column, reason):
    message = fault(tmp_path / "a.jsonl", GOOD, "", line)
    assert message.startswith(f"{column}: {reason}"), message


def test_not_utf8_says_the_byte(tmp_path):
    good = json.dumps(GOOD)
    message = fault(tmp_path / "a.jsonl", good, b'{"query": "caf\xe9", "pos": ["p"]}')
    assert message == f"15: not UTF-8: byte {len(good) + 1 + 14} of the file is 0xe9 (invalid continuation byte)"
    path = tmp_path / "b.jsonl"
    path.write_text(json.dumps(GOOD), encoding="utf-16")
    with pytest.raises(DataError, match=r"b.jsonl:1:1: not UTF-8: byte 0 of the file is 0xff"):
        validate(path)


def test_all_bad_lines_are_counted_and_ten_shown(tmp_path):
    lines = [GOOD, *[{"query": "q", "pos": []}, "{", GOOD] * 8]
    path = write(tmp_path / "a.jsonl", *lines)
    records = []
    with pytest.raises(DataError) as caught:
        for record in read_records(path):
            records.append(record)
    head, *shown = str(caught.value).split("\n")
    assert head == f"{path} has 16 bad lines, the first 10:"
    assert len(shown) == 10 and shown[1].startswith(f"  {path}:3:2: not JSON") and shown[9].startswith(f"  {path}:15:")
    assert records == [], "nothing is handed on of a block with too many bad lines"


def test_allowed_bad_lines_are_left_out_and_said(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", GOOD, "{", {"query": "second", "pos": ["p"]}, {"query": 1, "pos": []})
    with caplog.at_level(logging.WARNING):
        found = list(read_records(path, max_bad_records=2))
    assert [record.query for record in found] == ["q", "second"]
    assert f"{path} has 2 bad lines, 2 allowed:\n  {path}:2:2: not JSON" in caplog.text
    with pytest.raises(DataError, match="a.jsonl has 2 bad lines, 1 allowed:"):
        list(read_records(path, max_bad_records=1))


def test_blocks_end_at_line_ends_and_keep_places(tmp_path, monkeypatch):
    rows = [{"query": f"query {i}", "pos": ["p" * i]} for i in range(1, 60)]
    path = write(tmp_path / "a.jsonl", *rows, b'{"query": "caf\xe9"}')
    whole = path.read_bytes()
    monkeypatch.setattr(files, "BLOCK_BYTES", 100)
    cut = list(files.blocks(path))
    assert len(cut) > 10 and b"".join(block.content for block in cut) == whole
    for block in cut:
        assert whole[: block.offset].count(b"\n") == block.first - 1
        assert whole[block.offset :].startswith(block.content)
    assert [record.query for record in read_records(path, max_bad_records=1)] == [row["query"] for row in rows]
    with pytest.raises(DataError, match=f"a.jsonl:60:15: not UTF-8: byte {len(whole) - 4} of the file is 0xe9"):
        validate(path)


def test_written_records_are_read(tmp_path):
    rows = [{"query": "é", "pos": ["p"], "neg": [], "pos_scores": [0.5]}, {"query": "q", "pos": ["p\u2028"]}]
    path = tmp_path / "new" / "a.jsonl"
    assert write_records(path, iter(rows)) == 2
    assert [record.pos for record in read_records(path)] == [("p",), ("p\u2028",)]

    def broken():
        yield rows[0]
        raise DataError("no more")

    with pytest.raises(DataError, match="no more"):
        write_records(path.with_name("b.jsonl"), broken())
    assert [one.name for one in path.parent.iterdir()] == ["a.jsonl"]


def test_files_that_cannot_be_read(tmp_path):
    cases = {
        "missing.jsonl": "no data file at",
        "missing.parquet": "no data file at",
        "folder.jsonl": "holds no data file",
        "empty.jsonl": "holds no records",
        "blank.jsonl": "holds no records",
        "a.txt": "a data file ends in .jsonl, .json, .csv",
        "broken.jsonl.gz": "cannot read",
        "short.jsonl.gz": "cannot read",
        "broken.parquet": "cannot read .* as Parquet",
    }
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n \n")
    (tmp_path / "a.txt").write_text("query\n")
    (tmp_path / "broken.jsonl.gz").write_text("no gzip")
    (tmp_path / "short.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode() * 50)[:-12])
    (tmp_path / "broken.parquet").write_text("no parquet")
    for name, reason in cases.items():
        with pytest.raises(DataError, match=reason) as caught:
            validate(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_parquet(tmp_path):
    rows = [
        {"query": "q1", "pos": ["p1"], "neg": ["n1", ""], "pos_ids": ["a"], "other": 1},
        {"query": "q2", "pos": ["p2", "p3"], "neg": None, "pos_ids": None, "other": 2},
    ]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    lines = write(tmp_path / "a.jsonl", *rows)
    assert list(read_records(path)) == list(read_records(lines))
    assert validate(path) == Tally(records=2, positives=3, negatives=1, blank_negatives=1)


def test_bad_parquet_rows(tmp_path):
    path = tmp_path / "a.parquet"
    data = pyarrow.py_buffer(b"ok\xff\xfe ")
    texts = pyarrow.StringArray.from_buffers(3, pyarrow.py_buffer(_int32(0, 2, 4, 5)), data)
    pyarrow.parquet.write_table(pyarrow.table({"pos": [["p"]] * 3, "query": texts}), path)
    with pytest.raises(DataError) as caught:
        validate(path)
    head, *shown = str(caught.value).split("\n")
    assert head == f"{path} has 2 bad lines:"
    assert shown == [
        f"  {path}:2:1: not UTF-8: byte 0 of a value (invalid start byte)",
        f"  {path}:3:2: query is empty",
    ]


def _int32(*numbers):
    return b"".join(number.to_bytes(4, "little") for number in numbers)


@pytest.fixture
def beir(tmp_path):
    (tmp_path / "qrels").mkdir()
    write(
        tmp_path / "corpus.jsonl",
        {"_id": "d1", "title": "Title", "text": "text one", "metadata": {}},
        {"_id": "d2", "title": "", "text": "text two"},
        {"_id": "d3", "text": "text three"},
        {"_id": "d4", "title": "", "text": " "},
    )
    write(tmp_path / "queries.jsonl", {"_id": "q1", "text": "one"}, {"_id": "q2", "text": "two"})
    write(tmp_path / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore", "q1\td1\t2", "q1\td3\t0")
    return tmp_path


def test_beir(beir):
    found = read_beir(beir)
    assert found.corpus == {"d1": "Title text one", "d2": "text two", "d3": "text three"}
    assert found.queries == {"q1": "one"}, "queries that are not judged are left out"
    assert found.qrels == {"q1": {"d1": 2, "d3": 0}}


def test_beir_judgements_of_unknown_documents(beir, caplog):
    write(beir / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore", "q1\td1\t1", "q2\td4\t1\r", "")
    assert read_beir(beir).qrels == {"q1": {"d1": 1}, "q2": {"d4": 1}}
    assert "1 of 2 judged documents are missing" in caplog.text
    write(beir / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore", "q1\tx\t1")
    with pytest.raises(DataError, match="none of the 1 documents"):
        read_beir(beir)


@pytest.mark.parametrize(
    "name,line,reason",
    [
        ("queries.jsonl", {"_id": "q1", "text": " "}, r"queries.jsonl:1:23: text is empty"),
        ("queries.jsonl", {"text": "x"}, r"queries.jsonl:1:1: _id is missing"),
        ("queries.jsonl", {"_id": 5, "text": "x"}, r"queries.jsonl:1:9: _id must be a string, got a number"),
        ("queries.jsonl", "{", r"queries.jsonl:1:2: not JSON"),
        ("queries.jsonl", "", "queries.jsonl holds no records"),
        ("corpus.jsonl", {"_id": "d", "title": "x"}, r"corpus.jsonl:1:1: text is missing"),
        ("corpus.jsonl", {"_id": "d", "title": 1, "text": "x"}, r"corpus.jsonl:1:23: title must be a string"),
        ("corpus.jsonl", '{"_id": "d", "text": "x"}\n{"_id": "d", "text": "y"}', r"jsonl:2:9: _id 'd' is used before"),
        ("qrels/test.tsv", "q1\td1\tx", r"test.tsv:1:7: the score must be a whole number, got 'x'"),
        ("qrels/test.tsv", "q9\td1\t1", r"test.tsv:1:1: query 'q9' is not in queries.jsonl"),
        ("qrels/test.tsv", "q1 d1 1", r"test.tsv:1:1: 1 columns"),
        ("qrels/test.tsv", "", "test.tsv holds no records"),
    ],
)
def test_bad_beir(beir, name, line, reason):
    write(beir / name, line)
    with pytest.raises(DataError, match=reason):
        read_beir(beir)


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
def test_missing_beir_files(beir, name):
    (beir / name).unlink()
    with pytest.raises(DataError, match=f"no data file at .*{name}"):
        read_beir(beir)
    with pytest.raises(DataError, match="no BEIR folder at .*nowhere"):
        read_beir(beir / "nowhere")
