"""Every file that is read, with something inside that would write a canary: it is refused by name, or only data."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from importlib.resources import files
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml

from nvembed_mcore.checkpoint.hf_folder import check_sums, open_hf_folder, read_json
from nvembed_mcore.checkpoint.hf_load import load_exported
from nvembed_mcore.checkpoint.hf_model import open_hf_model
from nvembed_mcore.checkpoint.peft import open_peft_folder
from nvembed_mcore.checkpoint.store import read_checkpoint
from nvembed_mcore.cli.run_config import read_run_config
from nvembed_mcore.config import LoraConfig, ModelConfig
from nvembed_mcore.data.records import read_records
from nvembed_mcore.data.tokenizer import load_tokenizer
from nvembed_mcore.data.tokens import TokenStore
from nvembed_mcore.evaluation.corpus import Corpus
from nvembed_mcore.evaluation.embedders import open_embedder
from nvembed_mcore.evaluation.search import search_files
from nvembed_mcore.evaluation.shards import open_shards
from nvembed_mcore.log import read_metrics
from nvembed_mcore.mining.approximate import approximate_search, build_index
from nvembed_mcore.mining.run import Mining, mine
from nvembed_mcore.model.mistral import read_mistral_config
from nvembed_mcore.parallel.groups import shutdown
from tests.helpers import payload
from tests.helpers.exports import tiny_bert
from tests.helpers.mining import WordEmbedder, make_data, write_json_lines
from tests.helpers.models import tiny_config
from tests.helpers.transfer import config_json

RUN = {"run_dir": "r", "steps": 2, "data": {"tokenizer": "t", "datasets": [{"path": "p"}]}, "model": {"config": "c"}}


@pytest.fixture
def canary(tmp_path):
    """Must not be there at the end."""
    file = tmp_path / "canary"
    yield file
    assert not file.exists()


def refusal(work) -> str:
    with pytest.raises(ValueError) as caught:
        work()
    return str(caught.value)


def test_the_payloads_work(tmp_path):
    """Or the tests below could not fail."""
    for number, run in enumerate(
        [
            lambda file: pickle.loads(payload.pickled(file)),  # noqa: S301
            lambda file: exec(payload.code(file)),  # noqa: S102
            lambda file: np.load(_saved(payload.objects(file), tmp_path), allow_pickle=True),  # noqa: S301
        ]
    ):
        run(tmp_path / f"canary-{number}")
        assert (tmp_path / f"canary-{number}").exists()


def _saved(array: np.ndarray, folder: Path) -> Path:
    np.save(folder / "saved.npy", array)
    return folder / "saved.npy"


# Configurations


@pytest.mark.parametrize(
    "changes",
    [
        *({part: {"class_path": "evil_module.Model"}} for part in "data model step loss checkpoint log".split()),
        {"model": {"pooling": {"class_path": "evil_module.Model", "init_args": {}}}},
        {"model": {"lora": "evil_module.Model"}},
        {"data": {"tokenizer": "t", "datasets": ["evil_module.Model"]}},
        {"data": {"tokenizer": "t", "datasets": [{"class_path": "evil_module.Model"}]}},
        {"optim": "evil_module.Model"},
        {"eval": ["evil_module.Model"]},
        {"model": {"_target_": "evil_module.Model", "config": "c"}},
        {"model.class_path": "evil_module.Model"},
        {"class_path": "evil_module.Model"},
        {"steps": {"class_path": "evil_module.Model"}},
        {"config": "other.yaml"},
    ],
    ids=str,
)
def test_no_field_of_a_configuration_imports_anything(canary, tmp_path, monkeypatch, changes):
    (tmp_path / "evil_module.py").write_text(payload.code(canary))
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(RUN | changes))
    assert str(file) in refusal(lambda: read_run_config([str(file)]))
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize("tag", ["apply:builtins.open ['{}', 'w']", "name:evil_module.Model", "new:builtins.open {}"])
def test_a_tag_of_yaml_makes_no_object(canary, tmp_path, tag):
    file = tmp_path / "run.yaml"
    file.write_text(f"{yaml.safe_dump(RUN)}seed: !!python/object/{tag.format(canary)}\n")
    assert str(file) in refusal(lambda: read_run_config([str(file)]))


# Files that hold JSON, given a pickle


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", lambda file: read_mistral_config(file)),
        ("any.json", lambda file: read_json(file)),
        ("metrics.jsonl", lambda file: read_metrics(file)),
        ("run.json", lambda file: read_checkpoint(file.parent)),
        ("SHA256SUMS", lambda file: check_sums(file.parent, ["x"])),
        ("texts.json", lambda file: Corpus.open(file.parent)),
        ("manifest.json", lambda file: open_shards(file.parent)),
        ("records.jsonl", lambda file: list(read_records(file))),
        ("records.csv", lambda file: list(read_records(file))),
        ("records.parquet", lambda file: list(read_records(file))),
        ("state.json", lambda file: list(read_records(file.parent))),
        ("tokenizer.json", lambda file: load_tokenizer(file.parent)),
    ],
)
def test_a_pickle_is_none_of_our_files(canary, tmp_path, name, read):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_bytes(payload.pickled(canary) + b"\xff\n")
    assert str(folder) in refusal(lambda: read(folder / name))


def test_a_token_store(canary, tmp_path):
    (tmp_path / "store.json").write_bytes(payload.pickled(canary))
    (tmp_path / "data.arrow").write_bytes(payload.pickled(canary))
    assert "store.json" in refusal(lambda: TokenStore.open(tmp_path))


# Folders of models


@pytest.fixture
def base(tmp_path):
    """A Hugging Face folder without weights."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_json(tiny_config(), None)))
    return folder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_pickled_weights(canary, base, name):
    payload.save_torch(canary, base / name)
    assert name in refusal(lambda: open_hf_folder(base))


