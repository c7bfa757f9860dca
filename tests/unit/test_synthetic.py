"""Prompts for synthetic data, and records out of a model's answers."""

import json
from collections import Counter

import pytest

from nvembed_mcore.cli import main
from nvembed_mcore.data.convert import convert
from nvembed_mcore.data.convert.intake import LeftOut
from nvembed_mcore.data.records import content_id, read_records
from nvembed_mcore.data.synthetic.answers import example_in, tasks_in
from nvembed_mcore.data.synthetic.prompts import SHAPES, TEMPLATES, brainstorm, write
from tests.unit.test_convert_tasks import jsonl


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_brainstorm(tmp_path):
    output = tmp_path / "prompts.jsonl"
    assert brainstorm(output, count=120, tasks=13, seed=5) == {"prompts written": 120}
    rows = rows_of(output)
    assert [row["id"] for row in rows[:4]] == [
        "brainstorm/short-long/0",
        "brainstorm/long-short/1",
        "brainstorm/short-short/2",
        "brainstorm/short-long/3",
    ]
    assert Counter(row["shape"] for row in rows) == dict.fromkeys(SHAPES, 40)
    fields = json.loads((TEMPLATES / "choices.json").read_text())["brainstorm"]["field"]
    assert len({row["choices"]["field"] for row in rows}) > len(fields) / 2
    for row in rows:
        assert row["choices"]["field"] in fields and row["choices"]["field"] in row["prompt"]
        assert "JSON list of 13 strings" in row["prompt"] and SHAPES[row["shape"]]["wanted"] in row["prompt"]
        assert "$" not in row["prompt"]
    again, other = tmp_path / "again.jsonl", tmp_path / "other.jsonl"
    brainstorm(again, count=60, tasks=13, seed=5)
    brainstorm(other, count=60, tasks=13, seed=6)
    assert rows_of(again) == rows[:60] != rows_of(other)
    brainstorm(other, count=2, shapes=["short-short"])
    assert [row["id"] for row in rows_of(other)] == ["brainstorm/short-short/0", "brainstorm/short-short/1"]


TASKS = ["Given a symptom, find articles", "Given a price of 5$, find offers"]


def test_write(tmp_path):
    answers = jsonl(
        tmp_path / "answers.jsonl",
        [{"id": f"brainstorm/{shape}/{n}", "answer": json.dumps(TASKS)} for n, shape in enumerate(SHAPES)]
        + [
            {"id": "brainstorm/short-long/9", "answer": '["given a  Symptom, find articles"]'},
            {"id": "brainstorm/short-long/12", "answer": "I am sorry."},
        ],
    )
    output = tmp_path / "prompts.jsonl"
    figures = write([answers], output, per_task=8, languages=["English", "German"], seed=1)
    assert figures == {
        "answers read": 5,
        "tasks": 6,
        "prompts written": 48,
        "bad rows": 0,
        "left out: no JSON list of texts in the answer": 1,
    }
    rows = rows_of(output)
    assert len({row["id"] for row in rows}) == 48
    assert rows[0]["id"] == f"short-long/{content_id(TASKS[0])}/0" and rows[0]["task"] == TASKS[0]
    choices = json.loads((TEMPLATES / "choices.json").read_text())
    for row in rows:
        assert f"Task: {row['task']}\n" in row["prompt"] and f"in {row['choices']['language']}" in row["prompt"]
        for name, some in choices[row["shape"]].items():
            assert row["choices"][name] in some and row["choices"][name] in row["prompt"]
    assert {row["choices"]["language"] for row in rows} == {"English", "German"}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('["a", "b"]', ["a", "b"]),
        ('Here [they] are:\n```json\n[\n "a",\n "b\nc"]\n```\n["d"]', ["a", "b c"]),
        ('{"tasks": ["a", 3, " ", "b"]}', ["a", "b"]),
        ('[[], ["a"]] ["b"]', ["b"]),
        ('["a", "b"', None),
        ("- a\n- b", None),
        ("[" * 100_000, None),
        ("", None),
    ],
)
def test_tasks_of_an_answer(answer, expected):
    if expected is None:
        with pytest.raises(LeftOut, match="^no JSON list of texts in the answer$"):
            tasks_in(answer)
    else:
        assert tasks_in(answer) == expected


