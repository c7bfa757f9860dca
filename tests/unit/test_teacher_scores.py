"""A teacher's scores on their way from a file to the batch of a step, and what is said where they are wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nvembed_mcore.config import ConfigError, DataConfig, DatasetConfig, DistillationConfig, LossConfig
from nvembed_mcore.data.check.sets import check_sets
from nvembed_mcore.data.check.show import lines
from nvembed_mcore.data.convert import convert
from nvembed_mcore.data.decontaminate import decontaminate
from nvembed_mcore.data.faults import DataError
from nvembed_mcore.data.records import read_records
from nvembed_mcore.data.source import BatchSource
from nvembed_mcore.data.tokenizer import load_tokenizer
from nvembed_mcore.data.tokens import TokenStore
from tests.helpers import runs

GOOD = {"query": "q", "pos": ["p", "r"], "neg": ["n"], "pos_scores": [0.5, 2], "neg_scores": [-1.25]}
LIMITS = dict(max_query_tokens=32, max_document_tokens=32, processes=1)


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(count: int) -> list[dict]:
    """Record `i` has `1 + i % 3` negatives; the score of document `j` of all says which it is."""
    made, number = [], 0
    for i in range(count):
        counts = {"pos": 1 + i % 2, "neg": 1 + i % 3}
        row: dict = {"query": f"question {i}"}
        for name, many in counts.items():
            row[name] = [f"text {number + j}" for j in range(many)]
            row[f"{name}_scores"] = [float(number + j) for j in range(many)]
            number += many
        made.append(row)
    return made


FAULTS = {
    "one too few": ({**GOOD, "pos_scores": [1]}, "pos_scores", "pos_scores has 1 scores for the 2 texts of pos"),
    "one too many": ({**GOOD, "neg_scores": [1, 2]}, "neg_scores", "neg_scores has 2 scores for the 1 texts of neg"),
    "one list only": ({**GOOD, "neg_scores": None}, "pos_scores", "neg_scores is missing beside pos_scores"),
    "no list": ({**GOOD, "neg_scores": 0.5}, "neg_scores", "neg_scores must be a list of numbers, got a number"),
    "a string": ({**GOOD, "pos_scores": [1, "2"]}, "pos_scores", "pos_scores[1] must be a number, got a string"),
    "true": ({**GOOD, "neg_scores": [True]}, "neg_scores", "neg_scores[0] must be a number, got true"),
    "not a number": (
        {**GOOD, "neg_scores": [float("nan")]},
        "neg_scores",
        "neg_scores[0] must be a finite number of float32, got nan",
    ),
    "too large": (
        {**GOOD, "neg_scores": [10**60]},
        "neg_scores",
        "neg_scores[0] must be a finite number of float32, got 1e+60",
    ),
}


@pytest.mark.parametrize(("row", "field", "reason"), FAULTS.values(), ids=FAULTS)
def test_faults_have_their_place(tmp_path, row, field, reason):
    path = write(tmp_path / "a.jsonl", GOOD, row)
    column = path.read_text().splitlines()[1].index(f'"{field}": ') + len(f'"{field}": ') + 1
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    assert str(caught.value).splitlines()[1:] == [f"  {path}:2:{column}: {reason}"]


def test_scores_in_one_column_of_sentence_transformers(tmp_path):
    row = {"query": "q", "positive": "p", "negative": "n", "scores": [1.0, 2.0, 3.0]}
    path = write(tmp_path / "a.jsonl", row)
    column = path.read_text().index("[1.0") + 1
    with pytest.raises(DataError, match=f":1:{column}: scores has 3 scores for 1 positives and 1 negatives"):
        list(read_records(path))
    del row["scores"]
    path.write_text(json.dumps({**row, "label": [1.0, float("inf")]}))
    with pytest.raises(DataError, match=rf":1:{column - 1}: neg_scores\[0\] must be a finite.*\(of label\)"):
        list(read_records(path))


def test_scores_of_a_table_and_of_blank_negatives(tmp_path):
    (tmp_path / "a.csv").write_text(
        'query,pos,neg,pos_scores,neg_scores\nq,p,"[""a"", "" "", ""b""]",0.5,"[1, 2, 3]"\nq2,p2,,,\n'
    )
    first, second = read_records(tmp_path / "a.csv")
    assert (first.pos_scores, first.neg, first.neg_scores) == ((0.5,), ("a", "b"), (1.0, 3.0))
    assert second.scores == {}
    (tmp_path / "b.csv").write_text("query,pos,pos_scores\nq,p,high\n")
    with pytest.raises(DataError, match="b.csv:2:5: pos_scores: neither a number nor a JSON list.*'high'"):
        list(read_records(tmp_path / "b.csv"))


def test_conversions_keep_the_scores_of_the_documents_they_keep(tmp_path):
    leak = {**GOOD, "pos": ["p", "r"], "neg": ["n", "m"], "neg_scores": [1, 2], "query": "another"}
    path = write(tmp_path / "a.jsonl", GOOD, leak)
    against = [write(tmp_path / "e.jsonl", {"text": "n"})]
    decontaminate(path, tmp_path / "b.jsonl", against=against, threshold=None, documents=True)
    kept = [(one.pos_scores, one.neg_scores) for one in read_records(tmp_path / "b.jsonl")]
    assert kept == [((0.5, 2.0), ()), ((0.5, 2.0), (2.0,))]
    repeated = {"query": "q", "pos": "p", "neg": ["p", "n"], "pos_scores": [7], "neg_scores": [8, 9]}
    convert("pairs", [write(tmp_path / "c.jsonl", repeated, {"query": "q", "pos": "p"})], tmp_path / "d.jsonl")
    assert [one.scores for one in read_records(tmp_path / "d.jsonl")] == [
        {"pos_scores": (7.0,), "neg_scores": (9.0,)},
        {},
    ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(runs.write_inputs(tmp_path_factory.mktemp("inputs")) / "tokenizer")


def test_from_the_file_to_the_batch(tmp_path, tokenizer):
    """Chosen positives and negatives have their own scores; a data set without has none, and the order is the same."""
    path, bare = write(tmp_path / "a.jsonl", *rows(12)), write(tmp_path / "b.jsonl", *rows(6))
    datasets = [
        DatasetConfig(path=str(path), num_negatives=2, weight=1.0),
        DatasetConfig(path=str(bare), num_negatives=2, weight=1.0, distill=False),
    ]
    config = DataConfig(tokenizer="unused", datasets=datasets)
    sources = {}
    for with_scores in (False, True):
        how = dict(**LIMITS, cache_dir=tmp_path / "cache")
        stores = [TokenStore.build(one, tokenizer, **how, with_scores=with_scores and one.distill) for one in datasets]
        assert len(stores[0]) == 12
        sources[with_scores] = BatchSource(config, stores, batch_size=4, seed=1, stage=1)
    assert sources[False].fingerprint == sources[True].fingerprint
    for step in range(6):
        plain, scored = (sources[with_scores].batch(step) for with_scores in (False, True))
        assert plain.teacher_scores is None
        assert [one.token_ids.tolist() for one in plain.texts] == [one.token_ids.tolist() for one in scored.texts]
        found = scored.teacher_scores
        assert np.array_equal(np.isnan(found), scored.dataset[scored.passage_query] == 1)
        for text, score in zip(scored.texts[scored.num_queries :], found, strict=True):
            words = tokenizer.decode(text.token_ids, skip_special_tokens=True)
            assert np.isnan(score) or int(words.replace(" ", "").removeprefix("text")) == int(score)


def test_a_record_without_scores_is_refused_at_the_start(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", GOOD, {"query": "q2", "pos": ["p"]}, GOOD, {"query": "q3", "pos": ["p"]})
    how = dict(**LIMITS, cache_dir=tmp_path / "cache", with_scores=True)
    dataset = DatasetConfig(path=str(path))
    with pytest.raises(DataError) as caught:
        TokenStore.build(dataset, tokenizer, **how)
    first, *bad = str(caught.value).splitlines()
    assert first.startswith(f"{path} has 2 bad lines")
    assert [line.partition(": pos_scores is missing")[0] for line in bad] == [f"  {path}:2:1", f"  {path}:4:1"]
    assert all(word in bad[0] for word in ("loss.distillation", "nvembed data score", "data.datasets.distill: false"))
    assert len(TokenStore.build(dataset, tokenizer, **how, max_bad_records=2)) == 2


def test_the_check_of_data_says_what_the_scores_are_like(tmp_path):
    path = write(
        tmp_path / "a.jsonl", GOOD, {**GOOD, "query": "q2", "neg_scores": [0.5]}, {"query": "q3", "pos": ["s"]}
    )
    how = dict(**LIMITS, tokenizer=None)
    report = check_sets([DatasetConfig(path=str(path))], **how)
    said = (
        "a.jsonl: a teacher's scores of 2 of 3 records (1 with a negative as high as a positive): positives from 0.5 "
        "to 2, negatives from -1.25 to 0.5"
    )
    assert said in list(lines(report)) and not report.refusals
    found = report.as_dict()["datasets"][0]
    assert found["teacher_scores"] == dict(records=2, disputed=1, pos_scores=[0.5, 2.0], neg_scores=[-1.25, 0.5])
    assert [(one["kind"], one["count"], one["of"]) for one in found["warnings"] if "scores" in one["kind"]] == [
        ("missing_scores", 1, 3)
    ]
    refused = check_sets([DatasetConfig(path=str(path))], **how, needs_scores=True)
    assert f"{path}:3:1: pos_scores is missing" in refused.refusals[0]
    spared = check_sets([DatasetConfig(path=str(path), distill=False)], **how, needs_scores=True)
    assert not spared.refusals


def test_a_run_with_nothing_to_distil_is_refused(tmp_path):
    config = runs.run_config(tmp_path, tmp_path / "run")
    loss = LossConfig(distillation=DistillationConfig(weight=1.0, teacher_temperature=1.0))
    for changes in (dict(distill=False), dict(num_negatives=0)):
        datasets = [replace(one, **changes) for one in config.data.datasets]
        with pytest.raises(ConfigError, match="loss.distillation.weight is 1.0, but no data set"):
            replace(config, loss=loss, data=replace(config.data, datasets=datasets))
