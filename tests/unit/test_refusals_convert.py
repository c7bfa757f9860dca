"""What conversions and their neighbours refuse, word by word."""

import json

import pytest

from nvembed_mcore.cli import main

Q = "What is rice?"
SQUAD = {"title": "Rice", "context": "A grain.", "question": Q, "answers": {"text": ["grain"]}}
HOTPOT = {"question": Q, "supporting_facts": [["A", 0]], "context": [["A", ["a."]]]}
PAIR = {"sentence1": "a", "sentence2": "b", "score": 5}
NLI = {"premise": "a", "hypothesis": "b", "label": 0}


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def one_bad(place, reason):
    return f"1 bad row in TMP/{place.split(':')[0].split('[')[0]}:\n  TMP/{place}: {reason}"


CASES = {
    # layout, options, name of the source, its content, the message
    "text missing": (
        *("classification", ["--by", "label"], "a.jsonl", lines({"label": "x"}, {"text": "t", "label": "y"})),
        one_bad("a.jsonl:1:1", "text is missing"),
    ),
    "text null": (
        *("classification", ["--by", "label"], "a.jsonl", lines({"label": "x", "text": None})),
        one_bad("a.jsonl:1:24", "text is null"),
    ),
    "text is a number": (
        *("classification", ["--by", "label"], "a.jsonl", lines({"label": "x", "text": 3})),
        one_bad("a.jsonl:1:24", "text must be a string, got a number"),
    ),
    "NUL": (
        *("classification", ["--by", "label"], "a.jsonl", lines({"text": "a\0", "label": "x"})),
        one_bad("a.jsonl:1:10", "text holds a NUL character (U+0000) at character 2"),
    ),
    "surrogate": (
        *("classification", ["--by", "label"], "a.jsonl", lines({"text": "a\ud800", "label": "x"})),
        one_bad("a.jsonl:1:10", "text holds a lone surrogate (U+D800) at character 2"),
    ),
    "label missing": (
        *("classification", ["--by", "example"], "a.jsonl", lines({"text": "t"})),
        one_bad("a.jsonl:1:1", "label is missing"),
    ),
    "label is no name": (
        *("classification", ["--by", "example"], "a.jsonl", lines({"text": "t", "label": 1.5})),
        one_bad("a.jsonl:1:24", "label must be a string or a whole number, got a number"),
    ),
    "two texts of a label": (
        *("classification", ["--by", "label"], "a.jsonl"),
        lines({"text": "s", "label": 1, "label_text": "a"}, {"text": "t", "label": 1, "label_text": "b"}),
        one_bad("a.jsonl:2:41", "label_text of label 1 is 'b', before it was 'a'"),
    ),
    "one class": (
        *(
            "classification",
            ["--by", "example"],
            "a.jsonl",
            lines({"text": "s", "label": 1}, {"text": "t", "label": 1}),
        ),
        "TMP/a.jsonl: all texts have the label '1', so none has a negative",
    ),
    "numbers for label texts": (
        *("classification", ["--by", "label"], "a.jsonl", lines({"text": "s", "label": 0}, {"text": "t", "label": 1})),
        "TMP/a.jsonl: the text of label 0 is '0'; --labels FILE gives labels better texts",
    ),
    "labels file lacks one": (
        *("classification", ["--by", "label", "--labels", "TMP/labels.json"], "a.jsonl"),
        lines({"text": "s", "label": 0}, {"text": "t", "label": 2}),
        "TMP/labels.json has no text for 1 of 2 labels, the first is '2'",
    ),
    "labels file holds a number": (
        *(
            "classification",
            ["--by", "label", "--labels", "TMP/numbers.json"],
            "a.jsonl",
            lines({"text": "s", "label": 0}),
        ),
        "TMP/numbers.json: the text of label '0' must be a string that is not blank, got 3",
    ),
    "labels file holds a NUL": (
        *(
            "classification",
            ["--by", "label", "--labels", "TMP/nul.json"],
            "a.jsonl",
            lines({"text": "s", "label": 0}),
        ),
        "TMP/nul.json: the text of label '0' holds a NUL character (U+0000) at character 1",
    ),
    "labels file is a list": (
        *(
            "classification",
            ["--by", "label", "--labels", "TMP/list.json"],
            "a.jsonl",
            lines({"text": "s", "label": 0}),
        ),
        "TMP/list.json does not hold one JSON object",
    ),
    "labels file is missing": (
        *(
            "classification",
            ["--by", "label", "--labels", "TMP/none.json"],
            "a.jsonl",
            lines({"text": "s", "label": 0}),
        ),
        "no data file at TMP/none.json",
    ),
    "labels file is broken": (
        *(
            "classification",
            ["--by", "label", "--labels", "TMP/broken.json"],
            "a.jsonl",
            lines({"text": "s", "label": 0}),
        ),
        "TMP/broken.json:1:3: not JSON: Expecting property name enclosed in double quotes",
    ),
    "sentences and labels": (
        *("clustering", ["--by", "label"], "a.jsonl", lines({"sentences": ["a", "b"], "labels": ["x"]})),
        one_bad("a.jsonl:1:37", "labels has 1 labels for the 2 texts of sentences"),
    ),
    "labels are no list": (
        *("clustering", ["--by", "label"], "a.jsonl", lines({"sentences": ["a", "b"], "labels": "x"})),
        one_bad("a.jsonl:1:37", "labels must be a list, got a string"),
    ),
    "a sentence is no text": (
        *("clustering", ["--by", "label"], "a.jsonl", lines({"sentences": ["a", 1], "labels": ["x", "y"]})),
        one_bad("a.jsonl:1:15", "sentences[1] must be a string, got a number"),
    ),
    "score outside": (
        *("sts", [], "a.jsonl", lines({**PAIR, "score": 5.1})),
        one_bad("a.jsonl:1:47", "score must be in 0 to 5 (--scale), got 5.1"),
    ),
    "score missing": (
        *("sts", [], "a.jsonl", lines({**PAIR, "score": None})),
        one_bad("a.jsonl:1:47", "score is null"),
    ),
    "score is no number": (
        *("sts", [], "a.jsonl", lines({**PAIR, "score": True})),
        one_bad("a.jsonl:1:47", "score must be a number, got True"),
    ),
    "empty scale": (
        *("sts", ["--scale", "5", "1"], "a.jsonl", lines(PAIR)),
        "--scale must rise from the least to the greatest score, got 5 1",
    ),
    "nothing above the score": (
        *("sts", [], "a.jsonl", lines({**PAIR, "score": 2}, {**PAIR, "score": 3}, {**PAIR, "sentence1": ""})),
        "TMP/a.jsonl: none of 3 rows gives a record:\n  2: the score is below 4\n  1: a text of the pair is blank",
    ),
    "nli label": (
        *("nli", [], "a.jsonl", lines({**NLI, "label": "maybe"})),
        one_bad("a.jsonl:1:46", "label must be 0, 1, 2, entailment, neutral or contradiction, got 'maybe'"),
    ),
    "a line of a number": (
        *("pairs", [], "a.jsonl", "3\n"),
        one_bad("a.jsonl:1", "neither a list of texts nor an object but a number"),
    ),
    "a line that is no JSON": (
        *("pairs", [], "a.jsonl", '["a", "b"\n'),
        one_bad("a.jsonl:1", "not JSON: Expecting ',' delimiter"),
    ),
    "a line that is no UTF-8": (
        *("pairs", [], "a.jsonl", b'["a", "\xff"]\n'),
        one_bad("a.jsonl:1", "not UTF-8: byte 7 of the line (invalid start byte)"),
    ),
    "an empty list": (*("pairs", [], "a.jsonl", "[]\n"), one_bad("a.jsonl:1", "query is null")),
    "a positive is no text": (
        *("pairs", [], "a.jsonl", '["a", 2]\n'),
        one_bad("a.jsonl:1", "pos[0] must be a string, got a number"),
    ),
    "empty file": (*("pairs", [], "a.jsonl", "\n"), "TMP/a.jsonl: none of 0 rows gives a record"),
    "unknown kind": (
        *("nli", [], "a.doc", "x"),
        "TMP/a.doc: a data file ends in .jsonl, .json, .csv, .tsv or .parquet; "
        "of text also in .gz, .bz2, .xz or .zst behind that",
    ),
    "rows that are no objects": (
        *("dpr", [], "a.json", "[1]"),
        one_bad("a.json[0]", "not a JSON object but a number"),
    ),
    "broken list": (
        *("dpr", [], "a.json", '[{"question": "q"}, {"b" 1}]'),
        "TMP/a.json[1]: not JSON: Expecting ':' delimiter",
    ),
    "list without a comma": (
        *("dpr", [], "a.json", "[{} {}]"),
        "TMP/a.json[0]: not JSON: a comma or ] must stand behind the item",
    ),
    "list behind a list": (
        *("dpr", [], "a.json", "[{}]\n[{}]"),
        "TMP/a.json[1]: not JSON: there is more behind the list",
    ),
    "list that ends early": (*("dpr", [], "a.json", "[{},"), "TMP/a.json[1]: not JSON: Expecting value"),
    "list that is no UTF-8": (
        *("dpr", [], "a.json", b'[{"a": "\xff"}]'),
        "TMP/a.json is not UTF-8 near its beginning (invalid start byte)",
    ),
    "list with a late bad byte": (
        *("dpr", [], "a.json", b"[" + b"{}," * (1 << 19) + b'{"a": "\xff"}]'),
        "TMP/a.json is not UTF-8 behind its item 349525 (invalid start byte)",
    ),
    "gzip that is none": (*("dpr", [], "a.json.gz", "[{}]"), "cannot read TMP/a.json.gz: Not a gzipped file (b'[{')"),
    "context is no object": (
        *("dpr", [], "a.jsonl", lines({"question": Q, "positive_ctxs": ["a"]})),
        one_bad("a.jsonl:1:48", "positive_ctxs[0] must be an object, got a string"),
    ),
    "contexts are no list": (
        *("dpr", [], "a.jsonl", lines({"question": Q, "positive_ctxs": "a"})),
        one_bad("a.jsonl:1:48", "positive_ctxs must be a list, got a string"),
    ),
    "context without text": (
        *("dpr", [], "a.jsonl", lines({"question": Q, "positive_ctxs": [{"title": "t"}]})),
        one_bad("a.jsonl:1:48", "positive_ctxs[0].text must be a string, got null"),
    ),
    "squad without data": (*("squad", [], "a.json", "{}"), "TMP/a.json must be an object with a list data"),
    "squad article": (
        *("squad", [], "a.json", '{"data": [{}]}'),
        "TMP/a.json: data[0] must be an object with a list paragraphs",
    ),
    "squad paragraph": (
        *("squad", [], "a.json", '{"data": [{"paragraphs": [{}]}]}'),
        "TMP/a.json: data[0].paragraphs[0] must be an object with a list qas",
    ),
    "squad paragraph of a number": (
        *("squad", [], "a.json", '{"data": [{"paragraphs": [1]}]}'),
        "TMP/a.json: data[0].paragraphs[0] must be an object with a list qas",
    ),
    "squad question": (
        *("squad", [], "a.json", '{"data": [{"paragraphs": [{"qas": [1]}]}]}'),
        "TMP/a.json: data[0].paragraphs[0].qas[0] must be an object, got a number",
    ),
    "squad title": (
        *("squad", [], "a.json", '{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q"}]}]}]}'),
        one_bad("a.json: data[0].paragraphs[0].qas[0]", "title is null"),
    ),
    "squad row": (
        *("squad", [], "a.jsonl", lines({**SQUAD, "question": 1})),
        one_bad("a.jsonl:1:54", "question must be a string, got a number"),
    ),
    "hotpot facts": (
        *("hotpotqa", [], "a.jsonl", lines({**HOTPOT, "supporting_facts": 1})),
        one_bad("a.jsonl:1:51", "supporting_facts must be a list, got a number"),
    ),
    "hotpot without facts": (
        *("hotpotqa", [], "a.jsonl", lines({"question": Q})),
        one_bad("a.jsonl:1:1", "supporting_facts is missing"),
    ),
    "hotpot facts of other paragraphs": (
        *("hotpotqa", [], "a.jsonl", lines({**HOTPOT, "supporting_facts": [["gone", 0]]})),
        "TMP/a.jsonl: none of 1 rows gives a record:\n  1: no paragraph of the supporting facts",
    ),
    "hotpot couple": (
        *("hotpotqa", [], "a.jsonl", lines({**HOTPOT, "context": [["A"]]})),
        one_bad("a.jsonl:1:74", "context[0] must be a list of a title and what belongs to it"),
    ),
    "hotpot sentences": (
        *("hotpotqa", [], "a.jsonl", lines({**HOTPOT, "context": [["A", "a."]]})),
        one_bad("a.jsonl:1:74", "the sentences of 'A' must be a list, got a string"),
    ),
    "hotpot sentence": (
        *("hotpotqa", [], "a.jsonl", lines({**HOTPOT, "context": [["A", [1]]]})),
        one_bad("a.jsonl:1:74", "a sentence of 'A' must be a string, got a number"),
    ),
    "hotpot title": (
        *("hotpotqa", [], "a.jsonl", lines({**HOTPOT, "context": [[1, ["a"]]]})),
        one_bad("a.jsonl:1:74", "a title of context must be a string, got a number"),
    ),
    "bioasq question": (
        *("bioasq", [], "a.json", '{"questions": [1]}'),
        "TMP/a.json: questions[0] must be an object, got a number",
    ),
    "bioasq snippets": (
        *("bioasq", [], "a.json", '{"questions": [{"body": "b", "snippets": 3}]}'),
        one_bad("a.json: questions[0]", "snippets must be a list, got a number"),
    ),
    "hotpot lists of different lengths": (
        *("hotpotqa", [], "a.jsonl", lines({**HOTPOT, "supporting_facts": {"title": ["A"], "sent_id": []}})),
        one_bad("a.jsonl:1:51", "supporting_facts has 1 of title and 0 of sent_id"),
    ),
    "bioasq snippet": (
        *("bioasq", [], "a.json", '{"questions": [{"body": "b", "snippets": ["s"]}]}'),
        one_bad("a.json: questions[0]", "snippets[0] must be an object, got a string"),
    ),
    "bioasq snippet's text": (
        *("bioasq", [], "a.json", '{"questions": [{"body": "b", "snippets": [{}]}]}'),
        one_bad("a.json: questions[0]", "snippets[0].text must be a string, got null"),
    ),
    "hover corpus": (
        *("hover", ["--corpus", "TMP/corpus.jsonl"], "a.jsonl", lines({"claim": "c", "supporting_facts": [["A", 0]]})),
        one_bad("corpus.jsonl:1:1", "text is missing"),
    ),
    "source is missing": (
        *("hover", ["--corpus", "TMP/corpus.jsonl"], "a.jsonl", None),
        "no data file at TMP/a.jsonl",
    ),
}


