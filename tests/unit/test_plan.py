"""`nvembed data plan`: exact draws, counts of what is there, and nothing needed of what is not."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
from collections import Counter

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from nvembed_mcore.cli import main
from nvembed_mcore.config import DataConfig, DatasetConfig, ModelConfig, RunConfig
from nvembed_mcore.data.blend import Blend
from nvembed_mcore.data.plan import as_json, count_records, plan_stage
from nvembed_mcore.data.records import read_records
from tests.helpers.runs import record


def config(datasets: list[DatasetConfig], **changes) -> RunConfig:
    fields = dict(blend_temperature=changes.pop("temperature", 1.0), one_dataset_batches=changes.pop("one", False))
    data = DataConfig(tokenizer="nowhere", datasets=datasets, **fields)
    return RunConfig(run_dir="r", steps=37, batch_size=8, data=data, model=ModelConfig(config="nowhere"), **changes)


def write_jsonl(path, count: int) -> str:
    text = "".join(json.dumps(record(i)) + "\n" for i in range(count))
    data = ("\ufeff" + text.replace("\n", "\n\n", 1)).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return str(path)


def write_parquet(path, count: int) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record(i) for i in range(count)]), path)
    return str(path)


def write_csv(path, count: int) -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("query", "positive"), *((f"two\nlines {i}", f"a, b {i}") for i in range(count))])
    return str(path)


def write_tsv(path, count: int) -> str:
    path.write_text("query\tpositive\n" + "".join(f"q {i}\tp {i}\n" for i in range(count)), encoding="utf-8")
    return str(path)


def write_folder(path, count: int) -> str:
    path.mkdir()
    write_jsonl(path / "one.jsonl", count - 3)
    write_jsonl(path / "two.jsonl", 3)
    return str(path)


def write_saved(path, count: int) -> str:
    datasets.Dataset.from_list([record(i) for i in range(count)]).save_to_disk(str(path))
    return str(path)


def write_beir(path, count: int) -> str:
    """Of the queries one has no positive and two are not judged."""
    (path / "qrels").mkdir(parents=True)
    queries = "".join(json.dumps({"_id": f"q{i}", "text": f"query {i}"}) + "\n" for i in range(count + 3))
    (path / "queries.jsonl").write_text(queries, encoding="utf-8")
    (path / "corpus.jsonl").write_text(json.dumps({"_id": "d1", "title": "", "text": "text"}) + "\n", encoding="utf-8")
    rows = ["query-id\tcorpus-id\tscore", *(f"q{i}\td1\t{1 + i % 2}" for i in range(count)), f"q{count}\td1\t0", ""]
    (path / "qrels" / "train.tsv").write_text("\n".join(rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_jsonl),
        ("a.jsonl.gz", write_jsonl),
        ("a.parquet", write_parquet),
        ("a.csv", write_csv),
        ("a.tsv", write_tsv),
        ("folder", write_folder),
        ("saved", write_saved),
        ("beir", write_beir),
    ],
)
def test_counts_are_what_training_reads(tmp_path, name, write):
    path = write(tmp_path / name, 23)
    assert count_records(path) == 23 == sum(1 for _ in read_records(path))


def test_a_last_line_without_an_end_counts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record(0)) + "\n  \n" + json.dumps(record(1)), encoding="utf-8")
    assert count_records(str(path)) == 2


def test_a_query_with_several_positives_counts_once(tmp_path):
    path = write_beir(tmp_path / "beir", 3)
    with (tmp_path / "beir" / "qrels" / "train.tsv").open("a", encoding="utf-8") as file:
        file.write("q1\td2\t1\nq9\td2\t-1\n")
    assert count_records(path) == 3


def test_what_must_be_loaded_is_not_counted(tmp_path):
    assert count_records("hf:somebody/something") is None
    assert count_records(str(tmp_path / "none.jsonl")) is None


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_draws_are_those_of_the_blend(tmp_path, temperature, one):
    """Counted sample by sample, beside the formula."""
    datasets = [
        DatasetConfig(path=write_jsonl(tmp_path / "a.jsonl", 40), max_records=30),
        DatasetConfig(path="missing", max_records=200, task="sts", num_negatives=3),
        DatasetConfig(path="weighted", max_records=50, weight=9.0),
    ]
    plan = plan_stage(config(datasets, temperature=temperature, one=one, stage=2), "c")
    mix = Blend(
        [30, 200, 50], [None, None, 9.0], 8, 5, 1, "other data", temperature=temperature, one_dataset_batches=one
    )
    drawn = Counter(sample.dataset for step in range(37) for sample in mix.samples(step))
    assert [one.draws for one in plan.datasets] == [drawn[0], drawn[1], drawn[2]]
    seen = {(sample.dataset, sample.index) for step in range(37) for sample in mix.samples(step)}
    assert [one.queries for one in plan.datasets] == [sum(d == number for d, _ in seen) for number in range(3)]
    assert [one.epochs for one in plan.datasets] == [drawn[0] / 30, drawn[1] / 200, drawn[2] / 50]
    assert sum(one.share for one in plan.datasets) == pytest.approx(1)
    assert [(one.records, one.used, one.is_counted) for one in plan.datasets] == [
        (40, 30, True),
        (200, 200, False),
        (50, 50, False),
    ]
    assert [one.in_batch_negatives for one in plan.datasets] == [True, False, True]
    assert [one.num_negatives for one in plan.datasets] == [7, 3, 7]


def test_sums_over_the_stages():
    both, late = DatasetConfig(path="a", max_records=100), DatasetConfig(path="b", max_records=300)
    stages = [plan_stage(config([both]), "1"), plan_stage(config([both, late], stage=2), "2")]
    plan = as_json(stages)
    assert plan["sets"] == [
        {"path": "a", "draws": 296 + 74, "epochs": 2.96 + 0.74},
        {"path": "b", "draws": 222, "epochs": 0.74},
    ]
    assert [stage["draws"] for stage in plan["stages"]] == [296, 296]
    assert json.loads(json.dumps(plan)) == plan


def write_yaml(path, run: RunConfig) -> str:
    tree = dataclasses.asdict(run)
    for group, name in (("optim", "betas"), ("loss", "temperature_range")):
        tree[group][name] = list(tree[group][name])
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return str(path)


def test_the_command(tmp_path, capsys):
    data = [DatasetConfig(path=write_jsonl(tmp_path / "a.jsonl", 40)), DatasetConfig(path="b", max_records=60)]
    first = write_yaml(tmp_path / "one.yaml", config(data))
    second = write_yaml(tmp_path / "two.yaml", config(data[1:], stage=2))
    output = tmp_path / "plan.json"
    assert main(["data", "plan", first, second, "--json", str(output)]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if line.strip()]
    assert ["b", "retrieval", "60*", "60.00%", "178", "2.97", "60", "yes", "7"] in rows
    assert ["b", "178", "296", "474", "7.90"] in rows
    assert ["all", "296", "296", "592"] in rows
    plan = json.loads(output.read_text())
    assert plan["stages"][0]["datasets"][0]["draws"] == 118 and plan["stages"][0]["datasets"][0]["is_counted"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "one.yaml", "plan.json", "two.yaml"]
