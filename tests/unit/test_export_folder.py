"""Exported folders: what they hold in each format, what is refused, and that nothing half-written stays."""

import copy
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from nvembed_mcore.checkpoint.hf_export import ExportError, export
from nvembed_mcore.checkpoint.hf_folder import WeightsError
from nvembed_mcore.checkpoint.hf_load import load_exported
from nvembed_mcore.checkpoint.hf_model import open_hf_model
from nvembed_mcore.evaluation.exported import ExportedEncoder
from tests.helpers.exports import CONFIG, INSTRUCTION, LIMIT, PROMPT, TEXTS, Case, sentence_transformer
from tests.helpers.models import tiny_config


def test_what_the_folder_holds(cases):
    folder = cases["latent"].folder
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        *("config.json", "model.safetensors", "SHA256SUMS", "modeling_nvembed.py", "README.md", "modules.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json"),
    }
    config = json.loads((folder / "config.json").read_text())
    # What the published code reads, besides the names of the weights.
    assert config["text_config"]["model_type"] == "bidir_mistral" and config["text_config"]["sliding_window"] is None
    assert config["text_config"]["_name_or_path"] == "." and config["text_config"]["architectures"] == ["MistralModel"]
    assert (config["padding_side"], config["mask_type"], config["hidden_size"]) == ("right", "b", 32)
    assert config["add_eos"] and config["add_pad_token"] and config["is_mask_instruction"]
    head = {"num_latents_value": 6, "num_cross_heads": 2, "hidden_dim": 32, "latent_dim": 32, "cross_dim_head": 12}
    assert config["latent_attention_config"].items() >= head.items()
    assert load_exported(folder).config.query_prompt == PROMPT
    modules = json.loads((folder / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)
    card = (folder / "README.md").read_text()
    assert "trust_remote_code=True" in card and "| optim.lr | 2e-05 |" in card and "abc123" in card
    assert "| note | a\\|b c |" in card
    assert [path for path in folder.parent.iterdir() if "partial" in path.name] == []


def test_weights_are_exact_in_one_file_and_in_shards(cases, tmp_path):
    case = cases["latent"]
    stored = load_file(case.folder / "model.safetensors")
    assert stored.keys() == case.tensors.keys()
    assert all(torch.equal(stored[name], case.tensors[name]) for name in stored)
    case.export(tmp_path / "shards", max_shard_bytes=50_000)
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stored.keys() and len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    shards = load_exported(tmp_path / "shards").state_dict()
    assert all(torch.equal(shards[name], stored[name]) for name in stored)


@pytest.mark.parametrize("form", ["nv-embed", pytest.param("mean", marks=pytest.mark.slow)])
def test_the_card_s_code_runs(cases, tmp_path, form):
    """In a process of its own, from a folder that was moved after the export, without this project's modules."""
    cases["mean"].export(tmp_path / "before" / "folder", format=form)
    (tmp_path / "before" / "folder").rename(tmp_path / "folder")
    blocks = (tmp_path / "folder/README.md").read_text().split("```python\n")[1:]
    code = "\n".join(block.split("```")[0] + "print(scores.shape, 'nvembed_mcore' in sys.modules)" for block in blocks)
    environment = {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}"],
        cwd=tmp_path,
        env={**environment, "HOME": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(1, 1)") + done.stdout.count("torch.Size([1, 1])") == 2
    assert "True" not in done.stdout


def test_a_folder_that_exists_is_left_alone(cases, tmp_path):
    (tmp_path / "old").mkdir()
    with pytest.raises(ExportError, match=r"export folder .*old exists"):
        cases["mean"].export(tmp_path / "old")
    assert list(tmp_path.rglob("*")) == [tmp_path / "old"]


def test_a_failed_export_leaves_nothing(cases, tmp_path):
    case = cases["mean"]

    def failing(name):
        if name.startswith("decoder.layers.1"):
            raise OSError("disk gone")
        return case.read_global(name)

    with pytest.raises(OSError, match="disk gone"):
        export(
            failing,
            CONFIG,
            case.pooling,
            tmp_path / "new",
            tokenizer_dir=case.tokenizer_dir,
            attention_mask="bidirectional",
            max_tokens=LIMIT,
            card_facts={},
        )
    assert list(tmp_path.iterdir()) == []


def test_values_that_cannot_be_exported(cases, tmp_path):
    with pytest.raises(ExportError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        cases["mean"].export(tmp_path / "new", dtype="int8")
    with pytest.raises(ExportError, match="attention_mask must be .*got 'sideways'"):
        cases["mean"].export(tmp_path / "new", attention_mask="sideways")
    with pytest.raises(ExportError, match="format must be one of nv-embed, mean, got 'onnx'"):
        cases["mean"].export(tmp_path / "new", format="onnx")
    for kind in ("latent", "self_attention", "multi_layer", "last"):
        with pytest.raises(ExportError, match=f"holds models with 'mean' pooling, this one has '{kind}' pooling"):
            cases[kind].export(tmp_path / "new", format="mean")
    with pytest.raises(ExportError, match="cannot use the tokenizer in"):
        cases["mean"].export(tmp_path / "new", tokenizer_dir=tmp_path)
    with pytest.raises(ExportError, match="ids up to 31999, the model's vocab_size is 250"):
        export(
            cases["mean"].read_global,
            tiny_config(),
            cases["mean"].pooling,
            tmp_path / "new",
            tokenizer_dir=cases["mean"].tokenizer_dir,
            attention_mask="bidirectional",
            max_tokens=LIMIT,
            card_facts={},
        )
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_no_exports(cases, tmp_path):
    with pytest.raises(WeightsError, match="no Hugging Face folder at"):
        load_exported(tmp_path / "nowhere")
    cases["mean"].reference.save_pretrained(tmp_path / "base")
    with pytest.raises(WeightsError, match="is not an export of this project: model_type is 'mistral'"):
        load_exported(tmp_path / "base")
    broken = tmp_path / "broken"
    shutil.copytree(cases["mean"].folder, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "pooling": "latent"}))
    with pytest.raises(WeightsError, match=r"has no tensor 'latent_attention_model\.latents'"):
        load_exported(broken)
    (broken / "config.json").write_text(json.dumps({**config, "pooling": "median"}))
    with pytest.raises(ValueError, match="pooling is 'median'"):
        load_exported(broken)
    config["text_config"]["intermediate_size"] = 48
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"has shape .*the model needs \[48, 32\]"):
        load_exported(broken)
    (broken / "config.json").write_text("{")
    with pytest.raises((ValueError, OSError), match=r"config\.json"):
        load_exported(broken)


