"""What stands beside weights and cannot be used: each is refused with the file and what it says, by every command."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nvembed_mcore.checkpoint import store
from nvembed_mcore.checkpoint.hf_folder import WeightsError, check_sums
from nvembed_mcore.checkpoint.hf_model import largest_token_id, open_hf_model
from nvembed_mcore.cli import main
from nvembed_mcore.config import PoolingConfig
from tests.helpers import transfer
from tests.helpers.checkpoints import seal
from tests.helpers.models import tiny_config

CONFIG = tiny_config(num_hidden_layers=2)
POOLING = PoolingConfig(num_latents=6, num_heads=4, head_width=12)
LATENTS = "pooling.latents"


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "source" / "folder"
    transfer.write_folder(path, CONFIG, POOLING, torch.float32)
    return path


@pytest.fixture
def plain(tmp_path) -> Path:
    """A plain model for sentence-transformers that pools as ours do."""
    path = tmp_path / "plain"
    transfer.write_folder(path, CONFIG, None, torch.float32)
    (path / "1_Pooling").mkdir()
    write(path / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True, "include_prompt": False})
    return path


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("imported")
    transfer.write_folder(root / "folder", CONFIG, POOLING, torch.float32)
    assert main(["import-hf", str(root / "folder"), str(root / "checkpoint")]) == 0
    return root / "checkpoint"


@pytest.fixture
def checkpoint(imported, tmp_path) -> Path:
    """A copy to damage; it names a tokenizer, so that an export reads its weights."""
    shutil.copytree(imported, tmp_path / "checkpoint")
    change(tmp_path / "checkpoint" / "run.json", lambda facts: facts["config"]["data"].update(tokenizer="nowhere"))
    return tmp_path / "checkpoint"


def write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content))


def change(file: Path, how: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text())
    how(content)
    write(file, content)
    if file.name == "run.json":
        seal(file.parent)


def assert_refused(capsys, tmp_path, arguments: list[str], *words: str) -> None:
    """The command ends with status 2, one message and nothing written."""
    before = sorted(path.name for path in tmp_path.iterdir())
    capsys.readouterr()
    assert main(arguments) == 78
    message = capsys.readouterr().err
    assert "Traceback" not in message and message.count("error:") == 1, message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "nothing half-written is left"


def assert_not_imported(capsys, tmp_path, folder: Path, *words: str) -> None:
    assert_refused(capsys, tmp_path, ["import-hf", str(folder), str(tmp_path / "out")], *words)


# What the published model is, and what an encoder cannot be


def test_the_published_configuration_is_read_as_the_published_model(tmp_path):
    """Its file says nothing of the head's sizes, the mask or the pooling. Same sizes of the head, a small backbone."""
    text = transfer.text_config(CONFIG) | {"model_type": "bidir_mistral", "architectures": ["MistralModel"]}
    published = {
        "_name_or_path": "nvidia/NV-Embed-v2",
        "add_eos": True,
        "add_pad_token": True,
        "architectures": ["NVEmbedModel"],
        "auto_map": {
            "AutoConfig": "configuration_nvembed.NVEmbedConfig",
            "AutoModel": "modeling_nvembed.NVEmbedModel",
        },
        "hidden_size": CONFIG.hidden_size,
        "is_mask_instruction": True,
        "latent_attention_config": {"model_type": "latent_attention"},
        "mask_type": "b",
        "model_type": "nvembed",
        "padding_side": "right",
        "text_config": text,
        "torch_dtype": "float16",
        "transformers_version": "4.42.4",
    }
    path = tmp_path / "published"
    transfer.write_folder(path, CONFIG, PoolingConfig(head_width=4096), torch.float16)
    write(path / "config.json", published)
    model = open_hf_model(path)
    assert model.attention_mask == "bidirectional" and model.architecture == "NVEmbedModel"
    pooling = model.pooling
    assert (pooling.kind, pooling.num_latents, pooling.num_heads, pooling.head_width) == ("latent", 512, 8, 4096)


