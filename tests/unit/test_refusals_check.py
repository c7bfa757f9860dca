"""`nvembed data check` on the command line: what it prints, its exit status, and every refusal to the letter."""

from __future__ import annotations

import contextlib
import json
import shutil

import psutil
import pytest
import yaml

from nvembed_mcore.cli import main
from nvembed_mcore.data import files
from nvembed_mcore.data.check import sets
from tests.helpers import runs

GOOD = '{"query": "cat", "pos": ["an animal"], "neg": ["a stone"]}\n'
TWICE = GOOD * 2

SCREEN = """\
Data check (queries and docs: distinct ones)
┏━━━━━━━━━━━━━━┳━━━━━━━━━┳━━━━━━━━━┳━━━━━┳━━━━━┳━━━━━━┳━━━━━━━━┳━━━━━━━━━━━┓
┃ data set     ┃ records ┃ queries ┃ pos ┃ neg ┃ docs ┃ no neg ┃ bad lines ┃
┡━━━━━━━━━━━━━━╇━━━━━━━━━╇━━━━━━━━━╇━━━━━╇━━━━━╇━━━━━━╇━━━━━━━━╇━━━━━━━━━━━┩
│ a.jsonl      │       3 │       2 │   3 │   3 │    3 │      0 │         1 │
│ more/b.jsonl │       1 │       1 │   1 │   1 │    2 │      0 │         0 │
│ all          │       4 │       2 │   4 │   4 │    3 │      0 │         1 │
└──────────────┴─────────┴─────────┴─────┴─────┴──────┴────────┴───────────┘
Lengths in tokens (queries cut at 512, documents at 4)
┏━━━━━━━━━━━━━━┳━━━━━━━┳━━━━━━━┳━━━━━━┳━━━━━━━━┳━━━━━┳━━━━━┳━━━━━┳━━━━━━━┓
┃ data set     ┃ field ┃ texts ┃ mean ┃ median ┃ p95 ┃ p99 ┃ max ┃   cut ┃
┡━━━━━━━━━━━━━━╇━━━━━━━╇━━━━━━━╇━━━━━━╇━━━━━━━━╇━━━━━╇━━━━━╇━━━━━╇━━━━━━━┩
│ a.jsonl      │ query │     3 │  3.0 │      3 │   3 │   3 │   3 │ 0.00% │
│              │ pos   │     3 │  4.0 │      4 │   4 │   4 │   4 │ 0.00% │
│              │ neg   │     3 │  4.0 │      4 │   4 │   4 │   4 │ 0.00% │
├──────────────┼───────┼───────┼──────┼────────┼─────┼─────┼─────┼───────┤
│ more/b.jsonl │ query │     1 │  3.0 │      3 │   3 │   3 │   3 │ 0.00% │
│              │ pos   │     1 │  4.0 │      4 │   4 │   4 │   4 │ 0.00% │
│              │ neg   │     1 │  4.0 │      4 │   4 │   4 │   4 │ 0.00% │
├──────────────┼───────┼───────┼──────┼────────┼─────┼─────┼─────┼───────┤
│ all          │ query │     4 │  3.0 │      3 │   3 │   3 │   3 │ 0.00% │
│              │ pos   │     4 │  4.0 │      4 │   4 │   4 │   4 │ 0.00% │
│              │ neg   │     4 │  4.0 │      4 │   4 │   4 │   4 │ 0.00% │
└──────────────┴───────┴───────┴──────┴────────┴─────┴─────┴─────┴───────┘
warning: a.jsonl: records with the query of an earlier one: 1 of 3 (33.33%)
  a.jsonl:2; a.jsonl:1: cat
warning: a.jsonl: positives that stood with the same query before: 1 of 3 (33.33%)
  a.jsonl:2; a.jsonl:1: cat | an animal
warning: a.jsonl: queries of more/b.jsonl, in 2 records: 1 of 1 (100.00%)
  a.jsonl:1; more/b.jsonl:1: cat
warning: a.jsonl: documents of more/b.jsonl, in 3 records: 2 of 2 (100.00%)
  a.jsonl:1; more/b.jsonl:1: an animal
warning: a.jsonl: blank negatives, left out: 1 of 4 (25.00%)
warning: a.jsonl: bad lines, skipped (1 allowed): 1
  a.jsonl:4:1: not a JSON object but a number
warning: more/b.jsonl: queries of more/b.jsonl, in 1 record: 1 of 1 (100.00%)
  more/b.jsonl:1; more/b.jsonl:1: cat
warning: more/b.jsonl: documents of more/b.jsonl, in 1 record: 2 of 2 (100.00%)
  more/b.jsonl:1; more/b.jsonl:1: an animal
warning: all: queries in a.jsonl and in more/b.jsonl: 1
  more/b.jsonl:1; a.jsonl:1: cat
A run may start; 9 warnings."""