GOOD = {"query": "q", "positive": " p ", "negative": "n"}
NONE = "no JSON object with the keys in the answer"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (json.dumps(GOOD), {"query": "q", "positive": "p", "negative": "n"}),
        (
            "Sure {thing}!\n```json\n" + json.dumps(GOOD, indent=2) + "\n```",
            {"query": "q", "positive": "p", "negative": "n"},
        ),
        ('{"thought": "..."} ' + json.dumps([GOOD]), {"query": "q", "positive": "p", "negative": "n"}),
        (
            '{"query": "two\nlines", "positive": "p", "negative": "n"}',
            {"query": "two\nlines", "positive": "p", "negative": "n"},
        ),
        ('{"query": "q", "positive": "p", "negative": "n"', NONE),
        ('{"question": "q"}', NONE),
        ("", NONE),
        ('{"query": "q", "positive": "p"}', "no usable negative in the answer's object"),
        ('{"query": ["q"], "positive": "p", "negative": "n"}', "no usable query in the answer's object"),
        ('{"query": "q", "positive": " ", "negative": "n"}', "no usable positive in the answer's object"),
        ('{"query": "q", "positive": "\\ud800", "negative": "n"}', "no usable positive in the answer's object"),
    ],
)
def test_example_of_an_answer(answer, expected):
    if isinstance(expected, str):
        with pytest.raises(LeftOut) as caught:
            example_in(answer)
        assert str(caught.value) == expected
    else:
        assert example_in(answer) == expected


def test_records_of_answers(tmp_path):
    prompts = jsonl(
        tmp_path / "prompts.jsonl", [{"id": f"s/{n}", "task": f"Task {n}", "prompt": "..."} for n in range(5)]
    )
    answers = jsonl(
        tmp_path / "answers.jsonl",
        [
            {"id": "s/1", "answer": json.dumps(GOOD)},
            {"id": "s/0", "answer": "no"},
            {"id": "s/1", "answer": json.dumps(GOOD)},
            {"id": "s/2", "answer": json.dumps({"query": "same", "positive": "same", "negative": "n"})},
            {"id": "s/3", "answer": json.dumps({"query": "q3", "positive": "p3", "negative": "p3"})},
        ],
    )
    output = tmp_path / "out.jsonl"
    counts = convert("synthetic", [prompts, answers], output)
    assert rows_of(output) == [
        {
            "query": "q",
            "pos": ["p"],
            "neg": ["n"],
            "query_id": "s/1",
            "pos_ids": [content_id("p")],
            "neg_ids": [content_id("n")],
            "instruction": "Task 1",
        },
        {
            "query": "q3",
            "pos": ["p3"],
            "neg": [],
            "query_id": "s/3",
            "pos_ids": [content_id("p3")],
            "neg_ids": [],
            "instruction": "Task 3",
        },
    ]
    assert len(list(read_records(output))) == 2
    assert counts.left_out == {
        NONE: 1,
        "the prompt has an earlier answer": 1,
        "no positive besides blank texts and the query itself": 1,
    }
    assert counts.notes == {
        "negatives left out: blank, a repetition, the query or a positive": 1,
        "prompts without a usable answer": 2,
    }


def test_both_steps_from_the_command_line(tmp_path, capsys):
    first, tasks, second, texts, records = (tmp_path / f"{n}.jsonl" for n in range(5))
    assert main(["data", "prompts", "brainstorm", str(first), "--count", "3", "--seed", "2"]) == 0
    jsonl(tasks, [{"id": row["id"], "answer": '["Given a word, find its meaning"]'} for row in rows_of(first)])
    assert main(["data", "prompts", "write", str(tasks), str(second), "--per-task", "2"]) == 0
    example = {"query": "q {}", "positive": "p {}", "negative": "n {}"}
    answers = [
        {"id": row["id"], "answer": json.dumps({name: text.format(number) for name, text in example.items()})}
        for number, row in enumerate(rows_of(second))
    ]
    assert main(["data", "convert", "synthetic", str(second), str(jsonl(texts, answers)), str(records)]) == 0
    assert len(list(read_records(records))) == 6
    assert {row["instruction"] for row in rows_of(records)} == {"Given a word, find its meaning"}
    assert "prompts written" in capsys.readouterr().out