@pytest.mark.parametrize("kind", ["Dense", "LayerNorm", "WeightedLayerPooling"])
def test_modules_that_an_encoder_does_not_have(capsys, tmp_path, plain, kind):
    modules = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Normalize")]
    write(plain / "modules.json", modules)
    assert open_hf_model(plain).pooling.kind == "mean"
    write(plain / "modules.json", [*modules, {"type": f"sentence_transformers.models.{kind}"}])
    assert_not_imported(capsys, tmp_path, plain, str(plain / "modules.json"), "module 3", f"models.{kind}'")


@pytest.mark.parametrize("settings", [{"include_prompt": True}, {}])
def test_a_mean_over_the_tokens_of_prompts(capsys, tmp_path, plain, settings):
    """Without prompts it is the mean that ours is."""
    prompts = plain / "config_sentence_transformers.json"
    write(plain / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True, **settings})
    for none in ({}, {"prompts": {"query": "", "document": ""}}, {"prompts": None}):
        write(prompts, none)
        assert open_hf_model(plain).pooling.kind == "mean"
    write(prompts, {"prompts": {"query": "Instruct: x\nQuery: "}})
    assert_not_imported(capsys, tmp_path, plain, str(plain / "1_Pooling" / "config.json"), "include_prompt")
    write(plain / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True, "include_prompt": False})
    assert open_hf_model(plain).pooling.kind == "mean"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_mask_instruction": False}, "is_mask_instruction is False"),
        ({"latent_attention_config": {"output_normalize": False}}, "output_normalize is False"),
        ({"latent_attention_config": [1]}, "latent_attention_config must be an object, got [1]"),
        ({"latent_attention_config": {"num_cross_heads": "4"}}, "num_cross_heads must be an integer"),
        ({"latent_attention_config": {"num_latents_value": 0}}, "num_latents_value must be an integer"),
        ({"is_causal": "no"}, "is_causal must be true or false, got 'no'"),
        ({"is_causal": None}, "is_causal must be true or false, got None"),
    ],
)
def test_an_nv_embed_that_is_not_ours(capsys, tmp_path, folder, changes, words):
    change(folder / "config.json", lambda config: config.update(changes))
    assert_not_imported(capsys, tmp_path, folder, str(folder / "config.json"), words)


# config.json


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_theta": math.nan}, "rope_theta must be a finite number above 0, got nan"),
        ({"rope_theta": math.inf}, "got inf"),
        ({"rope_theta": -1.0}, "got -1.0"),
        ({"rope_theta": "10000"}, "got '10000'"),
        ({"rope_theta": True}, "got True"),
        ({"rope_theta": [1]}, "got [1]"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_scaling": "yarn"}, "'yarn'"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
    ],
)
def test_a_backbone_of_values_that_cannot_be(capsys, tmp_path, folder, changes, words):
    change(folder / "config.json", lambda config: config["text_config"].update(changes))
    assert_not_imported(capsys, tmp_path, folder, str(folder / "config.json"), words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (None, "must hold an object"),
        ({"text_config": [1]}, "text_config must be an object, got [1]"),
        ({"text_config": None}, "text_config must be an object, got None"),
        ({"architectures": 7}, "architectures must be a list of names, got 7"),
        ({"architectures": "NVEmbedModel"}, "architectures must be a list of names, got 'NVEmbedModel'"),
    ],
)
def test_a_configuration_of_another_form(capsys, tmp_path, folder, changes, words):
    file = folder / "config.json"
    write(file, [1] if changes is None else json.loads(file.read_text()) | changes)
    assert_not_imported(capsys, tmp_path, folder, str(file), words)
    assert_refused(capsys, tmp_path, ["inspect", str(folder)], str(file), words)


# Beside it