def write(path, content):
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def refusal(tmp_path, capsys, *words):
    """What the command line says, with the folder's name replaced."""
    assert main([word.replace("TMP", str(tmp_path)) for word in words]) == 78
    out, err = capsys.readouterr()
    assert out == ""
    return err.removeprefix("nvembed: error: ").removesuffix("\n").replace(str(tmp_path), "TMP")


@pytest.fixture
def folder(tmp_path):
    """With files that options name."""
    write(tmp_path / "labels.json", '{"0": "zero", "1": "one"}')
    write(tmp_path / "numbers.json", '{"0": 3}')
    write(tmp_path / "nul.json", '{"0": "\\u0000"}')
    write(tmp_path / "list.json", "[1]")
    write(tmp_path / "broken.json", "{ 1}")
    write(tmp_path / "corpus.jsonl", lines({"title": "A"}))
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_convert(folder, capsys, case):
    layout, options, name, content, message = CASES[case]
    write(folder / name, content)
    before = sorted(path.name for path in folder.iterdir())
    assert refusal(folder, capsys, "data", "convert", layout, f"TMP/{name}", "TMP/out.jsonl", *options) == message
    assert sorted(path.name for path in folder.iterdir()) == before


def test_many_bad_rows(tmp_path, capsys):
    write(tmp_path / "a.jsonl", "3\n" * 12 + '["a", "b"]\n')
    write(tmp_path / "b.jsonl", "4\n")
    words = ["data", "convert", "pairs", "TMP/a.jsonl", "TMP/b.jsonl", "TMP/out.jsonl", "--max-bad-records"]
    shown = "".join(f"\n  TMP/a.jsonl:{n}: neither a list of texts nor an object but a number" for n in range(1, 11))
    head = "13 bad rows in TMP/a.jsonl, TMP/b.jsonl, 12 allowed, the first 10:"
    assert refusal(tmp_path, capsys, *words, "12") == head + shown
    assert main([word.replace("TMP", str(tmp_path)) for word in [*words, "13"]]) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