def run(capsys, arguments):
    """Exit status, and what was printed on either side."""
    capsys.readouterr()
    try:
        status = main(["data", "check", *arguments])
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Small files in the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text(GOOD)
    (tmp_path / "twice.jsonl").write_text(TWICE)
    (tmp_path / "broken.jsonl").write_text(GOOD + '{"query": "cat", "pos": [""]}\n[1]\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a configuration or --data, got neither"),
        (["a.yaml", "--data", "good.jsonl"], "name a configuration or --data, not both"),
        (["a.yaml", "--max-query-tokens", "9"], "--max-query-tokens goes with --data; a.yaml says it already"),
        (["a.yaml"], "no configuration file at a.yaml"),
        (["--data", "good.jsonl", "--instruction", "Find"], "--instruction needs --tokenizer"),
        (["--data", "good.jsonl", "--max-document-tokens", "9"], "--max-document-tokens needs --tokenizer"),
        (["--data", "good.jsonl", "--processes", "0"], "--processes must be at least 1, got 0"),
        (["--data", "good.jsonl", "--max-bad-records", "-1"], "--max-bad-records must be at least 0, got -1"),
        (
            ["--data", "good.jsonl", "--tokenizer", "none"],
            "no tokenizer folder at none (`nvembed data tokenizer none` writes one)",
        ),
        (["--data", "good.jsonl", "--against", "none.jsonl"], "no data file at none.jsonl"),
        (["--data", "good.jsonl", "--against", "empty.jsonl"], "empty.jsonl holds no records"),
        (["--data", "good.jsonl", "--against", "broken.jsonl"], "broken.jsonl:2:25: pos[0] is blank"),
    ],
)
def test_what_ends_the_command(capsys, data, arguments, message):
    assert run(capsys, [*arguments, "--report", "r.html", "--json", "r.json"]) == (
        78,
        "",
        f"nvembed: error: {message}\n",
    )
    assert not list(data.glob("r.*"))


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("corpus", {"_id": "1", "title": "t"}, "corpus.jsonl:1:1: text is missing"),
        ("corpus", {"_id": "1", "text": 3}, "corpus.jsonl:1:22: text must be a string, got a number"),
        ("queries", {"_id": "1", "text": " "}, "queries.jsonl:1:22: text is empty"),
        ("queries", {"text": "t"}, "queries.jsonl:1:1: _id is missing"),
        ("queries", [], "queries.jsonl:1:1: not a JSON object but a list"),
    ],
)
def test_what_is_wrong_with_an_evaluation_folder(capsys, data, name, line, message):
    (data / "beir").mkdir()
    for file in ("queries", "corpus"):
        row = line if file == name else {"_id": "1", "text": "t"}
        (data / "beir" / f"{file}.jsonl").write_text(json.dumps(row) + "\n")
    expected = (78, "", f"nvembed: error: beir/{message}\n")
    assert run(capsys, ["--data", "good.jsonl", "--against", "beir"]) == expected


@pytest.mark.parametrize(
    ("name", "more", "last"),
    [
        (
            "broken.jsonl",
            [],
            "refused: broken.jsonl has 2 bad lines:\n"
            "  broken.jsonl:2:25: pos[0] is blank\n"
            "  broken.jsonl:3:1: not a JSON object but a list",
        ),
        (
            "broken.jsonl",
            ["--max-bad-records", "1"],
            "refused: broken.jsonl has 2 bad lines, 1 allowed:\n"
            "  broken.jsonl:2:25: pos[0] is blank\n"
            "  broken.jsonl:3:1: not a JSON object but a list",
        ),
        ("none.jsonl", [], "refused: no data file at none.jsonl"),
        ("empty.jsonl", [], "refused: empty.jsonl holds no records"),
    ],
)
def test_what_a_run_would_refuse(capsys, data, name, more, last):
    status, out, err = run(capsys, ["--data", "good.jsonl", name, *more])
    assert (status, err) == (1, "")
    assert f"\n{last}\n" in out
    assert "\nA run would refuse 1 of 2 data sets; " in out


def test_an_instruction_without_room_is_refused(capsys, data, tokenizer_dir):
    arguments = ["--data", "good.jsonl", "--tokenizer", str(tokenizer_dir), "--instruction", "Find the animal"]
    status, out, _ = run(capsys, [*arguments, "--max-query-tokens", "9"])
    message = (
        "refused: good.jsonl: the instruction 'Find the animal' takes 10 tokens, and with one token of text and </s> "
        "more than the limit of 9"
    )
    assert status == 1 and f"\n{message}\n" in out