ANSWER = {"id": "brainstorm/short-long/0", "answer": '["Find x"]'}


@pytest.mark.parametrize(
    ("changed", "content", "answer", "message"),
    [
        ("short_long.txt", None, ANSWER, "no template at TMP/own/short_long.txt"),
        (
            *("short_long.txt", "$task $colour", ANSWER),
            "TMP/own/short_long.txt: nothing fills in $colour; choices.json of its folder may",
        ),
        (
            *("short_long.txt", "$task for 5$", ANSWER),
            "TMP/own/short_long.txt: invalid placeholder in string: line 1, col 12; a dollar sign is written $$",
        ),
        (
            *("short_long.txt", b"\xff", ANSWER),
            "TMP/own/short_long.txt is not UTF-8: byte 0 (invalid start byte)",
        ),
        (
            *("choices.json", '{"short-long": {"words": []}}', ANSWER),
            "TMP/own/choices.json: short-long must be an object with lists of strings",
        ),
        (
            *("choices.json", '{"short-long": 3}', ANSWER),
            "TMP/own/choices.json: short-long must be an object with lists of strings",
        ),
        ("choices.json", "[]", ANSWER, "TMP/own/choices.json does not hold one JSON object"),
        ("choices.json", None, ANSWER, "no data file at TMP/own/choices.json"),
        (
            *("choices.json", "[" * 100_000, ANSWER),
            "TMP/own/choices.json is not usable JSON: maximum recursion depth exceeded while decoding a JSON "
            "array from a unicode string",
        ),
        (
            *("long_short.txt", "", {**ANSWER, "id": "short-long/12ab/0"}),
            "1 bad row in TMP/answers.jsonl:\n  TMP/answers.jsonl:1:8: "
            "id must be that of a prompt of step one, got 'short-long/12ab/0'",
        ),
        (
            *("long_short.txt", "", {**ANSWER, "id": "brainstorm/wide/0"}),
            "1 bad row in TMP/answers.jsonl:\n  TMP/answers.jsonl:1:8: "
            "id must be that of a prompt of step one, got 'brainstorm/wide/0'",
        ),
        (
            *("long_short.txt", "", {"id": "brainstorm/short-long/0"}),
            "1 bad row in TMP/answers.jsonl:\n  TMP/answers.jsonl:1:1: answer is missing",
        ),
        ("long_short.txt", "", {**ANSWER, "answer": "none"}, "TMP/answers.jsonl: none of 1 answers holds a task"),
    ],
)
def test_refusals_of_prompts(tmp_path, capsys, changed, content, answer, message):
    own = tmp_path / "own"
    own.mkdir()
    for path in TEMPLATES.iterdir():
        (own / path.name).write_bytes(path.read_bytes())
    (own / changed).unlink()
    if content is not None:
        (own / changed).write_bytes(content if isinstance(content, bytes) else content.encode())
    answers = jsonl(tmp_path / "answers.jsonl", [answer])
    words = ["data", "prompts", "write", str(answers), str(tmp_path / "out.jsonl"), "--templates", str(own)]
    assert main(words) == 78
    assert capsys.readouterr().err.replace(str(tmp_path), "TMP") == f"nvembed: error: {message}\n"
    assert not (tmp_path / "out.jsonl").exists() and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["prompts"], "give the file of prompts, then files of answers: there is only TMP/prompts.jsonl"),
        (
            ["prompts", "answers"],
            "1 bad row in TMP/prompts.jsonl, TMP/answers.jsonl:\n  TMP/answers.jsonl:1:8: no prompt has the id 'b'",
        ),
        (["answers", "answers"], "1 bad row in TMP/answers.jsonl:\n  TMP/answers.jsonl:1:1: task is missing"),
    ],
)
def test_refusals_of_records(tmp_path, capsys, sources, message):
    jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "task": "t"}])
    jsonl(tmp_path / "answers.jsonl", [{"id": "b", "answer": json.dumps(GOOD)}])
    paths = [str(tmp_path / f"{name}.jsonl") for name in [*sources, "out"]]
    assert main(["data", "convert", "synthetic", *paths]) == 78
    assert capsys.readouterr().err.replace(str(tmp_path), "TMP") == f"nvembed: error: {message}\n"
    assert len(list(tmp_path.iterdir())) == 2