def test_a_head_of_another_width_than_the_backbone(cases, tmp_path):
    shutil.copytree(cases["latent"].folder, tmp_path / "wide")
    _change(tmp_path / "wide/config.json", lambda config: config["latent_attention_config"].update(hidden_dim=48))
    with pytest.raises(WeightsError, match=r"the weights in .*wide do not fit its config\.json"):
        load_exported(tmp_path / "wide")


# The format `mean`


@pytest.fixture(scope="module")
def plain(cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mean") / "plain"
    cases["mean"].export(folder, format="mean")
    return folder


def test_the_format_mean_is_a_plain_mistral_model(cases, plain):
    names = {str(path.relative_to(plain)) for path in plain.rglob("*") if path.is_file()}
    code = {"modeling_nvembed.py"}
    assert (
        names
        == {str(p.relative_to(cases["mean"].folder)) for p in cases["mean"].folder.rglob("*") if p.is_file()} - code
    )
    config = json.loads((plain / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["is_causal"]) == ("mistral", ["MistralModel"], False)
    assert "auto_map" not in config
    stored, reference = load_file(plain / "model.safetensors"), cases["mean"].reference.state_dict()
    assert stored.keys() == reference.keys() and all(torch.equal(stored[name], reference[name]) for name in stored)
    card = (plain / "README.md").read_text()
    assert "trust_remote_code" not in card and "transformers 5.2.0 or newer" in card and "abc123" in card


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_format_mean_without_remote_code(cases, plain, implementation):
    from sentence_transformers import SentenceTransformer

    settings = {"model_kwargs": {"attn_implementation": implementation}}
    model = SentenceTransformer(str(plain), local_files_only=True, device="cpu", **settings)
    for how, instruction in (({}, ""), ({"prompt_name": "query"}, INSTRUCTION), ({"prompt": PROMPT}, INSTRUCTION)):
        found = torch.as_tensor(model.encode(TEXTS, batch_size=3, **how))
        assert (found - cases["mean"].expected(TEXTS, instruction)).abs().max() < 1e-5


def test_evaluation_takes_the_format_mean(cases, plain):
    encoder = ExportedEncoder(str(plain), instruction=None, max_length=LIMIT, device="cpu")
    assert (encoder(TEXTS, True) - cases["mean"].expected(TEXTS, INSTRUCTION)).abs().max() < 1e-5
    assert (encoder(TEXTS, False) - cases["mean"].expected(TEXTS)).abs().max() < 1e-5


def _change(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def _flip_a_bit(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def _change_tensors(folder, change):
    (folder / "SHA256SUMS").unlink()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _add_token(tokenizer):
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 32010, "content": "<new>"})


DAMAGE = {
    "a bit": (_flip_a_bit, r"model\.safetensors: SHA-256 is .*SHA256SUMS says"),
    "an infinite number": (
        lambda folder: _change_tensors(
            folder, lambda tensors: list(tensors.values())[-1].view(-1)[1:2].fill_(torch.inf)
        ),
        r"model\.safetensors: tensor .* has numbers that are not finite in float32: .* largest inf",
    ),
    "another tensor": (
        lambda folder: _change_tensors(folder, lambda tensors: tensors.update(more=torch.zeros(2))),
        r"model\.safetensors holds tensor 'more', which the model of .*config\.json does not have",
    ),
    "a token": (
        lambda folder: _change(folder / "tokenizer.json", _add_token),
        r"tokenizer\.json has ids up to 32010, .*config\.json says vocab_size is 32010",
    ),
    "a rotary base": (
        lambda folder: _change(folder / "config.json", lambda c: c.get("text_config", c).update(rope_theta=5.0)),
        r"config\.json: rope_theta is 5\.0, rope_parameters\.rope_theta is 10000\.0; they must be the same",
    ),
}


@pytest.mark.parametrize("form", ["nv-embed", "mean"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_import_refuses_is_not_loaded(cases, plain, tmp_path, form, damage):
    folder, (change, message) = tmp_path / "damaged", DAMAGE[damage]
    shutil.copytree(plain if form == "mean" else cases["mean"].folder, folder)
    change(folder)
    with pytest.raises(ValueError, match=message):
        load_exported(folder)


def test_the_format_mean_pools_by_the_mean(plain, tmp_path):
    folder = tmp_path / "last"
    shutil.copytree(plain, folder)
    modes = {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}
    _change(folder / "1_Pooling/config.json", lambda config: config.update(modes))
    with pytest.raises(WeightsError, match=r"1_Pooling/config\.json asks for 'last' pooling, not for 'mean'"):
        load_exported(folder)
    (folder / "1_Pooling/config.json").unlink()
    with pytest.raises(WeightsError, match=r"asks for None pooling"):
        load_exported(folder)


def test_a_causal_model_in_the_format_mean(tokenizer_dir, tmp_path):
    case = Case("mean", tokenizer_dir, tmp_path, causal=True)
    case.export(tmp_path / "plain", format="mean")
    assert json.loads((tmp_path / "plain/config.json").read_text())["is_causal"] is True
    expected = case.expected(TEXTS, INSTRUCTION)
    assert (load_exported(tmp_path / "plain").encode(TEXTS, PROMPT, LIMIT) - expected).abs().max() < 1e-5
    found = torch.as_tensor(sentence_transformer(tmp_path / "plain").encode(TEXTS, prompt_name="query"))
    assert (found - expected).abs().max() < 1e-5


# Modules


def test_multi_layer_brings_a_module_of_its_own(cases):
    folder = cases["multi_layer"].folder
    modules = json.loads((folder / "modules.json").read_text())
    assert [module["type"] for module in modules] == ["sentence_nvembed.NVEmbedTransformer"]
    assert (folder / "sentence_nvembed.py").is_file() and not (folder / "1_Pooling").exists()
    assert sentence_transformer(folder).get_sentence_embedding_dimension() == 32


@pytest.mark.parametrize("kind", ["latent", "multi_layer"])
def test_modules_of_foreign_types_are_refused(cases, tmp_path, kind):
    folder = tmp_path / "foreign"
    shutil.copytree(cases[kind].folder, folder)
    modules = json.loads((folder / "modules.json").read_text())
    for foreign in ("os.system", "sentence_transformers_x.Transformer", "modeling_nvembed.NVEmbedModel", 7):
        changed = copy.deepcopy(modules)
        changed[-1]["type"] = foreign
        (folder / "modules.json").write_text(json.dumps(changed))
        with pytest.raises(
            WeightsError, match=rf"modules\.json: module {len(modules) - 1} is of type {foreign!r}; types"
        ) as refused:
            load_exported(folder)
        with pytest.raises(WeightsError) as at_import:
            open_hf_model(folder)
        assert str(at_import.value) == str(refused.value)
    for broken in ("{", "[1]", '[{"path": ""}]'):
        (folder / "modules.json").write_text(broken)
        with pytest.raises(WeightsError, match=r"cannot read .*modules\.json"):
            load_exported(folder)


def test_a_prompt_that_is_missing_is_an_error(cases, tmp_path):
    folder = tmp_path / "promptless"
    shutil.copytree(cases["mean"].folder, folder)
    (folder / "config_sentence_transformers.json").write_text('{"prompts": {}}')
    with pytest.raises(WeightsError, match="the prompt named 'query' must be a string, got None"):
        ExportedEncoder(str(folder), instruction=None, max_length=LIMIT, device="cpu")


def test_what_the_published_code_is_given(cases, tmp_path):
    """Only that code, our weights, and a configuration that names it and the tokenizer."""
    from tools.check_published_code import copy_of

    code, folder = tmp_path / "code", tmp_path / "folder"
    code.mkdir()
    folder.mkdir()
    with pytest.raises(ValueError, match=r"no \*\.py file in"):
        copy_of(cases["latent"].folder, code, tmp_path, folder)
    (code / "modeling_nvembed.py").write_text("published")
    with pytest.raises(ValueError, match="runs bidirectional models with latent pooling, this is .*'mean'"):
        copy_of(cases["mean"].folder, code, tmp_path, folder)
    copy_of(cases["latent"].folder, code, tmp_path, folder)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "modeling_nvembed.py"}
    assert (folder / "modeling_nvembed.py").read_text() == "published"
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["_name_or_path"] == str(tmp_path)
    assert config["auto_map"]["AutoConfig"] == "configuration_nvembed.NVEmbedConfig"


@pytest.mark.parametrize(
    ("format", "version", "value", "is_bad"),
    [
        *[("mean", "5.1.0", "not supported (causal)", False), ("mean", "5.2.0", "not supported (causal)", True)],
        *[("mean", "5.10.0", "not supported (causal)", True), ("nv-embed", "4.42.4", "not supported (causal)", True)],
        *[("mean", "5.2.0", 0.99995, False), ("mean", "4.42.4", 0.9998, True), ("nv-embed", "5.2.0", math.nan, True)],
        *[("nv-embed", "4.42.4", "not run", False), ("nv-embed", "5.2.0", "failed: OSError: gone", True)],
    ],
)
def test_which_cells_of_the_compatibility_table_are_bad(tmp_path, format, version, value, is_bad):
    from tools.compat.environments import Environment
    from tools.compat_matrix import bad_cells

    environment = Environment(tmp_path, {"transformers": version, "sentence-transformers": "5.2.0"})
    title = f"{version} / 5.2.0"
    found = bad_cells({title: {"tiny": {"sdpa": value, "eager": 1.0}}}, [environment], {"tiny": format})
    assert found == ([f"tiny | {title} | sdpa"] if is_bad else [])
