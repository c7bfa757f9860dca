"""A checkpoint is data: what it would have a reader call is not called, wherever it stands."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from nvembed_mcore.checkpoint import store
from nvembed_mcore.checkpoint.reader import StateReader, load_state
from nvembed_mcore.checkpoint.store import CheckpointError
from nvembed_mcore.checkpoint.weights_store import save_weights
from nvembed_mcore.config import ParallelConfig
from nvembed_mcore.parallel.groups import initialize
from tests.helpers.checkpoints import seal
from tests.helpers.models import tiny_config


class Payload:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(touched: Path) -> dict[str, object]:
    code = f"open({str(touched)!r}, 'w').close()"
    return {
        "system": Payload(os.system, f"touch {touched}"),
        "eval": Payload(eval, code),
        "exec": Payload(exec, code),
        "open": Payload(open, str(touched), "w"),
        "nested": {"a": [1, {"b": Payload(os.system, f"touch {touched}")}]},
        "getattr": Payload(getattr, Payload(__import__, "os"), "system"),
        "load": Payload(torch.load, Payload(io.BytesIO, pickle.dumps(Payload(os.system, f"touch {touched}")))),
    }


NAMES = sorted(payloads(Path("x")))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint of two tensors."""
    initialize(ParallelConfig())
    facts = {"step": 0, "config": {"loss": {}, "model": {"pooling": {}}}, "hf_config": tiny_config().to_dict()}
    shapes = {name: ((3, 4), torch.float32) for name in ("a", "b")}
    save_weights(tmp_path / "saved", shapes, lambda name: torch.ones(3, 4), facts)
    return tmp_path / "saved"


def assert_refused(folder: Path, touched: Path, match: str) -> None:
    """By every way to read it, although its manifest agrees with what is there."""
    seal(folder)
    for read in (
        lambda: load_state(folder, {}, is_partial=True),
        lambda: StateReader(folder / "state") and load_state(folder, {}, is_partial=True),
        lambda: store.open_weights(store.read_checkpoint(folder))("a"),
        lambda: store.stored_tensors(store.read_checkpoint(folder)),
    )[: 4 if ".metadata" in match else 1]:
        with pytest.raises(CheckpointError, match=match):
            read()
    assert not touched.exists()


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_contents(folder, tmp_path, name):
    touched = tmp_path / "touched"
    (folder / "state" / ".metadata").write_bytes(pickle.dumps(payloads(touched)[name]))
    assert_refused(folder, touched, r"cannot read .*\.metadata: .* names ")


@pytest.mark.parametrize("name", NAMES)
def test_deep_in_the_table_of_contents(folder, tmp_path, name):
    touched, writer = tmp_path / "touched", FileSystemWriter(folder / "state")
    metadata = FileSystemReader(folder / "state").read_metadata()
    metadata.planner_data = {"x": (payloads(touched)[name],)}
    with open(writer.path / ".metadata", "wb") as file:
        pickle.dump(metadata, file)
    assert_refused(folder, touched, r"cannot read .*\.metadata: .* names ")


@pytest.mark.parametrize("name", NAMES)
def test_common_values(folder, tmp_path, name):
    touched = tmp_path / "touched"
    torch.save({"optimizer": payloads(touched)[name]}, folder / "state" / "common.pt")
    assert_refused(folder, touched, r"cannot read .*common\.pt")
    with zipfile.ZipFile(folder / "state" / "common.pt") as archive:
        assert any(one.endswith("data.pkl") for one in archive.namelist()), "it was a file of torch"
    (folder / "state" / "common.pt").write_bytes(pickle.dumps(payloads(touched)[name]))
    assert_refused(folder, touched, r"cannot read .*common\.pt")


@pytest.mark.parametrize("name", NAMES)
def test_an_object_beside_the_tensors(folder, tmp_path, name):
    touched = tmp_path / "touched"
    asked = ShardedObject("thing", None, (1,), (0,), 0)
    metadata = FileSystemReader(folder / "state").read_metadata()
    content = io.BytesIO()
    torch.save([payloads(touched)[name]], content)
    file = folder / "state" / "__0_0.distcp"
    info = next(iter(metadata.storage_data.values()))
    place = type(info)(file.name, file.stat().st_size, len(content.getvalue()))
    metadata.state_dict_metadata[asked.unique_key] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(asked.unique_key)] = place
    file.write_bytes(file.read_bytes() + content.getvalue())
    with open(folder / "state" / ".metadata", "wb") as table:
        pickle.dump(metadata, table)
    seal(folder)
    with pytest.raises(CheckpointError, match=r"cannot read the tensors of .*saved"):
        load_state(folder, {"thing": asked}, is_partial=True)
    assert not touched.exists()


def test_a_table_of_contents_that_names_files_elsewhere(folder):
    metadata = FileSystemReader(folder / "state").read_metadata()
    next(iter(metadata.storage_data.values())).relative_path = "../../outside.distcp"
    with open(folder / "state" / ".metadata", "wb") as file:
        pickle.dump(metadata, file)
    with pytest.raises(CheckpointError, match=r"in a file named '../../outside.distcp'"):
        StateReader(folder / "state")
