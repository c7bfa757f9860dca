"""`nvembed inspect`: what it says of each kind of folder, from headers alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from nvembed_mcore.checkpoint.contents import inspect_folder
from nvembed_mcore.checkpoint.hf_folder import WeightsError
from nvembed_mcore.cli import main
from nvembed_mcore.config import PoolingConfig
from nvembed_mcore.log import close_logging
from nvembed_mcore.resume import plain
from tests.helpers import runs, transfer
from tests.helpers.models import tiny_config

POOLING = PoolingConfig(num_latents=6, num_heads=4, head_width=12)
CONFIG = tiny_config(vocab_size=32000, num_hidden_layers=2)
LAYER = 96 * 32 + 32 * 64 + 3 * 64 * 32 + 2 * 32
"""Parameters of one of its layers: queries, keys and values; output; feed-forward; norms."""
HEAD = 6 * 32 + 2 * 48 * 32 + 96 * 32 + (32 * 256 + 256) + (128 * 32 + 32) + 6 * 32


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """An NV-Embed folder, what import-hf makes of it, and a run of one step that starts from that."""
    root = tmp_path_factory.mktemp("inspect")
    inputs = runs.write_inputs(root / "inputs")
    transfer.write_folder(root / "nv-embed", CONFIG, POOLING, torch.bfloat16, num_shards=3)
    tokenizer = ["--tokenizer", str(inputs / "tokenizer")]
    assert main(["import-hf", str(root / "nv-embed"), str(root / "imported"), *tokenizer]) == 0
    tree = plain(runs.run_config(inputs, root / "run", steps=1, stage=2))
    tree["model"] |= {"config": None, "init_from": str(root / "imported")}
    tree["eval"]["path"] = None
    (root / "run.yaml").write_text(yaml.safe_dump(tree))
    assert main(["train", str(root / "run.yaml")]) == 0
    close_logging()
    return root


def test_a_hugging_face_folder(room):
    found = inspect_folder(room / "nv-embed")
    assert (found["kind"], found["architecture"]) == ("Hugging Face model", "NVEmbedModel")
    assert found["parameters"] == {
        **{"embedding": 32000 * 32, "layers": 2 * LAYER, "head": HEAD, "adapters": 0, "other": 32},
        "all": 32000 * 32 + 2 * LAYER + HEAD + 32,
    }
    assert found["dtypes"] == {"bfloat16": found["parameters"]["all"]}
    assert found["tensors"]["latent_attention_model.latents"] == {"shape": [6, 32], "dtype": "bfloat16"}
    assert len(found["files"]) == 3
    assert found["bytes"] == sum(file.stat().st_size for file in (room / "nv-embed").glob("*.safetensors"))
    assert found["missing"] == ["tokenizer.json", "tokenizer_config.json"]
    assert (
        found["about"]["rope_theta"] == 10000.0 and found["about"]["latent_attention_config"]["cross_dim_head"] == 12
    )


def test_an_imported_checkpoint(room):
    found = inspect_folder(room / "imported")
    assert (found["kind"], found["architecture"]) == ("checkpoint", "NVEmbedModel")
    assert found["parameters"]["all"] == inspect_folder(room / "nv-embed")["parameters"]["all"]
    assert found["tensors"]["decoder.layers.1.input_layernorm.weight"] == {"shape": [32], "dtype": "bfloat16"}
    about = found["about"]
    assert about["step"] == 0 and about["optimizer tensors"] == 0 and about["pooling"]["num_latents"] == 6
    assert about["imported_from"]["folder"] == "nv-embed" and len(about["imported_from"]["fingerprint"]) == 64
    assert len(about["tokenizer"]) == 64 and found["missing"] == []
    assert found["trained_from"] == [str(room / "nv-embed")]


def test_a_run_says_what_it_was_trained_from(room):
    found = inspect_folder(room / "run")
    assert found["path"].endswith("run/checkpoints/step-00000001")
    assert found["dtypes"] == {"float32": found["parameters"]["all"]}, "moments do not count"
    about = found["about"]
    assert about["step"] == 1 and about["stage"] == 2 and about["parallel"]["tp"] == 1
    assert about["precision"] == {"dtype": "auto", "fp8": "off", "fp8_attention": "off"}
    assert about["hardware"]["world_size"] == 1 and len(about["data"]) >= 32
    assert about["optimizer tensors"] == 3 * len(found["tensors"])
    assert found["trained_from"] == [str(room / "imported"), str(room / "nv-embed")]
    assert inspect_folder(found["path"]) == found


def test_adapters(room, tmp_path):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": str(room / "nv-embed")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{prefix}A.weight": torch.zeros(4, 32), f"{prefix}B.weight": torch.zeros(64, 4)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    found = inspect_folder(tmp_path)
    assert found["kind"] == "PEFT adapters" and found["about"]["r"] == 4
    assert found["parameters"]["adapters"] == found["parameters"]["all"] == 4 * 32 + 64 * 4
    assert found["trained_from"] == [str(room / "nv-embed")]


def test_a_missing_shard_is_listed(tmp_path):
    tensors = transfer.write_folder(tmp_path / "folder", tiny_config(), None, torch.float32)
    (tmp_path / "folder" / "model-00002-of-00002.safetensors").unlink()
    found = inspect_folder(tmp_path / "folder")
    assert found["missing"][0] == "model-00002-of-00002.safetensors"
    assert len(found["tensors"]) == (len(tensors) + 1) // 2


def test_no_tensor_is_read(tmp_path):
    """The numbers of this file would be a hundred gigabytes."""
    size = 2 * 10**11
    header = json.dumps({"model.x": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)  # a hole
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    assert inspect_folder(tmp_path)["parameters"]["all"] == size // 2


def test_what_is_printed_and_written(room, tmp_path, capsys):
    assert main(["inspect", str(room / "nv-embed"), "--json", str(tmp_path / "found.json")]) == 0
    text = capsys.readouterr().out
    for words in ("NVEmbedModel", "embedding_model.layers.*.mlp.up_proj.weight", "64 x 32", "bfloat16", "model-00003"):
        assert words in "".join(text.split("\n")) or words in text
    assert "layers.1." not in text
    assert json.loads((tmp_path / "found.json").read_text()) == inspect_folder(room / "nv-embed")
    assert main(["inspect", str(room / "nv-embed"), "--tensors"]) == 0
    assert "layers.1.mlp" in capsys.readouterr().out


def test_folders_that_are_neither(tmp_path, capsys):
    with pytest.raises(WeightsError, match="no folder at"):
        inspect_folder(tmp_path / "nowhere")
    assert main(["inspect", str(tmp_path)]) == 78
    assert "neither a Hugging Face folder" in capsys.readouterr().err
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"cannot read .*adapter_config\.json"):
        inspect_folder(tmp_path)


def test_an_imported_checkpoint_is_exported(room, tmp_path):
    """From config.json and tokenizer to the weights' numbers, what import-hf wrote suffices."""
    assert main(["export-hf", str(room / "imported"), str(tmp_path / "export"), "--dtype", "bfloat16"]) == 0
    found, expected = transfer.tensors_of(tmp_path / "export"), transfer.tensors_of(room / "nv-embed")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert "imported from" in (tmp_path / "export" / "README.md").read_text().lower()
    # And back in, with the tokenizer of the export.
    assert main(["import-hf", str(tmp_path / "export"), str(tmp_path / "again")]) == 0
    again = inspect_folder(tmp_path / "again")
    assert again["tensors"] == inspect_folder(room / "imported")["tensors"]


def test_an_import_without_a_tokenizer_cannot_be_exported(tmp_path, capsys):
    transfer.write_folder(tmp_path / "base", tiny_config(), None, torch.float32)
    assert main(["import-hf", str(tmp_path / "base"), str(tmp_path / "imported")]) == 0
    assert main(["export-hf", str(tmp_path / "imported"), str(tmp_path / "export")]) == 78
    assert "--tokenizer" in capsys.readouterr().err and not (tmp_path / "export").exists()
