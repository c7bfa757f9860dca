"""What a path may be: every format and compression, folders, BEIR's and Tevatron's corpora, `datasets`."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import random
import shutil

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from nvembed_mcore.data import files
from nvembed_mcore.data.records import DataError, parse_block, read_records
from nvembed_mcore.data.sources import blocks, source_fingerprint
from nvembed_mcore.data.workers import ordered_map

ROWS = [
    {"query": "first", "pos": ["p1", "p, 2"], "neg": ["n"], "query_id": "a"},
    {"query": 'a "quoted" q', "pos": ["line\nend"], "neg": None, "query_id": None},
    {"query": "é, \u2028", "pos": ['["not a list']},
    {"query": "last", "pos": ["p"], "neg": ["n1", "n2"]},
]
PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
PACKERS["zst"] = lambda content: pyarrow.compress(content, codec="zstd", asbytes=True)


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows, write_row, names=("query", "pos", "neg", "query_id")):
    """The bytes of a table whose lists are JSON."""
    text = io.StringIO(newline="")
    write = write_row(text)
    write(names)
    for row in rows:
        cells = [row.get(name) for name in names]
        write([json.dumps(cell) if isinstance(cell, list) else cell or "" for cell in cells])
    return text.getvalue().encode()


def commas(text):
    return csv.writer(text).writerow


def tabs(text):
    return lambda cells: text.write("\t".join(cells) + "\n")


FORMATS = {
    "jsonl": lines(*ROWS),
    "json": b"\xef\xbb\xbf" + lines(*ROWS).replace(b"\n", b"\r\n\r\n"),
    "csv": b"\xef\xbb\xbf" + table(ROWS, commas),
    "tsv": table(ROWS, tabs),
}


@pytest.mark.parametrize("ending", ["", *PACKERS])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_and_compression_is_the_same_records(tmp_path, name, ending):
    expected = list(read_records(write(tmp_path / "plain.jsonl", lines(*ROWS))))
    assert [record.pos for record in expected[1:3]] == [("line\nend",), ('["not a list',)]
    content = FORMATS[name]
    path = tmp_path / ".".join(filter(None, ("a", name, ending)))
    write(path, PACKERS[ending](content) if ending else content)
    assert list(read_records(path)) == expected


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def parsed(path):
    """All records, their lines, and the bad lines of a data set."""
    found = [parse_block(block) for block in blocks(path)]
    return [[one for part in found for one in getattr(part, name)] for name in ("records", "lines", "problems")]


BAD = {
    "jsonl": [b'{"query": "caf\xe9"}', b"", b"{", b'{"query": "q", "pos": []}', b'["q", "p"]'],
    "csv": [b"q\xe9,p,,", b"only one", b'"q" x,p,,', b"", b'"two\nlines",[,,', b",p,,", b"q\0,p,,", b'q "x,p,,\r'],
    "tsv": [b"q\xe9\tp\t\t", b"only one", b"", b"\tp\t\t", b'"q\tp\t\t\r', b"q\t[]\t\t"],
}


def broken_rows(name):
    """Good rows of a format with bad ones between."""
    head = FORMATS[name].splitlines(keepends=True)
    rows = head + (head if name == "jsonl" else head[1:]) * 2
    return b"".join(row + BAD[name][index % len(BAD[name])] + b"\n" for index, row in enumerate(rows))


@pytest.mark.parametrize("name", ["jsonl", "csv", "tsv"])
def test_blocks_of_any_size_hold_the_same(tmp_path, monkeypatch, name):
    path = write(tmp_path / f"a.{name}", broken_rows(name))
    whole = parsed(path)
    assert all(len(part) > 3 for part in whole)
    for size in [*range(1, 40), 64, 100, 1000]:
        monkeypatch.setattr(files, "BLOCK_BYTES", size)
        assert parsed(path) == whole
        if size < 40:
            assert len(list(blocks(path))) > 5


def test_the_first_row_with_a_layout_says_the_layout(tmp_path, monkeypatch):
    rows = [{"query": "q"}, {"text": 1}, {"anchor": "q", "positive": "p"}, {"query": "q", "pos": ["p"]}]
    path = write(tmp_path / "a.jsonl", b"{\n" + lines(*rows))
    whole = parsed(path)
    assert whole[1] == [4] and [line for line, _, _ in whole[2]] == [1, 2, 3, 5]
    assert whole[2][1] == (2, 1, "anchor is missing")
    monkeypatch.setattr(files, "BLOCK_BYTES", 1)
    assert parsed(path) == whole
    write(path, lines(*[{"query": "q"}] * 10, rows[2]))
    with pytest.raises(DataError, match="a.jsonl:1:1: the fields are query; a layout"):
        list(read_records(path, max_bad_records=10))


def test_csv_is_what_the_csv_module_reads(tmp_path, monkeypatch):
    """Random tables, cut into blocks of any size."""
    chance = random.Random(5)
    for _ in range(30):
        texts = [
            "".join(chance.choices(['"', ",", "\n", "\r\n", "a", "é", " x"], k=chance.randint(1, 9)))
            for _ in range(30)
        ]
        rows = [[f"q{text}", f"p{text}", other] for text, other in zip(texts, reversed(texts), strict=True)]
        text = io.StringIO(newline="")
        quoting = chance.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
        writer = csv.writer(text, lineterminator=chance.choice(["\n", "\r\n"]), quoting=quoting)
        writer.writerows([["anchor", "positive", "x"], *rows])
        path = write(tmp_path / "a.csv", text.getvalue().encode())
        monkeypatch.setattr(files, "BLOCK_BYTES", chance.choice([1, 7, 50, 1 << 20]))
        reader = csv.reader(io.StringIO(text.getvalue(), newline=""))
        expected = [(row, reader.line_num) for row in reader]
        starts = [1, *(line + 1 for _, line in expected[:-1])]
        found, numbers, problems = parsed(path)
        assert not problems
        assert [(one.query, *one.pos) for one in found] == [tuple(row[:2]) for row, _ in expected[1:]]
        assert numbers == starts[1:]


def test_large_rows_of_parquet_make_small_blocks(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    rows = [{"query": f"q{i}", "pos": ["p" * 100]} for i in range(50)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=20)
    whole = parsed(path)
    assert whole[1] == list(range(1, 51)) and [one.query for one in whole[0]] == [row["query"] for row in rows]
    monkeypatch.setattr(files, "BLOCK_BYTES", 500)
    assert parsed(path) == whole and len(list(blocks(path))) > 10


def test_a_large_row_group_is_not_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_ROWS", 256)
    rng = random.Random(0)
    texts = [f"{rng.getrandbits(4000):x}" for _ in range(20_000)]
    table = pyarrow.table({"query": texts, "pos": [[text] for text in texts]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=len(texts), compression="none")
    size = table.nbytes
    del table
    pool = pyarrow.default_memory_pool()
    before = pool.bytes_allocated()
    taken = [pool.bytes_allocated() - before for _ in blocks(tmp_path / "a.parquet")]
    assert len(taken) == 79 and max(taken) < size / 3


def test_a_folder_is_one_data_set(tmp_path):
    folder = tmp_path / "set"
    write(folder / "part-1.jsonl.gz", gzip.compress(lines(*ROWS[1:2])))
    write(folder / "part-0.jsonl", lines(ROWS[0], {"query": "q", "pos": []}))
    write(folder / "part-2.jsonl", lines(*ROWS[2:]) + b"{\n")
    for ignored in (".hidden.jsonl", "README.md"):
        write(folder / ignored, b"no data")
    found = list(read_records(folder, max_bad_records=2))
    assert found == list(read_records(write(tmp_path / "all.jsonl", lines(*ROWS))))
    with pytest.raises(DataError) as caught:
        list(read_records(folder))
    assert str(caught.value) == (
        f"{folder} has 2 bad lines:\n"
        f"  {folder}/part-0.jsonl:2:23: pos is empty: a record needs at least one positive\n"
        f"  {folder}/part-2.jsonl:3:2: not JSON: Expecting property name enclosed in double quotes"
    )
    write(folder / "part-3.jsonl", lines({"anchor": "q", "positive": "p"}))
    with pytest.raises(DataError, match=r"part-3.jsonl:1:1: another layout than that of the first row \(query, pos\)"):
        list(read_records(folder, max_bad_records=2))


CORPUS = [
    {"_id": "d1", "title": "T", "text": "one"},
    {"_id": "d2", "title": "", "text": "two"},
    {"_id": "d3", "text": " "},
    {"_id": "d4", "text": "never judged", "title": None},
]
QUERIES = [{"_id": f"q{i}", "text": f"query {i}"} for i in range(1, 7)]
QRELS = "query-id\tcorpus-id\tscore\nq5\td2\t1\nq2\td1\t2\nq2\td2\t0\nq6\td3\t1\nq4\tgone\t1\nq4\td1\t1\n"


@pytest.fixture
def beir(tmp_path):
    write(tmp_path / "beir" / "corpus.jsonl.gz", gzip.compress(lines(*CORPUS)))
    write(tmp_path / "beir" / "queries.jsonl", lines(*QUERIES))
    write(tmp_path / "beir" / "qrels" / "train.tsv", QRELS.encode())
    return tmp_path / "beir"


def test_beir(beir, caplog, monkeypatch):
    found, numbers, problems = parsed(beir)
    assert not problems and numbers == [2, 4, 5], "lines of queries.jsonl"
    assert [(one.query_id, one.query, one.pos, one.pos_ids, one.neg, one.neg_ids) for one in found] == [
        ("q2", "query 2", ("T one",), ("d1",), ("two",), ("d2",)),
        ("q4", "query 4", ("T one",), ("d1",), (), ()),
        ("q5", "query 5", ("two",), ("d2",), (), ()),
    ]
    assert "2 of 6 judged documents are missing or have no text" in caplog.text
    assert "1 of 4 judged queries have no positive and are left out" in caplog.text
    monkeypatch.setattr(files, "BLOCK_BYTES", 1)
    assert parsed(beir) == [found, numbers, problems] and len(list(blocks(beir))) == 3


TEVATRON = [
    {"query_id": "q1", "query_text": "a", "positive_document_ids": ["d1"], "negative_document_ids": ["d2", "d1"]},
    {"query_id": "q2", "query_text": "b", "positive_document_ids": ["d2"], "query_image": None},
    {"query_id": "q3", "query_text": "c", "positive_document_ids": ["d9"]},
]


@pytest.mark.parametrize("named", ["file", "folder"])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_tevatron_beside_a_corpus(tmp_path, named, ending, monkeypatch):
    corpus = [{"docid": row["_id"], **row} for row in CORPUS]
    for name, rows in {"train": TEVATRON, "corpus": corpus}.items():
        if ending == "jsonl":
            write(tmp_path / f"{name}.jsonl", lines(*rows))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    path = tmp_path if named == "folder" else tmp_path / f"train.{ending}"
    monkeypatch.setattr(files, "BLOCK_BYTES", 100)
    found, numbers, problems = parsed(path)
    assert [(one.query_id, one.query, one.pos, one.pos_ids, one.neg, one.neg_ids) for one in found] == [
        ("q1", "a", ("T one",), ("d1",), ("two", "T one"), ("d2", "d1")),
        ("q2", "b", ("two",), ("d2",), (), ()),
    ]
    assert numbers == [1, 2]
    column = 3 if ending == "parquet" else 64
    assert problems == [(3, column, "positive_document_ids[0] = 'd9' is not in the corpus")]
    assert {one for block in blocks(path) for one in block.documents} == {"d1", "d2"}, "documents that rows name"


def test_other_processes_need_the_block_alone(tmp_path, monkeypatch):
    corpus = [{"docid": one["_id"], **one} for one in CORPUS]
    write(tmp_path / "train.csv", table(TEVATRON[:2] * 20, commas, list(TEVATRON[0])))
    write(tmp_path / "corpus.csv", table(corpus, commas, ["docid", "title", "text"]))
    monkeypatch.setattr(files, "BLOCK_BYTES", 300)
    found = [record for part in ordered_map(parse_block, blocks(tmp_path), processes=2) for record in part.records]
    assert found == list(read_records(tmp_path)) and len(found) == 40 and len(list(blocks(tmp_path))) > 3


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def test_what_datasets_loads(tmp_path, cache):
    """Folders that it saved, of one split or of several, and a local folder of data files by `hf:`."""
    expected = list(read_records(write(tmp_path / "a.jsonl", lines(*ROWS))))
    plain = datasets.Dataset.from_list([{"x": 0, "query_id": None, "neg": None, **row} for row in ROWS])
    plain.save_to_disk(tmp_path / "one")
    splits = datasets.DatasetDict(train=plain, test=plain.select([0]))
    splits.save_to_disk(tmp_path / "two")
    assert list(read_records(tmp_path / "one")) == list(read_records(str(tmp_path / "two"))) == expected
    reversed_rows = plain.select([3, 2, 1, 0])
    reversed_rows.save_to_disk(tmp_path / "three")
    assert [record.query for record in read_records(tmp_path / "three")] == [one.query for one in expected[::-1]]
    for name, rows in {"train": ROWS, "test": ROWS[:1]}.items():
        write(tmp_path / "folder" / f"{name}.jsonl", lines(*rows))
    assert list(read_records(f"hf:{tmp_path}/folder")) == expected
    assert list(read_records(f"hf:{tmp_path}/folder:default:train")) == expected
    assert list(read_records(f"hf:{tmp_path}/folder::test")) == expected[:1]


def test_bad_rows_of_what_datasets_loads(tmp_path, cache):
    rows = datasets.Dataset.from_dict({"x": [1, 2], "anchor": ["q", " "], "positive": ["p", "p"]})
    rows.save_to_disk(tmp_path / "one")
    with pytest.raises(DataError) as caught:
        list(read_records(tmp_path / "one"))
    assert str(caught.value) == f"{tmp_path}/one has 1 bad line:\n  {tmp_path}/one:2:2: query is empty (of anchor)"


def test_fingerprints(tmp_path, beir, cache):
    """They follow what is read, not where it lies."""
    file = write(tmp_path / "a.jsonl", lines(*ROWS))
    assert source_fingerprint(file) == hashlib.sha256(lines(*ROWS)).hexdigest()
    write(tmp_path / "shards" / "0.jsonl", lines(*ROWS[:2]))
    write(tmp_path / "shards" / "1.jsonl", lines(*ROWS[2:]))
    write(tmp_path / "tevatron" / "train.jsonl", lines(*TEVATRON))
    write(tmp_path / "tevatron" / "corpus.jsonl", lines({"docid": "d1", "text": "x"}))
    datasets.Dataset.from_list(ROWS[:1]).save_to_disk(tmp_path / "saved")
    sources = {
        "a.jsonl": "a.jsonl",
        "shards": "shards/1.jsonl",
        "beir": "beir/qrels/train.tsv",
        "tevatron": "tevatron/corpus.jsonl",
        "tevatron/train.jsonl": "tevatron/corpus.jsonl",
    }
    before = {name: source_fingerprint(tmp_path / name) for name in (*sources, "saved")}
    assert len(set(before.values())) == len(before) - 1, "a folder with one file and a corpus is that file's"
    shutil.copytree(tmp_path, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("cache", "elsewhere"))
    write(tmp_path / "elsewhere" / "shards" / "notes.txt", b"not read")
    assert {name: source_fingerprint(tmp_path / "elsewhere" / name) for name in before} == before
    for name, changed in sources.items():
        path = tmp_path / changed
        path.write_bytes(path.read_bytes() + b"\n")
        assert source_fingerprint(tmp_path / name) != before[name]
    (tmp_path / "shards" / "1.jsonl").rename(tmp_path / "shards" / "2.jsonl")
    assert source_fingerprint(tmp_path / "shards") != before["shards"]
    datasets.Dataset.from_list(ROWS[1:2]).save_to_disk(tmp_path / "changed")
    assert source_fingerprint(tmp_path / "changed") != before["saved"]
    for copy in ("here", "there"):
        write(tmp_path / copy / "train.jsonl", lines(*ROWS))
    assert source_fingerprint(f"hf:{tmp_path}/here") == source_fingerprint(f"hf:{tmp_path}/there")


def test_fingerprints_of_what_datasets_may_keep_in_memory(tmp_path, cache, monkeypatch):
    """Sets in memory have no files to hash, so they are not kept there."""
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 1 << 30)
    for number in range(2):
        datasets.Dataset.from_list(ROWS[number : number + 1]).save_to_disk(tmp_path / f"saved{number}")
        write(tmp_path / f"folder{number}" / "train.jsonl", lines(*ROWS[number : number + 1]))
    for name in (f"{tmp_path}/saved", f"hf:{tmp_path}/folder"):
        assert source_fingerprint(f"{name}0") != source_fingerprint(f"{name}1")
