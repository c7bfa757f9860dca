"""Scaling studies: what their files may say, the points that follow, what is submitted, and what points are called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nvembed_mcore.cli import yaml_loader
from nvembed_mcore.data.tokenizer import load_tokenizer
from nvembed_mcore.train import batch_source, build_stores
from tests.helpers import runs

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools" / "scaling"))  # its programs import one another, as they do when they are run

import study_plots  # noqa: E402
import study_runs  # noqa: E402
import study_slurm  # noqa: E402
import study_table  # noqa: E402
from study_spec import StudyError, read_study  # noqa: E402

SERIES = {"name": "a", "weak": 8, "gpus": [1, 2]}
BASE = ROOT / "examples" / "quickstart" / "stage1.yaml"


def written(folder: Path, **fields) -> Path:
    tree = {"base": str(BASE), "output": str(folder / "output"), "gpus_per_node": 2, "series": [SERIES]} | fields
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


def series(**fields) -> dict:
    return {"series": [SERIES | fields]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seris": 1}, "seris is no field of a study"),
        ({"series": []}, "series must be a list with one series at least, got []"),
        ({"base": "nowhere.yaml"}, "cannot read nowhere.yaml"),
        ({"repeats": 0}, "repeats must be a whole number of at least 1, got 0"),
        ({"minutes": "long"}, "minutes must be a number above 0, got 'long'"),
        ({"minutes": True}, "minutes must be a number above 0, got True"),
        ({"cluster": "h300"}, "cluster must be one of a100, b200, cpu, h100, h200, or null, got 'h300'"),
        (series(lengths=[{"synthetic": "yes"}]), "series.0.lengths.0.synthetic must be true or false, got 'yes'"),
        ({"communication_every": 1}, "communication_every must be 0, or at least 2"),
        ({"set": ["x"]}, "set must be fields of the run"),
        (series(strong=8), "series.0 must have one of weak, strong, batch, got ['weak', 'strong']"),
        (series(weak="8"), "series.0.weak must be a whole number of at least 1, or a list of them, got '8'"),
        (series(gpus=[1, 0]), "series.0.gpus must be a whole number"),
        (series(gpus=[3]), "series.0.gpus: 3 are no whole nodes of gpus_per_node = 2"),
        (
            series(layouts={"tp": 2}),
            "series.0.layouts must be a list of mappings of tp, pp, cp, chunks, got {'tp': 2}",
        ),
        (series(layouts=[{"dp": 2}]), "series.0.layouts.0.dp is not known; there are tp, pp, cp, chunks"),
        (series(layouts=[{"tp": 0}]), "series.0.layouts.0.tp must be a whole number of at least 1, got 0"),
        (series(layouts=[{"tp": 4}]), "series.0: no layout divides any of gpus [1, 2]"),
        (series(lengths=[{"queries": 8, "synthetic": True}]), "series.0.lengths.0 is synthetic and must have"),
        ({"series": [SERIES, SERIES]}, "series must have different names, got ['a', 'a']"),
    ],
)
def test_what_a_file_cannot_say_is_named(tmp_path, fields, message):
    file = written(tmp_path, **fields)
    with pytest.raises(StudyError) as error:
        read_study(file)
    assert message in str(error.value) and "study.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (series(precisions=[{"dtype": "float16"}]), "precision.dtype"),
        ({"set": {"step.way": "retain"}, **series(layouts=[{"pp": 2}])}, "parallel.pp"),
        ({"set": {"batch.size": 3}}, "no field 'batch'; did you mean batch_size?"),
        ({"set": {"steps.all": 3}}, "steps of the base configuration holds no fields, but 290"),
    ],
)
def test_what_a_run_cannot_be_is_named_with_its_point(tmp_path, fields, message):
    with pytest.raises(StudyError) as error:
        study_runs.prepare(read_study(written(tmp_path, **fields)))
    assert message in str(error.value) and "study.yaml" in str(error.value)


def test_the_axes_span_the_points(tmp_path):
    axes = dict(
        gpus=[1, 2, 4],
        layouts=[{"tp": 1}, {"tp": 2}, {"tp": 2, "pp": 2}],
        precisions=[{"dtype": "float32"}, {"dtype": "bfloat16"}],
    )
    study = read_study(written(tmp_path, **series(**axes)))
    points = study.points()
    assert len(points) == 2 * (3 + 2 + 1) and study.left_out == 2 * 3
    assert len({point.name for point in points}) == len(points)
    assert {point.queries for point in points} == {8, 16, 32}
    strong = {"name": "s", "strong": 64, "gpus": [1, 4]}
    assert {point.queries for point in read_study(written(tmp_path, series=[strong])).points()} == {64}


def test_a_point_that_is_described_differently_is_another(tmp_path):
    (before, _) = read_study(written(tmp_path)).points()
    (after, _) = read_study(written(tmp_path, set={"optim.lr": 0.001})).points()
    assert before.name != after.name and before.name.rpartition("-")[0] == after.name.rpartition("-")[0]


@pytest.mark.parametrize("every", [0, 2, 3, 4, 7])
def test_enough_steps_are_measured(tmp_path, every):
    study = read_study(written(tmp_path, communication_every=every, steps=5, warmup_steps=3))
    timed = [study.times_communication(step) for step in range(4, study.all_steps + 1)]
    assert any(timed) == (every > 0)
    # No more than the one that times communication asks for.
    assert timed.count(False) == 5 or (timed[-1] and not any(timed[:-1]))


def test_every_group_of_the_log_is_read():
    """As `Traffic.table` writes them; gradients go over the last one where texts are shared."""
    groups = ["tensor", "all", "data and context"]
    lines = [f"  reduce_scatter over {group} ranks: 3 x, 1.500 MB" for group in groups]
    assert [group for _, group, _ in study_table._TRAFFIC.findall("\n".join(lines))] == groups


def test_texts_that_are_made_fill_their_limits(tmp_path):
    lengths = [{"queries": 5, "documents": 9, "synthetic": True}]
    study = read_study(written(tmp_path, **series(lengths=lengths)))
    study_runs.prepare(study)
    file = tmp_path / "output" / "texts" / "5-9.jsonl"
    records = [yaml_loader.load(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(records) == 16, "the largest batch"
    assert {len(one["query"].split()) for one in records} == {5}
    assert {len(one["pos"][0].split()) for one in records} == {9} and records[0]["neg"] == []
    config = yaml_loader.load(study_runs.runs_of(study)[0].config.read_text(encoding="utf-8"))
    assert config["data"]["max_document_tokens"] == 9
    assert config["data"]["datasets"] == [{"path": str(file), "instruction": "", "num_negatives": 0}]


def test_an_array_for_each_number_of_nodes_and_the_report_behind(tmp_path, monkeypatch):
    calls = []

    def run(words, **_):
        calls.append(words)
        return subprocess.CompletedProcess(words, 0, stdout=f"{100 + len(calls)};cluster\n")

    monkeypatch.setattr(study_slurm.subprocess, "run", run)
    study = read_study(written(tmp_path, repeats=3, **series(gpus=[1, 2, 4])))
    jobs = study_slurm.submit(study, study_runs.runs_of(study), ["-A", "me"], lambda text: None)
    assert jobs == ["101", "102", "103", "104"]
    shapes = [[word for word in call if word.startswith(("--array", "--nodes", "--ntasks-per"))] for call in calls]
    assert shapes[0] == ["--array=1-3%1", "--nodes=1", "--ntasks-per-node=1"]
    assert shapes[1] == ["--array=1-3%1", "--nodes=1", "--ntasks-per-node=2"]
    assert shapes[2] == ["--array=1-3%1", "--nodes=2", "--ntasks-per-node=2"]
    assert "--dependency=afterany:101" in calls[1] and "--dependency=afterany:101:102:103" in calls[3]
    assert all(call[call.index("-A") + 1] == "me" for call in calls)
    tasks = Path(calls[2][-1]).read_text(encoding="utf-8").splitlines()
    assert [line.split("\t")[1][-8:] for line in tasks] == ["repeat-1", "repeat-2", "repeat-3"]


def test_labels_say_what_differs():
    row = dict(device="cpu", gpus=2, tp=2, pp=1, cp=1, dp=1, chunks=1, dtype="float32", fp8="off")
    row |= dict(query_tokens=64, document_tokens=128, queries=32)
    other = row | dict(gpus=1, tp=1, queries=16)
    assert study_plots.label(row, [row, other]) == "2 processes, TP 2, batch 32"
    assert study_plots.label(other, [row, other]) == "1 process, batch 16"
    wide = row | dict(device="NVIDIA H200", gpus=64, pp=4, dp=8, chunks=2, document_tokens=512, dtype="bfloat16")
    assert study_plots.label(wide, [wide, row | {"device": "NVIDIA H200"}]) == (
        "64 GPUs, TP 2 x PP 4 x DP 8 x 2 chunks, bfloat16, 64/512 tokens"
    )


@pytest.mark.parametrize("name", ["cpu", "h200"])
def test_the_examples_can_be_read(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = read_study(Path("examples/scaling") / f"{name}.yaml")
    kinds = {point.kind for point in study.points()}
    assert kinds == {"weak", "strong", "batch"} and study.cluster == name


def test_a_study_whose_tokenizer_is_nowhere_does_not_start(tmp_path, capsys, monkeypatch):
    import study

    file = written(tmp_path, set={"data.tokenizer": str(tmp_path / "none")})
    monkeypatch.setattr(sys, "argv", ["study.py", "run", str(file)])
    assert study.main() == 78
    assert f"no tokenizer folder at {tmp_path / 'none'} (`nvembed data tokenizer" in capsys.readouterr().err
    assert not [*(tmp_path / "output").rglob("*.log")], "no run was started"


def test_what_is_predicted_are_the_batches_that_are_measured(tmp_path):
    """The real texts of steps 2 and 4, padded with nothing to the larger batch."""
    import study_predict

    config = runs.run_config(runs.write_inputs(tmp_path, with_words=True), tmp_path / "run")
    found = study_predict.lengths_of(config, [2, 4])
    source = batch_source(config, build_stores(config.data, load_tokenizer(config.data.tokenizer)))
    for row, step in enumerate((2, 4)):
        batch = source.batch(step - 1)
        texts = len(batch.texts)
        assert found.tokens[row, :texts].tolist() == [len(text) for text in batch.texts]
        assert not found.tokens[row, texts:].any()
        assert found.query[row, :9].tolist() == [*range(9)]
        assert found.is_positive[row].sum() == batch.is_positive.sum()
    assert found.tokens[0].tolist() != found.tokens[1].tolist(), "two steps have other texts"
