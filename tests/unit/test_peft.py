"""PEFT folders that cannot be used: each is refused with the file and both values."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MistralModel

from nvembed_mcore.checkpoint.adapters import merged
from nvembed_mcore.checkpoint.contents import inspect_folder
from nvembed_mcore.checkpoint.hf_export import ExportError
from nvembed_mcore.checkpoint.hf_folder import WeightsError, open_hf_folder
from nvembed_mcore.checkpoint.hf_import import RandomWeights, load_weights
from nvembed_mcore.checkpoint.names import local_shard, name_table
from nvembed_mcore.checkpoint.peft import ADAPTERS_FILE, FACTS_FILE, base_fingerprint, export_peft, open_peft_folder
from nvembed_mcore.config import ConfigError, LoraConfig, ModelConfig, PoolingConfig
from tests.helpers.models import tiny_config

CONFIG = tiny_config()
LORA = LoraConfig(rank=3, alpha=6.0, targets=["q", "down"])
POOLING = PoolingConfig(num_latents=6, num_heads=2, head_width=12)
Q = "base_model.model.layers.1.self_attn.q_proj.lora_A.weight"


def random_reader(seed=1):
    """Whole tensors by our names; adapters' B too is random."""
    table = {entry.name: entry for entry in name_table(CONFIG, POOLING, LORA)}
    source = RandomWeights(table.values(), seed, 0.2, POOLING)

    def read_hf(name):
        shape = source.shapes[name]
        return torch.randn(shape, generator=source._generator(name)) if "lora_B" in name else source.read(name, shape)

    return lambda name: local_shard(table[name], read_hf, 0, 1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, and adapters that were trained on it."""
    root = tmp_path_factory.mktemp("peft")
    torch.manual_seed(0)
    MistralModel(CONFIG).save_pretrained(root / "base")
    base = open_hf_folder(root / "base")
    facts = {"name": "mistral", "fingerprint": base_fingerprint(base, CONFIG)}
    export_peft(random_reader(), CONFIG, POOLING, LORA, root / "adapters", attention_mask="bidirectional", base=facts)
    return root


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made / "adapters", tmp_path / "adapters")
    return tmp_path / "adapters"


def model_from(folder, **changes):
    lora = dataclasses.replace(LORA, init_from=str(folder))
    return ModelConfig(**{"init_from": "base", "pooling": POOLING, "lora": lora, **changes})


def open_it(folder, made, **changes):
    return open_peft_folder(model_from(folder, **changes), CONFIG, open_hf_folder(made / "base"))


def empty():
    return {entry.name: torch.zeros(entry.shape) for entry in name_table(CONFIG, POOLING, LORA)}


def change(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_what_was_written_is_read(folder, made):
    read, found = random_reader(), empty()
    missing = load_weights(open_it(folder, made), name_table(CONFIG, POOLING, LORA), found, 0, 1)
    assert not any(".lora_" in name or "pooling" in name for name in missing)
    assert len(found) - len(missing) == 4 * 2 * 2 + 14
    assert all(torch.equal(found[name], read(name)) for name in found.keys() - missing)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(r=4), r"adapter_config.json: rank is 4, model.lora.rank is 3"),
        (dict(lora_alpha=8), r"alpha is 8, model.lora.alpha is 6.0"),
        (dict(target_modules=["q_proj"]), r"targets is \['q'\], model.lora.targets is \['down', 'q'\]"),
        (dict(target_modules="all-linear"), r"target_modules is 'all-linear', it must list some of q_proj, k_proj"),
        (dict(target_modules=["lm_head"]), r"target_modules is \['lm_head'\]"),
        (dict(use_dora=True), r"use_dora is True; adapters here have False"),
        (dict(use_rslora=True), r"use_rslora is True"),
        (dict(rank_pattern={"q_proj": 8}), r"rank_pattern is {'q_proj': 8}"),
        (dict(modules_to_save=["norm"]), r"modules_to_save is \['norm'\]"),
        (dict(bias="all"), r"bias is 'all'; adapters here have 'none'"),
        (dict(peft_type="IA3"), r"peft_type is 'IA3'; adapters here have 'LORA'"),
    ],
)
def test_other_settings_are_refused(folder, made, settings, message):
    change(folder, **settings)
    with pytest.raises(WeightsError, match=message):
        open_it(folder, made)


def test_empty_settings_of_other_versions_are_taken(folder, made):
    change(folder, layers_to_transform=[], rank_pattern=None, modules_to_save=[], some_new_setting=None)
    open_it(folder, made)


def test_adapters_of_another_base_are_refused(folder, made, tmp_path):
    torch.manual_seed(1)
    MistralModel(CONFIG).save_pretrained(tmp_path / "base")
    with pytest.raises(WeightsError, match=r"nvembed.json: .*trained on mistral with weights .*base has"):
        open_it(folder, tmp_path)
    (folder / FACTS_FILE).unlink()  # of another maker: only shapes can tell
    open_it(folder, tmp_path)


def test_another_head_or_mask_is_refused(folder, made):
    with pytest.raises(
        WeightsError, match=r"nvembed.json: the head is .*num_heads=2.* model.pooling is .*num_heads=1"
    ):
        open_it(folder, made, pooling=dataclasses.replace(POOLING, num_heads=1, head_width=24))
    with pytest.raises(WeightsError, match="attention_mask is 'bidirectional', model.attention_mask is 'causal'"):
        open_it(folder, made, attention_mask="causal")
    (folder / FACTS_FILE).write_text('{"base": null}')
    with pytest.raises(WeightsError, match=r"cannot read .*nvembed.json: KeyError\('attention_mask'\)"):
        open_it(folder, made)


def test_a_base_in_another_dtype_has_the_same_fingerprint(made, tmp_path):
    config = tiny_config()
    model = MistralModel(config).bfloat16()
    model.save_pretrained(tmp_path / "half")
    model.float().save_pretrained(tmp_path / "whole")
    prints = {base_fingerprint(open_hf_folder(tmp_path / name), config) for name in ("half", "whole")}
    assert len(prints) == 1 and prints != {base_fingerprint(open_hf_folder(made / "base"), CONFIG)}


def test_damaged_and_wrong_tensors(folder, made):
    tensors = load_file(folder / ADAPTERS_FILE)
    with pytest.raises(WeightsError, match=r"'base_model.model.layers.3.*no adapter of a model with 3 layers"):
        open_peft_folder(model_from(folder), tiny_config(num_hidden_layers=3), None)
    save_file({name: value for name, value in tensors.items() if name != Q}, folder / ADAPTERS_FILE)
    with pytest.raises(WeightsError, match=r"no tensor 'base_model.model.layers.1.self_attn.q_proj.lora_A.weight'"):
        load_weights(open_it(folder, made), name_table(CONFIG, POOLING, LORA), empty(), 0, 1)
    save_file({**tensors, Q: torch.zeros(3, 31)}, folder / ADAPTERS_FILE)
    with pytest.raises(WeightsError, match=r"safetensors: tensor .*q_proj.* has shape \[3, 31\].*\[3, 32\]"):
        load_weights(open_it(folder, made), name_table(CONFIG, POOLING, LORA), empty(), 0, 1)
    content = (folder / ADAPTERS_FILE).read_bytes()
    (folder / ADAPTERS_FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match=r"cannot read .*adapter_model.safetensors"):
        open_it(folder, made)


def test_folders_that_are_none(folder, made, tmp_path):
    with pytest.raises(WeightsError, match=r"no PEFT folder at .*nowhere \(adapter_config.json is missing\)"):
        open_it(tmp_path / "nowhere", made)
    (folder / ADAPTERS_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(WeightsError, match=r"no adapter_model.safetensors and adapter_model.bin.*is not read"):
        open_it(folder, made)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(WeightsError, match=r"cannot read .*adapter_config.json"):
        open_it(folder, made)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(WeightsError, match=r"must hold an object, got list"):
        open_it(folder, made)


def test_an_export_appears_whole_or_not_at_all(made, tmp_path):
    settings = dict(attention_mask="bidirectional", base=None)
    (tmp_path / "old").mkdir()
    with pytest.raises(ExportError, match="old exists"):
        export_peft(random_reader(), CONFIG, POOLING, LORA, tmp_path / "old", **settings)

    def failing(name):
        if name.startswith("decoder.layers.3.lora"):
            raise OSError("disk gone")
        return random_reader()(name)

    with pytest.raises(OSError, match="disk gone"):
        export_peft(failing, CONFIG, POOLING, LORA, tmp_path / "new", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_merging_reads_whole_weights_of_every_layout():
    read, table = random_reader(), {entry.name: entry for entry in name_table(CONFIG, POOLING, LORA)}
    whole = merged(read, CONFIG, POOLING, LORA)
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    delta = whole(name) - read(name)
    grouped = delta.unflatten(0, (2, -1))  # [G, (A / G + 2) * d, H]
    product = 2.0 * read("decoder.layers.1.lora_linear_qkv.b.q") @ read("decoder.layers.1.lora_linear_qkv.a.q")
    assert (grouped[:, :32].flatten(0, 1) - product).abs().max() < 1e-5 and not grouped[:, 32:].any()
    untouched = [
        name for name, entry in table.items() if entry.part != "adapters" and "qkv" not in name and "fc2" not in name
    ]
    assert all(torch.equal(whole(name), read(name)) for name in untouched)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rank=0), "rank must be at least 1, got 0"),
        (dict(alpha=0.0), "alpha must be above 0, got 0.0"),
        (dict(dropout=1.0), "dropout must be from 0 to below 1, got 1.0"),
        (dict(targets=[]), "targets must be one or more of q, k, v"),
        (dict(targets=["q", "q"]), "targets must differ"),
        (dict(targets=["linear_qkv"]), "targets must be one or more of"),
    ],
)
def test_bad_adapters_in_the_configuration(changes, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**changes)


def test_inspect_tells_what_the_adapters_are_of(folder):
    found = inspect_folder(folder)
    entries = name_table(CONFIG, POOLING, LORA)
    sizes = {"head": 0, "adapters": 0, "backbone": 0}
    for entry in entries:
        sizes[entry.part] += torch.Size(entry.shape).numel()
    del sizes["backbone"]
    assert {part: found["parameters"][part] for part in sizes} == sizes
    assert found["about"]["base"]["name"] == "mistral" and found["about"]["pooling"]["num_heads"] == 2
    assert found["about"]["target_modules"] == ["q_proj", "down_proj"] and found["missing"] == []
