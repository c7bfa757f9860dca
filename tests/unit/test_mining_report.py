"""Figures against loops over the mined files, and the pages that show them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nvembed_mcore import progress
from nvembed_mcore.cli import main
from nvembed_mcore.cli import mine as command
from nvembed_mcore.mining import search
from nvembed_mcore.mining.candidates import Judged
from nvembed_mcore.mining.findings import Findings
from nvembed_mcore.mining.select import Rules, limits
from tests.helpers.mining import WordEmbedder, make_data, mined_by_loops, vector, write_json_lines

TOP = Rules(method="topk", negatives=100_000)


def judged(scores, is_barred, is_allowed, columns, own, limit):
    """Of queries with the documents 10, 11, ... as candidates; `-inf` is none."""
    scores = np.array(scores, dtype=np.float32)
    documents = np.where(np.isfinite(scores), 10 + np.arange(scores.shape[1]), -1)
    return Judged(
        records=np.arange(len(scores)),
        scores=scores,
        documents=documents,
        is_barred=np.array(is_barred, dtype=bool),
        is_allowed=np.array(is_allowed, dtype=bool),
        limit=np.array(limit),
        columns=[np.array(one, dtype=np.int64) for one in columns],
        own=[100 + np.arange(len(one)) for one in own],
        own_scores=[np.array(one, dtype=np.float32) for one in own],
        num_positives=np.array([2, 1, 1]),
    )


@pytest.fixture
def findings():
    """Of two negatives each: query 0 has them, its third document is a kept negative; query 1 has one, and finds its
    positive behind two others; query 2 has none, and all of its candidates score above its positive."""
    found = Findings(Rules(negatives=2), num_documents=50, num_suspects=2)
    absent = -np.inf
    found.add(
        judged(
            scores=[[0.9, 0.8, 0.5, 0.4], [0.7, 0.6, 0.3, 0.2], [0.5, 0.4, 0.3, absent]],
            is_barred=[[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]],
            is_allowed=[[0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]],
            columns=[[2, 3], [2], []],
            own=[[0.9, 0.7, 0.1], [0.5], [0.1]],
            limit=[0.665, 0.475, 0.095],
        )
    )
    return found


def test_figures_by_hand(findings):
    figures = findings.figures()
    assert figures.pop("scores")["chosen negatives"]["mean"] == pytest.approx(0.4)
    assert figures == {
        "records": 3,
        "documents": 50,
        "negatives": 3,
        "records_with_enough_negatives": 1,
        "records_with_too_few_negatives": 2,
        "records_without_negatives": 1,
        "share_with_too_few_negatives": 0.666667,
        "records_with_candidates_above_the_limit": 3,
        "candidates_above_the_limit": 1 + 2 + 3,
        "positive_in_first_1": 1,
        "positive_in_first_10": 2,
        "positive_in_first_100": 2,
        "positive_not_found": 1,
    }
    scores = {name: [round(float(score), 2) for score in some] for name, some in findings.scores().items()}
    assert scores == {
        "positives": [0.9, 0.7, 0.5, 0.1],
        "best candidates": [0.8, 0.5, 0.7, 0.6, 0.5, 0.4],
        "chosen negatives": [0.5, 0.4, 0.3],
    }


def test_the_worst_suspects_are_kept(findings):
    # Above their query's lowest positive by 0.1, 0.2 and 0.4.
    assert [(one["record"], one["document"], one["positive"], one["used"]) for one in findings.suspects] == [
        (2, 10, 100, False),
        (1, 10, 100, False),
    ]


def test_a_search_through_everything_finds_every_positive():
    found = Findings(Rules(negatives=2), num_documents=2, num_suspects=0)
    one = judged([[0.9, 0.8]] * 3, [[0, 0]] * 3, [[0, 0]] * 3, [[]] * 3, [[0.1, 0.2], [0.85], [0.95]], [0.0] * 3)
    found.add(one)
    assert found.ranks[0].tolist() == [3, 2, 1]


def test_a_positive_that_is_the_last_candidate_is_found():
    found = Findings(Rules(negatives=2), num_documents=50, num_suspects=0)
    barred = [[0, 0, 1], [0, 0, 1], [0, 0, 0]]
    # Query 0: its positive is behind two others. Query 1: the last is a copy of a positive above. Query 2: not there.
    own = [[0.3], [0.8, 0.3], [0.2]]
    found.add(judged([[0.9, 0.7, 0.3]] * 3, barred, [[0, 0, 0]] * 3, [[]] * 3, own, [0.0] * 3))
    assert found.ranks[0].tolist() == [3, 2, 0]


@pytest.fixture
def mined(tmp_path, monkeypatch, capsys) -> tuple[Path, list[str]]:
    """A folder with what the command wrote of data with markup in it, and what it printed."""
    monkeypatch.setattr(command, "open_named", lambda arguments: WordEmbedder())
    records, corpus = make_data()
    write_json_lines(tmp_path / "records.jsonl", records)
    write_json_lines(
        tmp_path / "corpus.jsonl", [*corpus, {"id": "<i>", "text": " ".join([records[0]["query"]] * 2 + ["<script>"])}]
    )
    arguments = ["words", tmp_path / "records.jsonl", tmp_path / "out", "--corpus", tmp_path / "corpus.jsonl"]
    assert main(["mine", *map(str, arguments), "--negatives", "3", "--suspects", "40", "--depth", "300"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return tmp_path / "out", printed.out.replace(str(tmp_path), "DIR").splitlines()


def test_the_report_is_what_loops_count(mined):
    folder, printed = mined
    report = json.loads((folder / "report.json").read_text("utf-8"))
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text("utf-8").splitlines()]
    counts = [len(row["neg"]) for row in rows]
    figures = report["figures"]
    assert figures["records"] == len(rows) == 30 and figures["negatives"] == sum(counts)
    assert figures["records_with_too_few_negatives"] == sum(count < 3 for count in counts)
    assert figures["records_without_negatives"] == counts.count(0) > 0
    records, corpus = make_data()
    corpus.append({"id": "<i>", "text": " ".join([records[0]["query"]] * 2 + ["<script>"])})
    ranks, above = [], 0
    for row, everything in zip(rows, mined_by_loops(records, corpus, TOP), strict=True):
        ranks.append(1 + sum(score > max(row["pos_scores"]) for score in everything["neg_scores"]))
        limit = limits(np.array([min(row["pos_scores"])]), Rules())[0]
        above += sum(score >= limit for score in everything["neg_scores"])
    assert figures["candidates_above_the_limit"] == above > 100
    assert figures["positive_in_first_1"] == ranks.count(1)
    assert figures["positive_in_first_10"] == sum(rank <= 10 for rank in ranks)
    assert (
        printed[0].split() == ["records", "30"] and printed[-1] == "DIR/out: records.jsonl, report.html, report.json"
    )
    assert f"without any                      {counts.count(0)} ({counts.count(0) / 30:.1%})" in printed


def test_the_page_shows_texts_and_no_markup_of_theirs(mined):
    folder, _ = mined
    page = (folder / "report.html").read_text("utf-8")
    report = json.loads((folder / "report.json").read_text("utf-8"))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<svg") == 1
    assert 20 < len(report["suspects"]) <= 30
    worst = [one["score"] - one["positive_score"] for one in report["suspects"]]
    assert worst == sorted(worst, reverse=True)
    for one in report["suspects"]:
        assert one["score"] == pytest.approx(float(vector(one["query"]) @ vector(one["document"])))
        assert one["positive_score"] == pytest.approx(float(vector(one["query"]) @ vector(one["positive"])))


def test_no_suspects(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "open_named", lambda arguments: WordEmbedder())
    monkeypatch.setattr(search, "FIRST_CANDIDATES", 1)
    records = [{"query": f"{word} {word}", "pos": [f"{word} {word}"], "neg": []} for word in ("alpha", "beta")]
    write_json_lines(tmp_path / "records.jsonl", records)
    assert main(["mine", "words", str(tmp_path / "records.jsonl"), str(tmp_path / "out"), "--method", "topk"]) == 0
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "None." in page
    assert capsys.readouterr().err == ""


def test_a_line_now_and_then_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "open_named", lambda arguments: WordEmbedder())
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.0)
    records = [{"query": f"{word} x", "pos": [f"{word} y"], "neg": []} for word in ("alpha", "beta", "gamma")]
    write_json_lines(tmp_path / "records.jsonl", records)
    options = ["--method", "topk", "--shard-size", "2"]
    assert main(["mine", "words", str(tmp_path / "records.jsonl"), str(tmp_path / "out"), *options]) == 0
    parts = [f"embed {what}: {done}/3 texts" for what in ("documents", "queries") for done in (2, 3)]
    parts += [f"{what}: {done}/2 shards of queries" for what in ("search", "choose") for done in (1, 2)]
    lines = [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()]
    assert [line for line in lines if not line.startswith(("read ", "hash "))] == parts
