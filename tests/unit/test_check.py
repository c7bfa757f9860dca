"""The check of data sets: planted faults are counted and found, as plain Python over texts finds them."""

from __future__ import annotations

import gzip
import json
import random
from io import StringIO

import pytest
from rich.console import Console

from nvembed_mcore.config import DatasetConfig
from nvembed_mcore.data import files
from nvembed_mcore.data.check import repeats
from nvembed_mcore.data.check.sets import check_sets
from nvembed_mcore.data.check.show import tables
from nvembed_mcore.data.tokenizer import load_tokenizer
from nvembed_mcore.data.tokens import TokenStore
from tests.helpers import check_reference as reference

PLANTED = [
    {"query": "cat", "pos": ["c1"], "neg": ["n1", " ", "n2"], "pos_ids": ["1"], "neg_ids": ["2", "x", "3"]},
    {
        "query": "dog",
        "pos": ["d1", "d2"],
        "neg": ["d2", "n1", "c1"],
        "pos_ids": ["4", "5"],
        "neg_ids": ["9", "2", "1"],
    },
    {"query": "cat", "pos": ["c1"], "pos_ids": ["1"]},
    "{broken",
    {"query": "cat", "pos": ["c2"], "neg": ["c1", "n3"], "pos_ids": ["6"], "neg_ids": ["1", "6"]},
    {"query": "owl", "pos": ["\ud800"]},
    {"query": "Owl  Bird", "pos": ["o1"], "neg": ["n9"], "pos_ids": ["7"], "neg_ids": ["3"]},
]


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def check(*paths, tokenizer=None, instruction="", limit=512, **options):
    sets = [DatasetConfig(path=str(path), instruction=instruction) for path in paths]
    return check_sets(sets, tokenizer=tokenizer, max_query_tokens=limit, max_document_tokens=limit, **options)


def found(report):
    """Kind -> count and the lines of each example, of one set."""
    return {
        warning.kind: (
            warning.count,
            [[int(place.rsplit(":")[-1]) for place in one.places] for one in warning.examples],
        )
        for warning in report.warnings
    }


def test_planted_faults_are_counted_and_found(tmp_path):
    report = check(write(tmp_path / "a.jsonl", PLANTED), max_bad_records=2)
    (one,) = report.sets
    assert one.counts == {
        "records": 5,
        "distinct_queries": 3,
        "positives": 6,
        "negatives": 8,
        "distinct_documents": 9,
        "records_without_negatives": 1,
        "bad_lines": 2,
    }
    assert found(one) == {
        "repeated_queries": (2, [[3, 1], [5, 1]]),
        "repeated_pairs": (1, [[3, 1]]),
        "own_positives": (2, [[2], [5]]),  # "d2" by its text, "n3" by its id
        "false_negatives": (1, [[5, 1]]),
        "several_ids": (1, [[2]]),  # "d2" is 5 and 9
        "several_texts": (2, [[5], [7, 1]]),  # 6 is "c2" and "n3", 3 is "n2" and "n9"
        "blank_negatives": (1, []),
        "bad_lines": (2, []),
    }
    assert [line.split(": ", 1)[0] for line in one.problems.shown] == [
        f"  {tmp_path}/a.jsonl:4:2",
        f"  {tmp_path}/a.jsonl:6:25",
    ]
    examples = {warning.kind: warning.examples for warning in one.warnings if warning.examples}
    assert examples["repeated_pairs"][0].texts == ["cat", "c1"]
    assert examples["several_ids"][0].texts == ["d2"] and examples["several_ids"][0].ids == ["5", "9"]
    assert examples["several_texts"][1].texts == ["n2", "n9"] and examples["several_texts"][1].ids == ["3"]
    assert not report.refusals


def random_rows(seed, size):
    """Few queries, texts and ids, so that everything stands twice somewhere; some rows name no ids."""
    chance = random.Random(seed)
    rows = []
    for _ in range(size):
        row = {"query": f"q{chance.randrange(1 + size // 5)}"}
        for name, most in (("pos", 2), ("neg", 4)):
            row[name] = [f"text {chance.randrange(1 + size // 5)}" for _ in range(chance.randint(name == "pos", most))]
            if chance.random() < 0.5:
                row[f"{name}_ids"] = [f"d{text[5:-1]}" if chance.random() < 0.2 else text for text in row[name]]
        rows.append(row)
    return rows


