"""What `nvembed data plan` refuses, by its exact message."""

from __future__ import annotations

import pytest
import yaml

from nvembed_mcore.cli import main

BASE = {"run_dir": "r", "steps": 5, "batch_size": 8, "model": {"config": "c"}}


def dataset(**fields):
    return {"path": "TMP/none.jsonl", **fields}


@pytest.mark.parametrize(
    ("datasets", "more", "message"),
    [
        (
            [dataset(max_records=9), dataset(path="hf:some/set")],
            {},
            "TMP/run.yaml: data.datasets.1: nothing to count at hf:some/set, and max_records is null; make the file, "
            "or give the number to expect",
        ),
        (
            [dataset(max_records=5)],
            {},
            "TMP/run.yaml: batch_size must be between 1 and the 5 records of the data, got 8",
        ),
        (
            [dataset(max_records=5), dataset(path="b", max_records=5, weight=100.0)],
            {},
            "TMP/run.yaml: a batch of 8 takes up to 8 records of data set b, which has 5: lower batch_size or its "
            "weight",
        ),
        (
            [dataset(max_records=5), dataset(path="b", max_records=50)],
            {"one_dataset_batches": True},
            "TMP/run.yaml: a batch of 8 takes up to 8 records of data set TMP/none.jsonl, which has 5: lower "
            "batch_size",
        ),
        ([dataset(path="TMP/broken.parquet")], {}, "cannot read TMP/broken.parquet as Parquet: "),
        ([dataset(path="TMP/beir")], {}, "no data file at TMP/beir/qrels/train.tsv"),
        (
            [dataset(path="TMP/run.yaml")],
            {},
            "TMP/run.yaml: a data file ends in .jsonl, .json, .csv, .tsv or .parquet; of text also in .gz, .bz2, .xz "
            "or .zst behind that",
        ),
    ],
)
def test_refused(capsys, tmp_path, datasets, more, message):
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    (tmp_path / "beir").mkdir()
    for name in ("corpus.jsonl", "queries.jsonl"):
        (tmp_path / "beir" / name).touch()
    tree = BASE | {"data": {"tokenizer": "t", "datasets": datasets} | more}
    text = yaml.safe_dump(tree).replace("TMP", str(tmp_path))
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert main(["data", "plan", str(tmp_path / "run.yaml"), "--json", str(tmp_path / "out.json")]) == 78
    error = capsys.readouterr().err.replace(str(tmp_path), "TMP")
    if message.endswith(": "):  # what follows is of the library
        assert error.startswith(f"nvembed: error: {message}")
    else:
        assert error == f"nvembed: error: {message}\n"
    assert not (tmp_path / "out.json").exists()


def test_a_configuration_that_is_not_there(capsys, tmp_path):
    assert main(["data", "plan", str(tmp_path / "none.yaml")]) == 78
    assert capsys.readouterr().err == f"nvembed: error: no configuration file at {tmp_path}/none.yaml\n"


def test_a_configuration_that_is_no_text(capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"run_dir: \xff\n")
    assert main(["data", "plan", str(path)]) == 78
    assert capsys.readouterr().err == (
        f"nvembed: error: 'utf-8' codec can't decode byte 0xff in position 9: invalid start byte\n(in {path})\n"
    )
