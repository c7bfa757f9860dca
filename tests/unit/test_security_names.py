"""Names that stand in files lead nowhere else; links that a user made are followed; what is written is the owner's."""

from __future__ import annotations

import json
import os
import stat

import datasets
import numpy as np
import pytest
import torch

from nvembed_mcore.checkpoint.hf_folder import WeightsError, check_sums, open_hf_folder
from nvembed_mcore.data.faults import DataError
from nvembed_mcore.data.records import read_records
from nvembed_mcore.evaluation.shards import ShardsError, open_shards
from nvembed_mcore.paths import member, why_unsafe
from tests.helpers import transfer
from tests.helpers.models import tiny_config

OUTSIDE = [
    "../x",
    "a/../../x",
    "/x",
    "..",
    ".",
    "",
    "./x",
    "a//x",
    "x\0",
    "\u2024\u2024/x",
    "\uff0e\uff0e/x",
    "..\u200b/x",
]
OUTSIDE += ["C:/x", "a\\..\\x", "\u2025", "a\uff0fx", "x\n", "x" * 256, "x\ud800", 7, None]
INSIDE = ["x", "a/x", ".x", "x..y", "model-00001-of-00002.safetensors", "\u65e5\u672c.arrow", "with space"]


def test_which_names_lead_out(tmp_path):
    assert [name for name in OUTSIDE if why_unsafe(name) is None] == []
    assert {name: why_unsafe(name) for name in INSIDE} == dict.fromkeys(INSIDE)
    assert member(tmp_path, "a/x", tmp_path / "list") == tmp_path / "a" / "x"
    with pytest.raises(WeightsError) as caught:
        member(tmp_path, "../x", tmp_path / "list", WeightsError)
    reason = "a part of it is empty or only dots"
    assert str(caught.value) == f"{tmp_path / 'list'} names '../x', which is no file of {tmp_path}: {reason}"


@pytest.fixture
def folder(tmp_path):
    """A base model's folder with an index, and good weights outside of it."""
    folder = tmp_path / "outer" / "model"
    transfer.write_folder(folder, tiny_config(num_hidden_layers=1), None, torch.float32)
    return folder


def shards(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["../{}", "{} ", "sub/{}", "\u2024\u2024/{}", "{}\0", "ABSOLUTE"])
def test_an_index_names_files_of_its_folder(folder, name):
    first = shards(folder)[0]
    outside = folder.parent / first
    (folder / first).rename(outside)
    name = str(outside) if name == "ABSOLUTE" else name.format(first)
    index = folder / transfer.INDEX
    content = json.loads(index.read_text())
    content["weight_map"] = {key: name if file == first else file for key, file in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    with pytest.raises(WeightsError) as caught:
        open_hf_folder(folder)
    assert str(index) in str(caught.value) and repr(name) in str(caught.value)


def test_a_folder_of_links_is_as_good_as_its_files(folder):
    """As Hugging Face's cache lays it out."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../blobs/{number}")
    assert open_hf_folder(folder).files == shards(folder)


def test_two_forms_of_weights_are_refused(folder):
    """What is checked would be one of them, and what a library loads the other."""
    (folder / "model.safetensors").write_bytes((folder / shards(folder)[0]).read_bytes())
    with pytest.raises(WeightsError, match="has both model.safetensors and model.safetensors.index.json"):
        open_hf_folder(folder)


def test_sums_of_files_that_nobody_asked_for_are_not_read(tmp_path):
    (tmp_path / "SHA256SUMS").write_text("0  ../secret\n0  /etc/passwd\n")
    os.mkfifo(tmp_path.parent / "secret")  # whoever opened it would wait for ever
    assert check_sums(tmp_path, ["model.safetensors"]) == 0


def saved(folder, rows):
    datasets.Dataset.from_dict({"query": rows, "pos": [["p"]] * len(rows)}).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("name", ["../other/{}", "ABSOLUTE", "\uff0e\uff0e/other/{}"])
def test_a_saved_data_set_has_its_own_files(tmp_path, name):
    folder, other = saved(tmp_path / "saved", ["q"]), saved(tmp_path / "other", ["secret"])
    state = folder / "state.json"
    content = json.loads(state.read_text())
    file = content["_data_files"][0]["filename"]
    name = str(other / file) if name == "ABSOLUTE" else name.format(file)
    state.write_text(json.dumps(content | {"_data_files": [{"filename": name}]}))
    with pytest.raises(DataError) as caught:
        list(read_records(folder))
    assert str(state) in str(caught.value) and repr(name) in str(caught.value)


def test_splits_of_a_saved_data_set_are_its_own_folders(tmp_path):
    saved(tmp_path / "train", ["secret"])
    folder = tmp_path / "splits"
    datasets.DatasetDict(train=datasets.Dataset.from_dict({"query": ["q"], "pos": [["p"]]})).save_to_disk(folder)
    assert [record.query for record in read_records(folder)] == ["q"]
    (folder / "dataset_dict.json").write_text('{"splits": ["../train"]}')
    with pytest.raises(DataError, match=r"dataset_dict.json names '\.\./train'"):
        list(read_records(folder))


@pytest.mark.parametrize(
    "changes",
    [{"format": "npy/../../secret"}, {"dtype": "object"}, {"count": "many"}, {"shard_size": 0}, {"dim": None}],
)
def test_a_manifest_makes_no_names(tmp_path, changes):
    manifest = {"version": 1, "count": 1, "dim": 4, "shard_size": 8, "format": "npy", "dtype": "float32"}
    np.save(tmp_path / "shard-00000.npy", np.zeros((1, 4), np.float32))
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"complete": True}))
    assert open_shards(tmp_path).missing() == []
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"complete": True} | changes))
    with pytest.raises(ShardsError, match=f"{tmp_path / 'manifest.json'}: {next(iter(changes))} must be"):
        open_shards(tmp_path)


def test_a_command_writes_for_its_owner_and_group_alone(tmp_path):
    """Whoever may write into a run's folder may give its next start what it reads."""
    from nvembed_mcore.cli import main

    before = os.umask(0)
    try:
        assert main(["data", "tokenizer", str(tmp_path / "runs" / "tokenizer")]) == 0
        assert os.umask(0) == 0o027
        os.umask(0o077)
        assert main(["data", "tokenizer", str(tmp_path / "private" / "tokenizer")]) == 0
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert len(modes) == 10
    for path, mode in modes.items():
        assert mode & 0o027 == 0, (path, oct(mode))
        assert "private" not in path.parts or mode & 0o077 == 0, (path, oct(mode))