@pytest.mark.parametrize("part_rows", [10**6, 7])
@pytest.mark.parametrize("size", [1, 5, 60, 400])
def test_random_sets_as_plain_python_finds_them(tmp_path, monkeypatch, size, part_rows):
    monkeypatch.setattr(files, "BLOCK_BYTES", 700)
    monkeypatch.setattr(repeats, "PART_ROWS", part_rows)
    rows = random_rows(size, size)
    (one,) = check(write(tmp_path / "a.jsonl", rows), processes=1).sets
    assert one.counts == {**reference.counts(rows), "bad_lines": 0}
    expected = {
        kind: (len(places), [list(dict.fromkeys((a + 1, b + 1))) for a, b in places[: repeats.EXAMPLES]])
        for kind, places in reference.faults(rows).items()
    }
    assert found(one) == expected
    assert size < 60 or len(expected) == 6, "every fault is there"


def test_two_processes_say_the_same(tmp_path, monkeypatch, tokenizer_dir):
    monkeypatch.setattr(files, "BLOCK_BYTES", 3000)
    paths = [write(tmp_path / f"{name}.jsonl", random_rows(name, 100)) for name in ("one", "two")]
    paths += [write(tmp_path / "bad.jsonl", PLANTED)]
    options = dict(tokenizer=str(tokenizer_dir), instruction="Find it", against=paths[1:2])
    single, double = (check(*paths, processes=number, **options).as_dict() for number in (1, 2))
    assert single == double
    assert not single["may_start"] and len(single["refusals"]) == 1


def test_sets_together(tmp_path):
    one = [{"query": query, "pos": [f"{query} x"]} for query in ("a", "b", "c", "b")]
    two = [{"query": query, "pos": [f"{query} x"], "neg": ["y"]} for query in ("z", "c", "b", "b")]
    paths = [write(tmp_path / "1.jsonl", one), write(tmp_path / "2.jsonl", two)]
    report = check(*paths)
    (shared,) = report.together.warnings
    assert (shared.kind, shared.count) == ("shared_queries", 2)
    assert [example.places for example in shared.examples] == [
        [f"{paths[1]}:2", f"{paths[0]}:3"],
        [f"{paths[1]}:3", f"{paths[0]}:2"],
    ]
    assert [example.texts for example in shared.examples] == [["c"], ["b"]]
    assert report.together.counts == {**reference.counts(one + two), "bad_lines": 0}
    assert report.together.lengths["query"].counts == {1: 8}


def test_ids_that_clash_between_sets(tmp_path):
    one = [
        {"query": "a", "pos": ["x"], "pos_ids": ["1"], "neg": ["y"], "neg_ids": ["2"]},
        {"query": "b", "pos": ["x"]},
    ]
    two = [{"query": "c", "pos": ["x", "z"], "pos_ids": ["1", "2"]}, {"query": "d", "pos": ["v"], "pos_ids": ["3"]}]
    paths = [write(tmp_path / f"{number}.jsonl", rows) for number, rows in enumerate([one, two, [one[1]]])]
    (clash,) = check(*paths[:2]).together.warnings
    assert (clash.kind, clash.count) == ("clashing_ids", 1)
    (shown,) = clash.examples
    assert (shown.places, shown.texts, shown.ids) == ([f"{paths[1]}:1", f"{paths[0]}:1"], ["z", "y"], ["2"])
    assert not check(*paths[1:]).together.warnings, "texts without ids clash with none"


def test_examples_hold_no_commands_for_a_terminal(tmp_path):
    text = "red\x1b[31m \u200d\x9b2J\n end"
    path = write(tmp_path / "a.jsonl", [{"query": text, "pos": ["p"]}, {"query": text, "pos": ["q"]}])
    (warning,) = check(path).sets[0].warnings
    assert warning.examples[0].texts == ["red\ufffd[31m \u200d\ufffd2J end"]


def test_names_in_tables(tmp_path):
    (tmp_path / "more").mkdir()
    paths = [write(tmp_path / name, [{"query": "a", "pos": ["b"]}]) for name in ("[b]x.jsonl", "more/x.jsonl")]
    console = Console(file=StringIO(), width=100)
    console.print(next(iter(tables(check(*paths)))))
    lines = console.file.getvalue().splitlines()
    assert [line.split()[1] for line in lines[4:7]] == ["[b]x.jsonl", "more/x.jsonl", "all"]