def test_output_of_another_format(tmp_path, capsys):
    message = "TMP/out.parquet: records are written as JSON Lines, so the name must end in .jsonl"
    assert refusal(tmp_path, capsys, "data", "convert", "pairs", "TMP/a.jsonl", "TMP/out.parquet") == message
    words = ["data", "decontaminate", "TMP/in.jsonl", "TMP/out.parquet", "--against", "TMP/test.jsonl"]
    assert refusal(tmp_path, capsys, *words) == message


def test_output_exists(tmp_path, capsys):
    write(tmp_path / "a.jsonl", '["a", "b"]\n')
    write(tmp_path / "b.jsonl", '["c", "d"]\n')
    message = "TMP/b.jsonl exists; it is the file to write, and only --overwrite replaces it"
    assert refusal(tmp_path, capsys, "data", "convert", "pairs", "TMP/a.jsonl", "TMP/b.jsonl") == message
    assert refusal(tmp_path, capsys, "data", "prompts", "write", "TMP/a.jsonl", "TMP/b.jsonl") == message
    assert (tmp_path / "b.jsonl").read_text() == '["c", "d"]\n'


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sample", "0"], "argument --sample: must be at least 1: 0"),
        (["--negatives", "-1"], "argument --negatives: must not be negative: -1"),
    ],
)
def test_numbers_of_options(capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        main(["data", "convert", "pairs", "a.jsonl", "b.jsonl", *words])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"nvembed data convert pairs: error: {message}"