def test_pickled_adapters(canary, tmp_path):
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    payload.save_torch(canary, tmp_path / "adapter_model.bin")
    lora = LoraConfig(rank=2, alpha=4, targets=["q"], init_from=str(tmp_path))
    model = ModelConfig(config="c", lora=lora)
    assert "adapter_model.bin" in refusal(lambda: open_peft_folder(model, tiny_config(), "x"))


@pytest.fixture
def export(cases, tmp_path):
    """A copy of an export, to be changed."""
    return Path(shutil.copytree(cases["mean"].folder, tmp_path / "export"))


def change(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_code_beside_an_export_is_not_run(canary, export):
    """Neither the modelling file, which ours replaces, nor what configuration and tokenizer name."""
    for file in export.glob("*.py"):
        file.write_text(payload.code(canary))
    (export / "evil.py").write_text(payload.code(canary))
    change(export / "config.json", auto_map={"AutoModel": "evil.Model", "AutoConfig": "evil.Model"})
    change(export / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]})
    assert load_exported(export) is not None
    assert load_tokenizer(export) is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_attn_implementation_internal", "owner/kernel"),
        ("attn_implementation", {"": "owner/kernel:function"}),
        ("text_config", {"_experts_implementation_internal": "owner/kernel"}),
    ],
)
def test_code_on_a_hub_is_refused(export, name, value):
    raw = json.loads((export / "config.json").read_text())
    change(export / "config.json", **{name: raw["text_config"] | value if name == "text_config" else value})
    assert "code on a hub" in refusal(lambda: open_hf_model(export))
    assert "code on a hub" in refusal(lambda: open_embedder(str(export)))
    shutdown()


def test_modules_of_other_types_are_not_imported(canary, export):
    (export / "evil.py").write_text(payload.code(canary))
    (export / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "evil.Model"}]))
    assert "'evil.Model'" in refusal(lambda: load_exported(export))


def test_adapters_beside_an_export_are_not_loaded(canary, export):
    (export / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/"}))
    payload.save_torch(canary, export / "adapter_model.bin")
    assert "adapter_config.json" in refusal(lambda: load_exported(export))


def test_models_of_sentence_transformers(canary, tmp_path):
    """Code needs a flag, and a revision where it is not a folder's; pickled weights are only tensors."""
    folder = tiny_bert(tmp_path)
    for file in folder.rglob("model.safetensors"):
        payload.save_torch(canary, file.with_name("pytorch_model.bin"))
        file.unlink()
    assert str(folder) in refusal(lambda: open_embedder(f"st:{folder}"))
    (folder / "evil.py").write_text(payload.code(canary))
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "evil.Model"}]))
    assert "names 'evil.Model'" in refusal(lambda: open_embedder(f"st:{folder}"))
    assert "name a revision" in refusal(lambda: open_embedder("st:owner/name", trust_remote_code=True))
    assert "name a revision" in refusal(lambda: open_embedder("st:owner/name@main", trust_remote_code=True))
    shutdown()