@pytest.mark.parametrize("limit", ["512", 0, -1, 2.5, True, [512]])
def test_a_length_that_is_none(capsys, tmp_path, folder, limit):
    file = folder / "sentence_bert_config.json"
    write(file, {"max_seq_length": limit})
    assert_not_imported(capsys, tmp_path, folder, str(file), "max_seq_length", f"got {limit!r}")


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"vocab": {}}, "added_tokens": []},
        {"model": {"vocab": {"a": 0}}, "added_tokens": None},
        {"model": {"vocab": {"a": 0}}, "added_tokens": [1]},
        {"model": {"vocab": {"a": "0"}}, "added_tokens": []},
        {"model": [1]},
        [1],
    ],
)
def test_a_tokenizer_without_ids(tmp_path, content):
    write(tmp_path / "tokenizer.json", content)
    with pytest.raises(WeightsError, match=re.escape(str(tmp_path / "tokenizer.json"))):
        largest_token_id(tmp_path)


def test_sums_that_are_no_text(tmp_path):
    (tmp_path / "SHA256SUMS").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WeightsError, match=re.escape(str(tmp_path / "SHA256SUMS"))):
        check_sums(tmp_path, ["model.safetensors"])


# Checkpoints


@pytest.mark.parametrize(
    "how",
    [
        lambda facts: [facts],
        lambda facts: facts | {"step": None},
        lambda facts: {name: value for name, value in facts.items() if name != "config"},
        lambda facts: facts | {"config": facts["config"] | {"model": None}},
        lambda facts: {name: value for name, value in facts.items() if name != "hf_config"},
        lambda facts: facts | {"hf_config": None},
        lambda facts: facts | {"hf_config": facts["hf_config"] | {"hidden_size": "32"}},
        lambda facts: facts | {"config": facts["config"] | {"model": {"pooling": {"heads": 3}}}},
    ],
    ids=["list", "step", "config", "model", "no hf_config", "hf_config", "hidden_size", "pooling"],
)
def test_a_run_file_that_describes_no_model(capsys, tmp_path, checkpoint, how):
    file = checkpoint / "run.json"
    write(file, how(json.loads(file.read_text())))
    seal(checkpoint)
    with pytest.raises(store.CheckpointError, match=re.escape(str(file))):
        store.read_checkpoint(checkpoint)
    assert_refused(capsys, tmp_path, ["inspect", str(checkpoint)], str(file))
    assert_refused(capsys, tmp_path, ["export-hf", str(checkpoint), str(tmp_path / "out")], str(file))


@pytest.mark.parametrize(
    ("how", "name", "shapes"),
    [
        (lambda facts: facts["config"]["model"]["pooling"].update(num_latents=7), LATENTS, ("[6, 32]", "[7, 32]")),
        (
            lambda facts: facts["hf_config"].update(hidden_size=40),
            "embedding.word_embeddings.weight",
            ("[256, 32]", "[256, 40]"),
        ),
    ],
)
def test_a_run_file_that_describes_another_model(capsys, tmp_path, checkpoint, how, name, shapes):
    change(checkpoint / "run.json", how)
    arguments = ["export-hf", str(checkpoint), str(tmp_path / "out")]
    assert_refused(capsys, tmp_path, arguments, str(checkpoint), repr(name), *shapes)


@pytest.mark.parametrize("is_cut", [False, True])
def test_tensors_that_are_gone(capsys, tmp_path, checkpoint, is_cut):
    """Told without reading any, so by `inspect` too."""
    (file,) = (checkpoint / "state").glob("*.distcp")
    size = file.stat().st_size
    if is_cut:
        file.write_bytes(file.read_bytes()[:100])
    else:
        file.unlink()
    what = f"state/{file.name} has 100 bytes instead of {size:,}" if is_cut else f"state/{file.name} is missing"
    with pytest.raises(store.CheckpointError, match=re.escape(f"{checkpoint} is damaged: {what}")):
        store.read_checkpoint(checkpoint)
    for arguments in (["inspect", str(checkpoint)], ["export-hf", str(checkpoint), str(tmp_path / "out")]):
        assert_refused(capsys, tmp_path, arguments, str(checkpoint), what)
