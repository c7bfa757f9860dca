"""Scores by kind of task beside the paper's, and `nvembed evaluate --mteb`."""

from __future__ import annotations

import json
import sys

import pytest

from nvembed_mcore.cli import main
from nvembed_mcore.evaluation.mteb.run import Score
from nvembed_mcore.evaluation.mteb.table import models, rows_of, text_of
from nvembed_mcore.evaluation.mteb.tasks import english_tasks
from tests.helpers import mteb_tasks
from tests.helpers.exports import Case
from tests.unit.test_cli import assert_names, message_of


@pytest.fixture(scope="module")
def english():
    return {task.metadata.name: task.metadata.type for task in english_tasks()}


def test_averages_only_where_all_tasks_were_run(english):
    scores = [Score(name, kind, 10.0 + number) for number, (name, kind) in enumerate(english.items())]
    rows = {row.label: row for row in rows_of(scores, english)}
    mean = sum(one.score for one in scores) / 56
    assert rows["All, average of 56"].ours == pytest.approx(mean)
    assert rows["All, average of 56"].theirs == [69.32, 72.31]
    retrieval = [one.score for one in scores if one.kind == "Retrieval"]
    assert rows["Retrieval, average of 15"].ours == pytest.approx(sum(retrieval) / 15)
    assert rows["Retrieval, average of 15"].theirs == [59.36, 62.65]
    assert rows["Clustering, average of 11"].theirs == [52.80, 58.46]
    assert rows["FiQA2018"].theirs == [63.10, 65.73] and rows["STS12"].theirs == [None, None]
    assert sum(row.is_heading for row in rows.values()) == 7 + 1 and len(rows) == 56 + 8

    fewer = [one for one in scores if one.task != "NQ"] + [Score("SmallSts", "STS", 1.0)]
    rows = {row.label: row for row in rows_of(fewer, english)}
    averages = [label for label, row in rows.items() if row.is_heading and row.ours is not None]
    assert len(averages) == 6 and rows["Retrieval"].theirs == [None, None]
    assert not any(label.startswith(("Retrieval,", "All")) for label in rows)
    sts = [one.score for one in scores if one.kind == "STS"]
    assert rows["STS, average of 10"].ours == pytest.approx(sum(sts) / 10)  # one more is not in the paper's average


def test_what_the_paper_says_is_consistent(english):
    """Its averages are those of its own numbers, to the digits that it prints."""
    rows = rows_of([Score(name, kind, 0.0) for name, kind in english.items()], english)
    kinds = {row.label.partition(",")[0]: row for row in rows if row.is_heading}
    for column in range(len(models())):
        tasks = [row.theirs[column] for row in rows if row.label in english and english[row.label] == "Retrieval"]
        assert sum(tasks) / 15 == pytest.approx(kinds["Retrieval"].theirs[column], abs=0.006)
        total = sum(kinds[kind].theirs[column] for kind in english.values())
        assert total / 56 == pytest.approx(kinds["All"].theirs[column], abs=0.006)


def test_the_table_as_text(english):
    text = text_of(rows_of([Score("FiQA2018", "Retrieval", 7.0), Score("SummEval", "Summarization", 31.0)], english))
    assert text.splitlines() == [
        "                              ours  NV-Embed-v1  NV-Embed-v2",
        "Retrieval",
        "  FiQA2018                    7.00        63.10        65.73",
        "Summarization, average of 1  31.00        31.20        30.70",
        "  SummEval                   31.00",
    ]


# The command


@pytest.fixture(scope="module")
def export(tokenizer_dir, tmp_path_factory):
    return Case("mean", tokenizer_dir, tmp_path_factory.mktemp("export")).folder


@pytest.fixture
def known(monkeypatch):
    """The small tasks are among those that mteb knows by name."""
    registry = sys.modules["mteb.get_tasks"]._TASKS_REGISTRY
    for kind in mteb_tasks.KINDS:
        monkeypatch.setitem(registry, kind.metadata.name, kind)


def test_the_command(capsys, known, export, tmp_path):
    own, report = tmp_path / "own.yaml", tmp_path / "scores.json"
    own.write_text(mteb_tasks.INSTRUCTIONS)
    command = ["evaluate", export, "--json", report, "--mteb", "SmallSts", "SmallReranking", "--instructions", own]
    command += ["--output", tmp_path, "--name", "test/model", "--max-length", "32"]
    assert main([str(word) for word in command]) == 0
    scores = {one["task"]: one for one in json.loads(report.read_text())}
    assert list(scores) == ["SmallSts", "SmallReranking"] and scores["SmallSts"]["kind"] == "STS"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ours", "Reranking", "SmallReranking", "STS", "SmallSts"]
    assert lines[4].split()[1] == f"{scores['SmallSts']['score']:.2f}"
    (meta,) = tmp_path.glob("results/test__model/*-own/model_meta.json")
    assert json.loads(meta.read_text())["max_tokens"] == 32


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["folder", "--mteb", "STS12"], ["folder", "--mteb STS12", "got both"]),
        (["folder", "--tp", "2"], ["--tp 2", "--mteb"]),
        (["folder", "--overwrite"], ["--overwrite", "--mteb"]),
        (["--mteb", "STS12", "--device", "cpu"], ["--device cpu"]),
        (["--mteb", "STS12", "--instruction", "Find it"], ["Find it", "--instructions none"]),
        (["--mteb", "STS12", "--instructions", "papers"], ["papers", "paper, published or none"]),
        (["--mteb", "STS71", "--name", "a/b"], ["STS71", "STS17"]),
    ],
)
def test_refusals_of_the_command(capsys, export, tmp_path, monkeypatch, words, named):
    monkeypatch.chdir(tmp_path)
    assert_names(message_of(capsys, ["evaluate", export, *words]), *named)


def test_data_is_still_needed_without_tasks(capsys, export):
    with pytest.raises(SystemExit):
        main(["evaluate", str(export), "--max-length", "20"])
    assert "data" in capsys.readouterr().err