def test_exports_name_only_classes_that_travel(cases):
    """sentence-transformers' own, or those of a file of ours that lies beside, word for word."""
    ours = files("nvembed_mcore.checkpoint.hf_files")
    for case in cases.values():
        named = {module["type"] for module in json.loads((case.folder / "modules.json").read_text())}
        named |= set(json.loads((case.folder / "config.json").read_text()).get("auto_map", {}).values())
        for name in named:
            module = name.partition(".")[0]
            if module != "sentence_transformers":
                assert (case.folder / f"{module}.py").read_text() == (ours / f"{module}.py").read_text()


# Arrays, indexes, tables


def test_shards_of_objects(canary, tmp_path):
    manifest = {"version": 1, "count": 1, "dim": 4, "shard_size": 8, "format": "npy", "dtype": "float32"}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"complete": True}))
    np.save(tmp_path / "shard-00000.npy", payload.objects(canary))
    assert "shard-00000.npy" in refusal(lambda: open_shards(tmp_path))
    (tmp_path / "shard-00000.npy").write_bytes(payload.pickled(canary))
    assert "shard-00000.npy" in refusal(lambda: open_shards(tmp_path))


def test_candidates_and_indexes_of_mining(canary, tmp_path):
    records, corpus = make_data(5, 20)
    arguments = dict(records=write_json_lines(tmp_path / "records.jsonl", records), output=str(tmp_path / "mined"))
    mining = Mining(**arguments, corpus=write_json_lines(tmp_path / "corpus.jsonl", corpus))
    mine(WordEmbedder, mining)
    (file,) = mining.work.glob("candidates-*/*.npz")
    good = dict(np.load(file))
    for changes in ({"scores": payload.objects(canary)}, {"documents": good["documents"] + 1000}):
        np.savez(file, **(good | changes))
        assert str(file) in refusal(lambda: mine(WordEmbedder, mining))
    file.write_bytes(payload.pickled(canary))
    assert str(file) in refusal(lambda: mine(WordEmbedder, mining))
    shutdown()
    vectors = [np.eye(4, dtype=np.float32)]
    build_index(vectors, "Flat", tmp_path / "index")
    (tmp_path / "index").write_bytes(payload.pickled(canary))
    assert "is not the index that was written" in refusal(lambda: approximate_search(tmp_path / "index", vectors))


def extended(canary: Path, field: pyarrow.Field) -> pyarrow.Field:
    """The field as one of an extension type whose parameters are a pickle (CVE-2023-47248)."""
    keys = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": payload.pickled(canary)}
    return field.with_metadata(keys)


def test_extension_types_of_arrow_are_data(canary, tmp_path):
    rows = pyarrow.table({"query": ["q"], "pos": [["p"]]})
    rows = rows.cast(pyarrow.schema([extended(canary, field) for field in rows.schema]))
    pyarrow.parquet.write_table(rows, tmp_path / "records.parquet")
    assert [record.query for record in read_records(tmp_path / "records.parquet")] == ["q"]

    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    Corpus.build(tmp_path / "texts.txt", tmp_path / "corpus")
    schema = pyarrow.schema([extended(canary, pyarrow.field(name, pyarrow.large_string())) for name in ("id", "text")])
    with pyarrow.OSFile(str(tmp_path / "corpus" / "texts.arrow"), "wb") as sink:
        with pyarrow.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pyarrow.record_batch([["1", "2"], ["one", "two"]], schema=schema))
    assert list(Corpus.open(tmp_path / "corpus").texts) == ["one", "two"]


def test_a_script_of_datasets_is_not_run(canary, tmp_path):
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text(payload.code(canary))
    (folder / "rows.pkl").write_bytes(payload.pickled(canary))
    assert "scripted" in refusal(lambda: list(read_records(f"hf:{folder}")))


def test_features_of_datasets_are_of_its_own_types(canary, tmp_path):
    datasets.Dataset.from_dict({"query": ["q"], "pos": [["p"]]}).save_to_disk(tmp_path / "saved")
    info = tmp_path / "saved" / "dataset_info.json"
    change(info, features={"query": {"_type": "evil_module.Model"}, "pos": {"_type": "np"}})
    assert str(tmp_path / "saved") in refusal(lambda: list(read_records(tmp_path / "saved")))


def test_python_files_that_are_searched_are_only_parsed(canary, tmp_path):
    (tmp_path / "found.py").write_text(payload.code(canary))
    found = search_files(lambda texts, is_query: torch.ones(len(texts), 2), [tmp_path], "query")
    assert found.num_chunks
