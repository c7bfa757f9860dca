"""Classification and clustering sets become records, by label and by example."""

import gzip
import json
import lzma
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from nvembed_mcore.cli import main
from nvembed_mcore.data.convert import convert
from nvembed_mcore.data.records import content_id, read_records


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def converted(tmp_path, layout, rows, **options):
    """Counts and rows of a conversion of one JSONL file; the records must be readable as such."""
    source, output = jsonl(tmp_path / "source.jsonl", rows), tmp_path / "out.jsonl"
    counts = convert(layout, [source], output, overwrite=True, **options)
    assert len(list(read_records(output))) == counts.records
    return counts, [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


COLOURS = [
    {"text": " The sky ", "label": 0, "label_text": "blue"},
    {"text": "The grass", "label": 1, "label_text": "green"},
    {"text": "The sea", "label": 0, "label_text": "blue"},
    {"text": "A rose", "label": 2, "label_text": "red"},
]


def test_classification_by_label(tmp_path):
    counts, rows = converted(tmp_path, "classification", COLOURS, by="label")
    assert rows[0] == {
        "query": "The sky",
        "pos": ["blue"],
        "neg": ["green", "red"],
        "query_id": content_id("The sky"),
        "pos_ids": [content_id("blue")],
        "neg_ids": [content_id("green"), content_id("red")],
    }
    assert [(row["query"], row["pos"], row["neg"]) for row in rows[1:]] == [
        ("The grass", ["green"], ["blue", "red"]),
        ("The sea", ["blue"], ["green", "red"]),
        ("A rose", ["red"], ["blue", "green"]),
    ]
    assert (counts.rows, counts.records, counts.positives, counts.negatives) == (4, 4, 4, 8)
    assert not counts.left_out and not counts.notes


def test_label_texts_of_a_file_and_fewer_negatives(tmp_path):
    texts = tmp_path / "labels.json"
    texts.write_text(json.dumps({"0": "It is blue.", "1": "It is green.", "2": "It is red."}))
    _, rows = converted(tmp_path, "classification", COLOURS, by="label", labels=texts, negatives=1)
    assert [row["pos"] for row in rows] == [["It is blue."], ["It is green."], ["It is blue."], ["It is red."]]
    assert all(len(row["neg"]) == 1 and row["neg"] != row["pos"] for row in rows)


def test_string_labels_are_their_own_texts(tmp_path):
    rows = [{"utterance": "wake me", "intent": "set alarm"}, {"utterance": "call Ann", "intent": "call"}]
    _, rows = converted(tmp_path, "classification", rows, by="label", text_field="utterance", label_field="intent")
    assert [(row["pos"], row["neg"]) for row in rows] == [(["set alarm"], ["call"]), (["call"], ["set alarm"])]


def test_by_example_draws_from_the_class_and_from_outside(tmp_path):
    texts = {f"{name} {number}": name for name in "abc" for number in range(20)}
    source = [{"text": text, "label": label} for text, label in texts.items()]
    _, rows = converted(tmp_path, "classification", source, by="example")
    assert [row["query"] for row in rows] == list(texts)
    drawn = Counter()
    for row in rows:
        (positive,) = row["pos"]
        assert texts[positive] == texts[row["query"]] and positive != row["query"]
        assert len(set(row["neg"])) == 7 and all(texts[one] != texts[row["query"]] for one in row["neg"])
        drawn.update(row["neg"])
    # 60 records draw 7 of 40 texts: each text is drawn 7 times in the mean of all, with a deviation of about 2.4.
    assert len(drawn) == 60 and max(drawn.values()) < 20
    again = converted(tmp_path, "classification", source, by="example")[1]
    other = converted(tmp_path, "classification", source, by="example", seed=1)[1]
    assert again == rows != other


def test_a_text_under_two_classes_belongs_to_both(tmp_path):
    source = [("x", 0), ("a0", 0), ("a1", 0), ("x", 1), ("b0", 1), ("b1", 1), ("c0", 2), ("c1", 2), ("a0", 0)]
    source = [{"text": text, "label": label, "label_text": "ABC"[label]} for text, label in source]
    counts, rows = converted(tmp_path, "classification", source, by="example", negatives=9)
    found = {row["query"]: (row["pos"][0], set(row["neg"])) for row in rows}
    assert found["x"][0] in ("a0", "a1", "b0", "b1") and found["x"][1] == {"c0", "c1"}
    assert found["a0"][0] in ("x", "a1") and found["a0"][1] == {"b0", "b1", "c0", "c1"}
    assert found["c0"] == ("c1", {"x", "a0", "a1", "b0", "b1"})
    assert counts.left_out == {"the text stands earlier in the set": 2} and counts.notes == {
        "texts of several classes": 1
    }
    counts, rows = converted(tmp_path, "classification", source, by="label")
    assert (rows[0]["query"], rows[0]["pos"], rows[0]["neg"]) == ("x", ["A", "B"], ["C"])


def test_a_class_of_one_text_is_only_a_negative(tmp_path):
    source = [{"text": text, "label": text[0]} for text in ("a0", "a1", "b0")] + [{"text": "  ", "label": "a"}]
    counts, rows = converted(tmp_path, "classification", source, by="example")
    assert [(row["query"], row["pos"], row["neg"]) for row in rows] == [("a0", ["a1"], ["b0"]), ("a1", ["a0"], ["b0"])]
    assert counts.left_out == {"no other text of its class": 1, "the text is blank": 1} and counts.rows == 4


def test_clustering_of_lists_and_of_rows_agree(tmp_path):
    lists = [{"sentences": ["a b", "c d"], "labels": ["1x", "2x"]}, {"sentences": ["e f"], "labels": ["1x"]}]
    plain = [
        {"title": "a", "abstract": "b", "category": "1x"},
        {"title": "c", "abstract": "d", "category": "2x"},
        {"title": "e", "abstract": "f ", "category": "1x"},
    ]
    for by in ("label", "example"):
        _, of_lists = converted(tmp_path, "clustering", lists, by=by)
        _, of_rows = converted(
            tmp_path, "clustering", plain, by=by, fields=["title", "abstract"], label_field="category"
        )
        assert of_lists == of_rows
        assert of_rows[0]["query"] == "a b" and of_rows[0]["pos"] == (["1x"] if by == "label" else ["e f"])
        assert of_rows[0]["neg"] == (["2x"] if by == "label" else ["c d"])
    _, titles = converted(tmp_path, "clustering", plain, by="label", fields=["title"], label_field="category")
    assert [row["query"] for row in titles] == ["a", "c", "e"]


def test_several_labels_of_a_text(tmp_path):
    source = [("q", "cs.CL cs.AI"), ("r", "cs.AI math"), ("s", "math"), ("t", "q-bio")]
    source = [{"title": title, "categories": labels} for title, labels in source]
    options = dict(fields=["title"], label_field="categories", label_separator=" ")
    _, rows = converted(tmp_path, "clustering", source, by="example", **options)
    assert [(row["query"], row["pos"][0], sorted(row["neg"])) for row in rows] == [
        ("q", "r", ["s", "t"]),
        ("r", rows[1]["pos"][0], ["t"]),
        ("s", "r", ["q", "t"]),
    ]
    _, rows = converted(tmp_path, "clustering", source, by="label", **options)
    assert rows[1]["pos"] == ["cs.AI", "math"] and rows[1]["neg"] == ["cs.CL", "q-bio"]


def test_sample(tmp_path):
    source = [{"text": f"text {number}", "label": number % 2, "label_text": "ab"[number % 2]} for number in range(40)]
    everything = converted(tmp_path, "classification", source, by="label")[1]
    drawn = Counter()
    for seed in range(200):
        counts, rows = converted(tmp_path, "classification", source, by="label", sample=10, seed=seed)
        assert len(rows) == 10 and [row for row in everything if row in rows] == rows
        drawn.update(row["query"] for row in rows)
    assert counts.records == 10 and counts.notes == {"records that were not drawn": 30}
    # Each of 40 is drawn 50 times of 200 in the mean, with a deviation of 6.1.
    assert len(drawn) == 40 and all(25 < number < 75 for number in drawn.values())
    assert converted(tmp_path, "classification", source, by="label", sample=99)[1] == everything


@pytest.mark.parametrize("name", ["a.json", "a.json.xz", "a.parquet", "a.csv", "a.tsv.gz", "a.jsonl.zst"])
def test_other_formats(tmp_path, name):
    expected = converted(tmp_path, "classification", COLOURS, by="label")[1]
    table = {
        ".csv": 'text,label,label_text\n" The sky ",0,blue\nThe grass,1,green\nThe sea,0,"blue"\nA rose,2,red\n',
        ".tsv": "label\ttext\tlabel_text\n0\tThe sky\tblue\n1\tThe grass\tgreen\n0\tThe sea\tblue\n2\tA rose\tred\n",
        ".json": json.dumps(COLOURS, indent=1),
        ".jsonl": "".join(json.dumps(row) + "\n" for row in COLOURS),
    }
    source = tmp_path / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(COLOURS), source)
    else:
        content = table[f".{name.split('.')[1]}"].encode()
        packed = {
            ".gz": gzip.compress,
            ".xz": lzma.compress,
            ".zst": lambda raw: pyarrow.compress(raw, "zstd", asbytes=True),
        }
        source.write_bytes(packed.get(source.suffix, bytes)(content))
    convert("classification", [source], tmp_path / "other.jsonl", by="label")
    assert [json.loads(line) for line in (tmp_path / "other.jsonl").read_text().splitlines()] == expected


def test_command_line(tmp_path, capsys):
    halves = [jsonl(tmp_path / "1.jsonl", COLOURS[:2]), jsonl(tmp_path / "2.jsonl", COLOURS[2:])]
    output = tmp_path / "out.jsonl"
    counts = tmp_path / "counts.json"
    words = ["data", "convert", "classification", *map(str, halves), str(output), "--by", "example"]
    assert main([*words, "--json", str(counts)]) == 0
    assert [record.query for record in read_records(output)] == ["The sky", "The sea"]
    assert "left out: no other text of its class" in capsys.readouterr().out
    assert json.loads(counts.read_text()) == {
        "rows read": 4,
        "records written": 2,
        "positives": 2,
        "negatives": 4,
        "records without negatives": 0,
        "bad rows": 0,
        "left out: no other text of its class": 2,
    }