def test_a_tokenizer_that_cannot_keep_the_prompt_apart_is_refused(capsys, data, tokenizer_dir, monkeypatch):
    from nvembed_mcore.data import prompts

    monkeypatch.setattr(prompts, "prompt_tokens", lambda *_: [1, 2, 3])
    arguments = ["--data", "good.jsonl", "--tokenizer", str(tokenizer_dir), "--instruction", "Find"]
    status, out, _ = run(capsys, arguments)
    message = "refused: good.jsonl: the tokenizer does not keep 'Instruct: Find\\nQuery: ' apart from the text 'cat'"
    assert status == 1 and f"\n{message}\n" in out


def test_a_worker_that_is_killed(capsys, data, monkeypatch):
    others = {child.pid for child in psutil.Process().children()}
    plain = sets._Gathered.add

    def kill_the_workers(self, facts):
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):  # one that was killed before, and is a zombie
                if child.pid not in others and "spawn_main" in " ".join(child.cmdline()):
                    child.kill()
        plain(self, facts)

    monkeypatch.setattr(files, "BLOCK_BYTES", 10)
    monkeypatch.setattr(sets._Gathered, "add", kill_the_workers)
    (data / "long.jsonl").write_text(GOOD * 50)
    message = "nvembed: error: a process that read the data was ended from outside (out of memory?)\n"
    assert run(capsys, ["--data", "long.jsonl", "--processes", "2"]) == (78, "", message)


def test_the_screen(capsys, data, tokenizer_dir):
    (data / "more").mkdir()
    (data / "a.jsonl").write_text(TWICE + '{"query": "dog", "pos": ["wool " ], "neg": ["a stone", " "]}\n3\n')
    (data / "more" / "b.jsonl").write_text(GOOD)
    status, out, err = run(
        capsys,
        ["--data", "a.jsonl", "more/b.jsonl", "--max-bad-records", "1", "--tokenizer", str(tokenizer_dir)]
        + ["--max-document-tokens", "4", "--against", "more/b.jsonl"],
    )
    assert (status, err) == (0, "")
    assert [line.rstrip() for line in out.splitlines()] == SCREEN.splitlines()


def test_status_page_and_json(capsys, data):
    files = ["--report", "new/r.html", "--json", "new/r.json"]
    assert run(capsys, ["--data", "good.jsonl", "--strict"])[0] == 0
    assert run(capsys, ["--data", "twice.jsonl", *files])[0] == 0
    assert run(capsys, ["--data", "twice.jsonl", "--strict"])[0] == 1
    report = json.loads((data / "new" / "r.json").read_text())
    assert report["may_start"] and [one["count"] for one in report["datasets"][0]["warnings"]] == [1, 1]
    page = (data / "new" / "r.html").read_text()
    assert "A run may start; 2 warnings." in page and "twice.jsonl:2; twice.jsonl:1" in page and "<svg" in page


def test_the_sets_of_a_configuration(capsys, data):
    inputs = runs.write_inputs(data / "inputs")
    from nvembed_mcore.resume import plain

    tree = plain(runs.run_config(inputs, data / "run"))
    tree["data"]["max_bad_records"] = 1
    with open(tree["data"]["datasets"][0]["path"], "a") as file:
        file.write("[]\n")
    shutil.copytree(tree["eval"]["path"], data / "test")
    tree["eval"]["path"] = str(data / "test")
    record = json.loads(open(tree["data"]["datasets"][0]["path"]).readline())
    row = {"_id": "q0", "text": record["query"].upper()}
    queries = (data / "test" / "queries.jsonl").read_text().splitlines()
    (data / "test" / "queries.jsonl").write_text("\n".join([json.dumps(row), *queries[1:]]) + "\n")
    (data / "run.yaml").write_text(yaml.safe_dump(tree))
    status, out, err = run(capsys, ["run.yaml", "--json", "r.json"])
    assert (status, err) == (0, "")
    report = json.loads((data / "r.json").read_text())
    assert report["unit"] == "tokens"
    assert [one["path"] for one in report["datasets"]] == [one["path"] for one in tree["data"]["datasets"]]
    limits = report["datasets"][0]["lengths"]
    assert limits["query"]["limit"] == tree["data"]["max_query_tokens"]
    assert limits["pos"]["limit"] == tree["data"]["max_document_tokens"]
    assert [one["counts"]["bad_lines"] for one in report["datasets"]] == [1, *[0] * (len(report["datasets"]) - 1)]
    leaked = {one["kind"]: one["what"] for one in report["datasets"][0]["warnings"]}["leaked_queries"]
    assert leaked.startswith(f"queries of {data}/test, in ")
    assert run(capsys, ["run.yaml", "--max-bad-records", "0"])[0] == 1
    assert not (data / "run").exists()
