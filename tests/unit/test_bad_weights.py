"""Hugging Face folders that cannot be used: each is refused with file, tensor and both values, and nothing is left."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from nvembed_mcore.checkpoint.hf_folder import WeightsError
from nvembed_mcore.checkpoint.hf_import import load_weights
from nvembed_mcore.checkpoint.hf_model import check_pooling, open_hf_model
from nvembed_mcore.checkpoint.names import local_shard, name_table
from nvembed_mcore.checkpoint.safetensors_stream import write_weights
from nvembed_mcore.cli import main
from nvembed_mcore.config import PoolingConfig
from nvembed_mcore.log import close_logging
from nvembed_mcore.resume import plain
from tests.helpers import runs, transfer
from tests.helpers.models import tiny_config

CONFIG = tiny_config(num_hidden_layers=2)
POOLING = PoolingConfig(num_latents=6, num_heads=4, head_width=12)
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
UP = "embedding_model.layers.1.mlp.up_proj.weight"
LATENTS = "latent_attention_model.latents"


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "source" / "folder"
    transfer.write_folder(path, CONFIG, POOLING, torch.float32)
    return path


def file_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / transfer.INDEX).read_text())["weight_map"][name]


def change_json(file: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Write the folder again with tensors replaced, added or (None) removed."""
    tensors = transfer.tensors_of(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    kept = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    transfer.write_shards(folder, kept, 2)


def change_header(file: Path, change: Callable[[dict], None]) -> None:
    """Rewrite a safetensors header; the numbers behind it stay."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def message_of(capsys, tmp_path, source: Path, *arguments: str) -> str:
    """What `import-hf` says; it must end with status 2 and leave nothing."""
    output = tmp_path / "out" / "checkpoint"
    output.parent.mkdir(exist_ok=True)
    capsys.readouterr()
    assert main(["import-hf", str(source), str(output), *arguments]) == 78
    message = capsys.readouterr().err
    assert "Traceback" not in message and message.count("error:") == 1, message
    assert list(output.parent.iterdir()) == [], "nothing half-written is left"
    return message


def assert_refused(capsys, tmp_path, folder: Path, *words: str) -> None:
    message = message_of(capsys, tmp_path, folder)
    for word in (str(folder), *words):
        assert word in message, f"{word!r} is not in: {message}"


# Files


def test_a_file_that_is_cut_short(capsys, tmp_path, folder):
    content = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(content[:-100])
    assert_refused(capsys, tmp_path, folder, FIRST, f"{len(content) - 100:,} bytes")


@pytest.mark.parametrize("place", [0, 6, 8, 40])
def test_a_bit_of_the_header_that_flipped(capsys, tmp_path, folder, place):
    """Of its length, its first brace, the name of a tensor."""
    content = bytearray((folder / FIRST).read_bytes())
    content[place] ^= 0x40
    (folder / FIRST).write_bytes(content)
    assert_refused(capsys, tmp_path, folder, FIRST)


def test_tensors_that_overlap(capsys, tmp_path, folder):
    def overlap(header: dict) -> None:
        one, other = [name for name in header if name.endswith("layernorm.weight")][:2]
        header[one]["data_offsets"] = header[other]["data_offsets"]

    change_header(file_of(folder, "embedding_model.layers.0.input_layernorm.weight"), overlap)
    assert_refused(capsys, tmp_path, folder, "model-0000")


def test_a_missing_shard(capsys, tmp_path, folder):
    (folder / SECOND).unlink()
    assert_refused(capsys, tmp_path, folder, transfer.INDEX, SECOND)


def test_an_index_that_names_a_file_in_vain(capsys, tmp_path, folder):
    change_json(folder / transfer.INDEX, lambda index: index["weight_map"].update({UP: "model-00009.safetensors"}))
    assert_refused(capsys, tmp_path, folder, "model-00009.safetensors", "not in the folder")


def test_an_index_that_names_a_tensor_in_vain(capsys, tmp_path, folder):
    change_json(folder / transfer.INDEX, lambda index: index["weight_map"].update({"embedding_model.x": FIRST}))
    assert_refused(capsys, tmp_path, folder, "'embedding_model.x'", FIRST, "does not hold it")


def test_a_tensor_that_is_there_twice(capsys, tmp_path, folder):
    here = file_of(folder, UP)
    other = folder / ({FIRST, SECOND} - {here.name}).pop()
    save_file(load_file(other) | {UP: torch.zeros(64, 32)}, other)
    assert_refused(capsys, tmp_path, folder, UP, here.name, other.name)


def test_a_tensor_that_the_index_does_not_name(capsys, tmp_path, folder):
    change_json(folder / transfer.INDEX, lambda index: index["weight_map"].pop(UP))
    assert_refused(capsys, tmp_path, folder, UP, "does not name")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights(capsys, tmp_path, folder, name):
    for file in [*folder.glob("*.safetensors"), folder / transfer.INDEX]:
        file.unlink()
    (folder / name).write_bytes(b"\x80\x04.")
    assert_refused(capsys, tmp_path, folder, name, "pickled")


def test_numbers_whose_bits_flipped_are_found_by_the_recorded_sum(capsys, tmp_path, folder):
    export = tmp_path / "source" / "export"
    export.mkdir()
    tensors = transfer.tensors_of(folder)
    entries = {entry.name: entry for entry in name_table(CONFIG, POOLING)}
    write_weights(
        lambda name: local_shard(entries[name], tensors.__getitem__, 0, 1),
        list(entries.values()),
        export,
        torch.float32,
        60_000,
    )
    (export / "config.json").write_text((folder / "config.json").read_text())
    assert main(["import-hf", str(export), str(tmp_path / "good")]) == 0
    assert "of its files as listed" in capsys.readouterr().out
    file = sorted(export.glob("*.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x01  # a finite number still
    file.write_bytes(content)
    assert_refused(capsys, tmp_path, export, file.name, "SHA-256", "SHA256SUMS")


# Tensors


@pytest.mark.parametrize("name", [UP, LATENTS, "embedding_model.norm.weight"])
def test_a_missing_tensor(capsys, tmp_path, folder, name):
    change_tensors(folder, **{name: None})
    assert_refused(capsys, tmp_path, folder, repr(name), "of shape [")


@pytest.mark.parametrize(
    "name",
    [
        "embedding_model.layers.0.self_attn.q_norm.weight",
        "embedding_model.layers.2.mlp.up_proj.weight",  # config.json has two layers
        "latent_attention_model.cross_attend_blocks.2.norm.weight",
        "classifier.weight",
    ],
)
def test_an_unknown_tensor(capsys, tmp_path, folder, name):
    change_tensors(folder, **{name: torch.ones(8)})
    assert_refused(capsys, tmp_path, folder, repr(name), file_of(folder, name).name, "config.json")


def test_a_wrong_shape(capsys, tmp_path, folder):
    change_tensors(folder, **{UP: torch.ones(64, 31)})
    assert_refused(capsys, tmp_path, folder, repr(UP), file_of(folder, UP).name, "[64, 31]", "[64, 32]")


def test_a_backbone_that_is_there_twice(capsys, tmp_path, folder):
    change_tensors(folder, **{"model.embed_tokens.weight": torch.ones(250, 32)})
    assert_refused(capsys, tmp_path, folder, "embedding_model.embed_tokens.weight", "model.embed_tokens.weight")


def test_numbers_of_another_type(capsys, tmp_path, folder):
    change_tensors(folder, **{UP: torch.ones(64, 32, dtype=torch.int8)})
    assert_refused(capsys, tmp_path, folder, repr(UP), "I8")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite(capsys, tmp_path, folder, number):
    change_tensors(folder, **{UP: torch.full((64, 32), 0.5).index_fill(1, torch.tensor([7]), number)})
    assert_refused(capsys, tmp_path, folder, repr(UP), file_of(folder, UP).name, str(number))


def test_numbers_that_do_not_fit_the_wanted_type(capsys, tmp_path, folder):
    change_tensors(folder, **{UP: torch.full((64, 32), 1e6)})
    message = message_of(capsys, tmp_path, folder, "--dtype", "float16")
    assert UP in message and "float16" in message and "inf" in message
    assert main(["import-hf", str(folder), str(tmp_path / "bfloat16"), "--dtype", "bfloat16"]) == 0


# Configuration


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, ["model_type", "'llama'", "'mistral'"]),
        ({"vocab_size": 300}, ["embed_tokens.weight", "[250, 32]", "vocab_size is 300"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, ["10000.0", "1000000.0"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, ["'linear'"]),
        ({"hidden_act": "gelu"}, ["'gelu'"]),
        ({"num_hidden_layers": 1}, ["layers.1.", "config.json"]),
    ],
)
def test_a_configuration_that_disagrees(capsys, tmp_path, folder, change, words):
    change_json(folder / "config.json", lambda config: config["text_config"].update(change))
    assert_refused(capsys, tmp_path, folder, *words)


def test_a_pooling_that_is_not_known(capsys, tmp_path, folder):
    change_json(folder / "config.json", lambda config: config.update(pooling="max"))
    assert_refused(capsys, tmp_path, folder, "'max'", "latent, ")


def test_a_tokenizer_with_more_ids_than_the_model(capsys, tmp_path, folder):
    added = [{"id": 250, "content": "<extra>"}]
    tokenizer = json.dumps({"model": {"vocab": {"a": 0, "b": 249}}, "added_tokens": added})
    (folder / "tokenizer.json").write_text(tokenizer)
    assert_refused(capsys, tmp_path, folder, "tokenizer.json", "250", "vocab_size is 250")
    (folder / "tokenizer.json").unlink()
    message = message_of(capsys, tmp_path, folder, "--tokenizer", str(tmp_path))
    assert str(tmp_path) in message and "tokenizer.json" in message


def test_another_head_than_the_run_s(folder):
    for other, words in (
        (PoolingConfig(num_latents=7, num_heads=4, head_width=12), "num_latents: 6 -> 7"),
        (PoolingConfig(num_latents=6, num_heads=2, head_width=24), "num_heads: 4 -> 2"),  # of the same shapes
        (PoolingConfig(kind="mean"), "kind: 'latent' -> 'mean'"),
    ):
        with pytest.raises(WeightsError, match="another head") as caught:
            check_pooling(open_hf_model(folder), other)
        assert str(folder) in str(caught.value) and words in str(caught.value)


def test_a_run_that_starts_from_a_damaged_folder_ends_before_its_first_step(capsys, tmp_path):
    inputs = runs.write_inputs(tmp_path / "inputs")
    source = tmp_path / "nv-embed"
    config = tiny_config(vocab_size=32000, num_hidden_layers=2)
    transfer.write_folder(source, config, POOLING, torch.float32)
    tree = plain(runs.run_config(inputs, tmp_path / "run", steps=1))
    tree["model"] |= {"config": None, "init_from": str(source)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    change_tensors(source, **{UP: torch.full((64, 32), float("nan"))})
    assert main(["train", str(tmp_path / "run.yaml")]) == 78
    close_logging()
    message = capsys.readouterr().err
    assert UP in message and "not finite" in message and "Traceback" not in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "checkpoints").exists()
    change_tensors(source, **{UP: torch.full((64, 32), 0.5)})
    assert main(["train", str(tmp_path / "run.yaml"), "--model.pooling.num_latents", "5"]) == 78
    assert "num_latents: 6 -> 5" in capsys.readouterr().err
    close_logging()
    assert main(["train", str(tmp_path / "run.yaml")]) == 0, "the folder mended, the run goes"
    close_logging()


def test_an_output_that_exists_is_left_alone(capsys, tmp_path, folder):
    (tmp_path / "old").mkdir()
    assert main(["import-hf", str(folder), str(tmp_path / "old")]) == 78
    assert "old exists" in capsys.readouterr().err
    assert list((tmp_path / "old").iterdir()) == []


# What is known and not needed


def test_what_an_encoder_does_not_need_is_left_out(tmp_path, folder):
    change_tensors(
        folder,
        **{
            "lm_head.weight": torch.ones(250, 32),
            "embedding_model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        },
    )
    assert main(["import-hf", str(folder), str(tmp_path / "checkpoint")]) == 0


@pytest.mark.parametrize("published", [True, False])
def test_what_config_json_leaves_out_is_the_published_class_s(folder, published):
    change_json(
        folder / "config.json",
        lambda config: config.update({"latent_attention_config": {"model_type": "latent_attention"}}),
    )
    if published:
        change_json(folder / "config.json", lambda config: [config.pop(name) for name in ("pooling", "is_causal")])
    with pytest.raises(WeightsError, match=r"latents.*\[6, 32\].*\[512, 32\]"):
        open_hf_model(folder)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head_width", [None, 8])
def test_base_models_of_the_published_forms(tmp_path, head_width, tied):
    """As v0.3 (a larger base, no sliding window) with and without `head_dim` and `lm_head`; the head is missing."""
    heads = {"head_dim": head_width, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = tiny_config(num_hidden_layers=2, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, **heads)
    path = tmp_path / "base"
    tensors = transfer.write_folder(path, config, None, torch.bfloat16)
    if tied:
        change_tensors(path, **{"lm_head.weight": None})
    change_json(path / "config.json", lambda content: content.update(tie_word_embeddings=tied))
    model = open_hf_model(path)
    assert model.pooling is None and model.attention_mask == "causal"
    assert model.hf_config.rope_parameters["rope_theta"] == 1e6
    entries = name_table(model.hf_config, POOLING)
    parameters = {entry.name: torch.full(entry.shape, 3.0) for entry in entries}
    missing = load_weights(model.folder, entries, parameters, 0, 1)
    assert missing == {entry.name for entry in entries if entry.is_head}
    rows = parameters["embedding.word_embeddings.weight"]
    assert torch.equal(rows[:250], tensors["model.embed_tokens.weight"].float()) and not rows[250:].any()


@pytest.mark.parametrize(
    ("modes", "kind"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False, "include_prompt": True}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode_cls_token": True}, None),
        ({"pooling_mode": ["mean", "max"]}, None),
    ],
)
def test_a_plain_mistral_model_for_sentence_transformers(tmp_path, modes, kind):
    path = tmp_path / "plain"
    transfer.write_folder(path, CONFIG, None, torch.float32)
    change_json(path / "config.json", lambda content: content.update(is_causal=False))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    if kind is None:
        with pytest.raises(WeightsError, match=r"1_Pooling/config\.json asks for neither"):
            open_hf_model(path)
    else:
        model = open_hf_model(path)
        assert model.pooling.kind == kind and model.attention_mask == "bidirectional"
