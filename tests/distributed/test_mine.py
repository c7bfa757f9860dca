"""`nvembed mine` with a trained model: any number of processes writes the same files."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from nvembed_mcore.cli import main
from nvembed_mcore.data.records import read_records
from nvembed_mcore.train import train
from tests.helpers import runs
from tests.helpers.mining import write_json_lines


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """A run of two steps in `run`, and a corpus that holds copies of positives under other ids."""
    folder = runs.write_inputs(tmp_path_factory.mktemp("mine"))
    config = runs.run_config(folder, folder / "run", steps=2)
    world(1).run(train, dataclasses.replace(config, eval=dataclasses.replace(config.eval, path=None)))
    texts = [runs.record(number)["pos"][0] for number in range(40)]
    rows = [{"id": f"d{number}", "text": text} for number, text in enumerate(texts)]
    rows += [{"id": f"copy{number}", "text": text.title() + " "} for number, text in enumerate(texts)]
    write_json_lines(folder / "corpus.jsonl", rows)
    return folder


def mine(world, folder, size, output, *options):
    arguments = ["mine", folder / "run", folder / "train.jsonl", folder / output, "--corpus", folder / "corpus.jsonl"]
    options = ["--shard-size", 9, "--tokens-per-pack", 100, "--negatives", 3, *options]
    return world(size).run(main, list(map(str, [*arguments, *options])))


def files_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


@pytest.fixture(scope="module")
def alone(world, folder):
    assert mine(world, folder, 1, "alone") == [0]
    return folder / "alone"


def test_any_number_of_ranks_writes_the_same_files(world, folder, alone):
    assert mine(world, folder, 2, "together") == [0, 0]
    assert sorted(files_of(alone)) == ["records.jsonl", "report.html", "report.json"]
    assert files_of(folder / "together") == files_of(alone)


def test_a_teacher_scores_as_mining_does(world, folder, alone):
    """`data score` on any number of ranks, of the records that `mine` wrote with the scores of the same model."""
    mined, options = alone / "records.jsonl", ["--teacher", folder / "run", "--tokens-per-pack", 100]
    for size in (1, 2):
        command = ["data", "score", mined, folder / f"scored-{size}.jsonl", *options]
        assert world(size).run(main, list(map(str, command))) == [0] * size
        assert not (folder / f"scored-{size}.jsonl.work").exists()
    assert (folder / "scored-2.jsonl").read_bytes() == (folder / "scored-1.jsonl").read_bytes()
    for scored, record in zip(read_records(folder / "scored-2.jsonl"), read_records(mined), strict=True):
        assert dataclasses.replace(scored, pos_scores=None, neg_scores=None) == dataclasses.replace(
            record, pos_scores=None, neg_scores=None
        )
        for name, values in record.scores.items():
            assert scored.scores[name] == pytest.approx(values, abs=2e-6)


def test_negatives_are_below_the_limit_and_no_copies(folder, alone):
    rows = [json.loads(line) for line in (alone / "records.jsonl").read_text("utf-8").splitlines()]
    for number, (row, record) in enumerate(zip(rows, read_records(folder / "train.jsonl"), strict=True)):
        assert (row["query"], tuple(row["pos"]), row["pos_ids"]) == (record.query, record.pos, [f"d{number}"])
        assert not {f"d{number}", f"copy{number}"} & set(row["neg_ids"])
        assert len(row["neg_ids"]) == len(row["neg"]) == len(row["neg_scores"]) <= 3
        assert all(score < 0.95 * row["pos_scores"][0] + 1e-6 for score in row["neg_scores"])
        # Of a document and its copy one is enough.
        assert len({name.lstrip("copyd") for name in row["neg_ids"]}) == len(row["neg_ids"])
    assert sum(len(row["neg"]) == 3 for row in rows) > 10


def test_another_number_of_ranks_goes_on(world, folder, alone):
    shutil.copytree(alone, folder / "broken")
    for path in ("records.jsonl", "report.html", "report.json", "work/documents/shard-00004.npy"):
        (folder / "broken" / path).unlink()
    for path in sorted((folder / "broken" / "work").glob("candidates-*/shard-*"))[1:4]:
        path.unlink()
    assert mine(world, folder, 2, "broken") == [0, 0]
    assert files_of(folder / "broken") == files_of(alone)


def test_a_model_in_two_processes(world, folder, alone):
    assert mine(world, folder, 2, "tensor", "--tp", "2") == [0, 0]
    figures = [json.loads((path / "report.json").read_text())["figures"] for path in (alone, folder / "tensor")]
    assert figures[0]["records"] == figures[1]["records"] == 40
    assert figures[0]["scores"]["positives"]["mean"] == pytest.approx(
        figures[1]["scores"]["positives"]["mean"], abs=1e-5
    )


def test_what_cannot_be_done_ends_all_ranks(world, folder, alone):
    (folder / "empty.jsonl").write_text("")
    assert mine(world, folder, 2, "refused", "--corpus", folder / "empty.jsonl") == [78, 78]
    assert files_of(folder / "refused") == {}
