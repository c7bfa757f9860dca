"""What `nvembed data decontaminate` refuses, word by word."""

import json

import pytest

from nvembed_mcore.cli import main


@pytest.mark.parametrize(
    ("options", "evaluation", "message"),
    [
        (
            ["--bm25-threshold", "0"],
            '{"text": "a"}',
            "the threshold of BM25 similarity must be above 0 and at most 1, got 0",
        ),
        ([], '{"text": "a b"}', "each of the 1 records of TMP/in.jsonl matches an evaluation text"),
        ([], '{"text": " "}', "TMP/test.jsonl holds no text"),
        (
            ["--fields", "a", "b"],
            '{"text": "a"}',
            "1 bad row in TMP/test.jsonl:\n"
            "  TMP/test.jsonl:1:1: none of the fields a, b (--fields names others) is there",
        ),
        (
            [],
            '{"text": 1}',
            "1 bad row in TMP/test.jsonl:\n  TMP/test.jsonl:1:10: text must be a string, got a number",
        ),
        (["--against", "TMP"], '{"text": "a"}', "no data file at TMP/queries.jsonl"),
        (["--against", "TMP/none.jsonl"], '{"text": "a"}', "no data file at TMP/none.jsonl"),
    ],
)
def test_refusals(tmp_path, capsys, options, evaluation, message):
    (tmp_path / "in.jsonl").write_text(json.dumps({"query": "a b", "pos": ["p"]}) + "\n")
    (tmp_path / "test.jsonl").write_text(evaluation + "\n")
    words = ["data", "decontaminate", "TMP/in.jsonl", "TMP/out.jsonl", "--against", "TMP/test.jsonl", *options]
    assert main([word.replace("TMP", str(tmp_path)) for word in words]) == 78
    assert capsys.readouterr().err.replace(str(tmp_path), "TMP") == f"nvembed: error: {message}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "test.jsonl"]