@pytest.mark.parametrize("instruction", ["", "Find the text"])
def test_lengths_are_those_of_the_token_store(tmp_path, tokenizer_dir, instruction):
    chance = random.Random(5)
    texts = iter(
        [" ".join(chance.choices(["cat", "owl!", "Größe", "x_y"], k=chance.randint(1, 30))) for _ in range(99)]
    )
    rows = [{"query": next(texts), "pos": [next(texts)], "neg": [next(texts)]} for _ in range(33)]
    for row, own in zip(rows, ["Find an animal of that name and of no other", "", None, "Name it"] * 5, strict=False):
        row["instruction"] = own
    path = write(tmp_path / "a.jsonl", rows)
    (one,) = check(path, tokenizer=str(tokenizer_dir), instruction=instruction, limit=40).sets
    store = TokenStore.build(
        DatasetConfig(path=path, instruction=instruction),
        load_tokenizer(tokenizer_dir),
        max_query_tokens=40,
        max_document_tokens=40,
        cache_dir=tmp_path / "cache",
    )
    cut = {
        name: sorted(min(length, 40) for length in lengths.counts.elements()) for name, lengths in one.lengths.items()
    }
    assert cut["query"] == sorted(store.query_lengths().tolist())
    assert sorted(cut["pos"] + cut["neg"]) == sorted(store.document_lengths().tolist())
    assert one.lengths["query"].cut == store.statistics.truncated_queries > 0
    assert one.lengths["pos"].cut + one.lengths["neg"].cut == store.statistics.truncated_documents > 0
    lengths = sorted(one.lengths["query"].counts.elements())
    summary = one.lengths["query"].summary()
    assert summary["mean"] == pytest.approx(sum(lengths) / 33) and summary["max"] == lengths[-1] > 40
    assert (summary["median"], summary["p95"]) == (lengths[16], lengths[31])  # 17 and 32 of 33 are not longer


@pytest.fixture
def beir(tmp_path):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    write(folder / "corpus.jsonl", [{"_id": "1", "title": "Big", "text": "Cats purr"}, {"_id": "2", "text": "none"}])
    write(folder / "queries.jsonl", [{"_id": "t", "text": "a  QUERY"}, {"_id": "u", "text": "not judged"}])
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nt\t1\t1\n")
    return folder


def test_leaks_from_a_beir_folder(tmp_path, beir):
    path = write(
        tmp_path / "a.jsonl",
        [
            {"query": "not judged", "pos": ["x", "big cats  PURR"]},
            {"query": "A query", "pos": ["y"], "neg": ["cats purr", "big cats purr"]},
            {"query": "a query ", "pos": ["none of it"]},
        ],
    )
    queries, documents = [one for one in check(path, against=[str(beir)]).warnings if one.kind.startswith("leaked")]
    assert (queries.kind, queries.count, queries.of) == ("leaked_queries", 1, 1)
    assert queries.what == f"queries of {beir}, in 2 records"
    assert [one.places for one in queries.examples] == [[f"{path}:{n}", f"{beir}/queries.jsonl:1"] for n in (2, 3)]
    assert (documents.count, documents.of) == (2, 3)  # with its title and without
    assert documents.what == f"documents of {beir}, in 2 records"
    assert [one.texts for one in documents.examples] == [["big cats PURR"], ["cats purr"], ["big cats purr"]]
    (beir / "qrels" / "test.tsv").unlink()
    queries, _ = [one for one in check(path, against=[str(beir)]).warnings if one.kind.startswith("leaked")]
    assert (queries.count, queries.of) == (2, 2)


def test_leaks_from_records_and_without_any(tmp_path):
    test = write(tmp_path / "test.jsonl", [{"query": "Q", "pos": ["P"], "neg": ["N", "N"]}])
    path = write(tmp_path / "a.jsonl", [{"query": "p", "pos": ["q"], "neg": ["n"]}])
    (only,) = check(path, against=[test]).warnings
    assert (only.kind, only.count, only.of) == ("leaked_documents", 1, 2)
    assert only.examples[0].places == [f"{path}:1", f"{test}:1"] and only.examples[0].texts == ["n"]
    assert not check(write(tmp_path / "b.jsonl", [{"query": "p", "pos": ["q"]}]), against=[test]).warnings


def test_packed_files_and_sets_that_cannot_be_read_on(tmp_path):
    rows = random_rows(1, 50)
    write(tmp_path / "a.jsonl", rows)
    packed = gzip.compress((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    (tmp_path / "b.jsonl.gz").write_bytes(packed[:-20])
    report = check(tmp_path / "b.jsonl.gz", tmp_path / "none.jsonl", tmp_path / "a.jsonl.gz", tmp_path / "a.jsonl")
    assert [bool(one.refusal) for one in report.sets] == [True, True, False, False]
    assert found(report.sets[2]) == found(report.sets[3]) and report.sets[2].counts == report.sets[3].counts
