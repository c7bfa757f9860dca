"""The name table, reading Hugging Face folders, and random weights that do not depend on the layout."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM, MistralModel

from nvembed_mcore.checkpoint.hf_folder import WeightsError, open_hf_folder
from nvembed_mcore.checkpoint.hf_import import RandomWeights, load_weights
from nvembed_mcore.checkpoint.names import join_shards, local_shard, name_table, to_hf
from nvembed_mcore.config import PoolingConfig

CONFIG = MistralConfig(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=6,
    initializer_range=0.1,
)
POOLING = PoolingConfig(num_latents=5, num_heads=2, head_width=12)
QKV = "decoder.layers.1.self_attention.linear_qkv.weight"
LAYER = "embedding_model.layers.1."


def random_tensors(entries):
    return {name: torch.randn(shape) for entry in entries for name, shape in entry.hf.items()}


def entry_of(entries, name):
    return next(entry for entry in entries if entry.name == name)


def targets(entries, tp_size=1, dtype=torch.float32):
    """Tensors to be filled, of one tensor rank."""
    zeros = {name: torch.zeros(shape) for entry in entries for name, shape in entry.hf.items()}
    return {entry.name: local_shard(entry, zeros.__getitem__, 0, tp_size).to(dtype) for entry in entries}


def loaded(source, entries, tp_rank=0, tp_size=1, dtype=torch.float32):
    weights = targets(entries, tp_size, dtype)
    missing = load_weights(source, entries, weights, tp_rank, tp_size)
    return {name: tensor for name, tensor in weights.items() if name not in missing}, missing


@pytest.fixture(scope="module")
def base_model():
    torch.manual_seed(0)
    return MistralForCausalLM(CONFIG)


def test_the_published_model_has_these_names_and_this_size():
    config = MistralConfig(rms_norm_eps=1e-5)  # the defaults are Mistral-7B's
    shapes = {name: shape for entry in name_table(config, PoolingConfig()) for name, shape in entry.hf.items()}
    assert len(shapes) == 304
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 7_851_016_192
    assert shapes["latent_attention_model.cross_attend_blocks.0.fn.to_kv.weight"] == (65536, 4096)
    assert shapes["latent_attention_model.cross_attend_blocks.1.fn.net.0.bias"] == (32768,)
    assert shapes["embedding_model.layers.31.self_attn.k_proj.weight"] == (1024, 4096)


@pytest.mark.parametrize("kind", ["latent", "self_attention", "mean", "last", "multi_layer"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_round_trip_is_exact(kind, tp_size):
    entries = name_table(CONFIG, PoolingConfig(kind=kind, num_latents=5, num_heads=2, head_width=12))
    tensors, back = random_tensors(entries), {}
    for entry in entries:
        shards = [local_shard(entry, tensors.__getitem__, rank, tp_size) for rank in range(tp_size)]
        whole = join_shards(entry, shards)
        assert tuple(whole.shape) == entry.shape
        back |= to_hf(entry, whole)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor), name


def test_rows_of_a_group_are_its_queries_its_key_its_value():
    entries = name_table(CONFIG, POOLING)
    tensors = random_tensors(entries)
    q, k, v = (tensors[f"{LAYER}self_attn.{part}_proj.weight"] for part in "qkv")
    rows = []
    for group in range(4):
        rows += [q[head * 6 : head * 6 + 6] for head in (2 * group, 2 * group + 1)]
        rows += [k[group * 6 : group * 6 + 6], v[group * 6 : group * 6 + 6]]
    whole = torch.cat(rows)
    entry = entry_of(entries, QKV)
    for rank in range(2):
        assert torch.equal(local_shard(entry, tensors.__getitem__, rank, 2), whole[rank * 48 : rank * 48 + 48])


def test_a_rank_holds_its_gate_rows_then_its_up_rows():
    entries = name_table(CONFIG, POOLING)
    tensors = random_tensors(entries)
    entry = entry_of(entries, "decoder.layers.1.mlp.linear_fc1.weight")
    gate, up = (tensors[f"{LAYER}mlp.{part}_proj.weight"] for part in ("gate", "up"))
    shard = local_shard(entry, tensors.__getitem__, 1, 2)
    assert torch.equal(shard, torch.cat([gate[12:], up[12:]]))
    assert torch.equal(local_shard(entry, tensors.__getitem__, 0, 1), torch.cat([gate, up]))


def test_the_vocabulary_is_padded_with_zeros():
    entry = name_table(CONFIG, POOLING)[0]
    table = torch.randn(300, 32)
    shards = [local_shard(entry, lambda _: table, rank, 4) for rank in range(4)]
    assert [shard.shape[0] for shard in shards] == [96] * 4
    assert torch.equal(shards[3][: 300 - 288], table[288:]) and not shards[3][12:].any()
    assert to_hf(entry, torch.cat(shards))["embedding_model.embed_tokens.weight"].shape == (300, 32)


@pytest.mark.parametrize("max_shard_size", ["20KB", "5GB"])
@pytest.mark.parametrize("bare", [False, True])
def test_a_base_model_is_read_and_has_no_head(base_model, tmp_path, max_shard_size, bare):
    (base_model.model if bare else base_model).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "20KB")
    entries = name_table(CONFIG, POOLING)
    shards = []
    for rank in range(2):
        weights = targets(entries, 2)
        missing = load_weights(open_hf_folder(tmp_path), entries, weights, rank, 2)
        assert missing == {entry.name for entry in entries if entry.is_head}
        assert not any(weights[name].any() for name in missing), "what is missing is left alone"
        shards.append(weights)
    for entry in entries:
        if not entry.is_head:
            whole = join_shards(entry, [weights[entry.name] for weights in shards])
            for name, tensor in to_hf(entry, whole).items():
                assert torch.equal(tensor, base_model.model.get_parameter(name.removeprefix("embedding_model."))), name


def nv_embed_folder(path, entries):
    (path / "config.json").write_text("{}")
    tensors = random_tensors(entries)
    save_file(tensors, path / "model.safetensors")
    return tensors


def test_a_folder_with_a_head_gives_everything(tmp_path):
    entries = name_table(CONFIG, POOLING)
    tensors = nv_embed_folder(tmp_path, entries)
    weights, missing = loaded(open_hf_folder(tmp_path), entries)
    assert not missing and weights.keys() == {entry.name for entry in entries}
    assert torch.equal(weights["pooling.latents"], tensors["latent_attention_model.latents"])


def test_a_missing_tensor_is_named(tmp_path):
    entries = name_table(CONFIG, POOLING)
    tensors = nv_embed_folder(tmp_path, entries)
    for gone in (f"{LAYER}mlp.up_proj.weight", "latent_attention_model.latents"):
        save_file({name: t for name, t in tensors.items() if name != gone}, tmp_path / "model.safetensors")
        with pytest.raises(WeightsError, match=gone):
            loaded(open_hf_folder(tmp_path), entries)


def test_a_wrong_shape_names_file_tensor_and_both_shapes(tmp_path):
    entries = name_table(CONFIG, POOLING)
    tensors = nv_embed_folder(tmp_path, entries)
    save_file({**tensors, "embedding_model.norm.weight": torch.ones(31)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.safetensors.*embedding_model\.norm\.weight.*\[31\].*\[32\]"):
        loaded(open_hf_folder(tmp_path), entries)


def test_folders_that_cannot_be_used(tmp_path, base_model):
    with pytest.raises(WeightsError, match="no Hugging Face folder at .*nowhere"):
        open_hf_folder(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match=r"no config\.json"):
        open_hf_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="no weights"):
        open_hf_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(WeightsError, match="convert them to safetensors"):
        open_hf_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(WeightsError, match=r"cannot read .*model\.safetensors"):
        open_hf_folder(tmp_path)
    save_file({"bert.embeddings.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="no Mistral backbone.*bert.embeddings.weight"):
        open_hf_folder(tmp_path)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "weights.bin", "absent.safetensors"])
def test_an_index_names_only_files_of_its_folder(tmp_path, file):
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"embed_tokens.weight": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="names"):
        open_hf_folder(tmp_path)


def random_source(entries, seed=1, pooling=POOLING):
    return RandomWeights(entries, seed, CONFIG.initializer_range, pooling)


def test_random_weights_do_not_depend_on_the_layout():
    entries = name_table(CONFIG, POOLING)
    alone, _ = loaded(random_source(entries), entries)
    shards = [loaded(random_source(entries), entries, rank, 2)[0] for rank in range(2)]
    for entry in entries:
        assert torch.equal(join_shards(entry, [shard[entry.name] for shard in shards]), alone[entry.name]), entry.name
    last_stage = entries[len(entries) // 2 :]
    stage, _ = loaded(random_source(last_stage), last_stage)
    assert all(torch.equal(stage[entry.name], alone[entry.name]) for entry in last_stage)
    other, _ = loaded(random_source(entries, seed=2), entries)
    assert not torch.equal(other[QKV], alone[QKV]) and not torch.equal(alone[QKV], alone[QKV.replace("1", "0")])


def test_random_weights_follow_the_published_start():
    config = MistralConfig(**{**CONFIG.to_dict(), "hidden_size": 128, "vocab_size": 1000, "head_dim": 16})
    entries = name_table(config, PoolingConfig(num_latents=64, num_heads=2))
    weights, missing = loaded(random_source(entries), entries)
    assert not missing
    assert weights["embedding.word_embeddings.weight"][:1000].std().item() == pytest.approx(0.1, rel=0.02)
    assert weights[QKV].std().item() == pytest.approx(0.1, rel=0.03)
    assert weights["pooling.latents"].std().item() == pytest.approx(1.0, rel=0.05)
    for name, inputs in (("to_q.weight", 128), ("mlp_in.bias", 128), ("mlp_out.weight", 512), ("mlp_out.bias", 512)):
        largest = weights[f"pooling.{name}"].abs().max().item()
        assert 0.9 * inputs**-0.5 < largest <= inputs**-0.5, name
    for name in ("decoder.final_layernorm.weight", "pooling.norm_context.weight", "pooling.norm_mlp.weight"):
        assert torch.equal(weights[name], torch.ones(128))
    assert not weights["pooling.norm_query.bias"].any()


def test_multi_layer_has_its_names_and_the_size_of_the_paper():
    pooling = PoolingConfig(kind="multi_layer", num_latents=768, num_heads=32, head_width=2048)
    entries = [entry for entry in name_table(MistralConfig(), pooling) if entry.is_head]
    shapes = {name.removeprefix("latent_attention_model."): shape for e in entries for name, shape in e.hf.items()}
    assert len(shapes) == 15
    assert shapes["latents"] == (768, 4096) and shapes["layer_embedding.weight"] == (32, 4096)
    assert shapes["cross_attend_blocks.0.fn.to_out.weight"] == (4096, 65536)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == pytest.approx(1.28e9, rel=5e-3)


@pytest.mark.parametrize(("initializer_range", "deviation"), [(None, 1.0), (0.3, 0.3)])
def test_the_embedding_of_layers_starts_normal(initializer_range, deviation):
    config = MistralConfig(**{**CONFIG.to_dict(), "hidden_size": 512})
    pooling = PoolingConfig(kind="multi_layer", num_latents=64, num_heads=2, initializer_range=initializer_range)
    entries = [entry for entry in name_table(config, pooling) if entry.is_head]
    source = RandomWeights(entries, 1, 0.02, pooling)
    weights = {entry.name: source.read(*next(iter(entry.hf.items()))) for entry in entries}
    assert weights["pooling.layer_embedding.weight"].std().item() == pytest.approx(deviation, rel=0.1)
    assert weights["pooling.latents"].std().item() == pytest.approx(1.0, rel=0.05)


def test_the_heads_own_initializer_range():
    pooling = PoolingConfig(num_latents=64, num_heads=2, head_width=64, initializer_range=0.3)
    entries = name_table(CONFIG, pooling)
    weights, _ = loaded(random_source(entries, pooling=pooling), entries)
    assert weights["pooling.to_kv.weight"].std().item() == pytest.approx(0.3, rel=0.05)
    assert not weights["pooling.mlp_in.bias"].any()
    assert weights["pooling.latents"].std().item() == pytest.approx(1.0, rel=0.1)


def test_tensors_are_equal_to_those_of_the_file(base_model, tmp_path):
    """Slicing a safetensors file by pieces gives the file's numbers in its dtype."""
    MistralModel(CONFIG).bfloat16().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    entries = [entry for entry in name_table(CONFIG, POOLING) if not entry.is_head]
    weights, _ = loaded(open_hf_folder(tmp_path), entries, 1, 2, torch.bfloat16)
    proj = weights["decoder.layers.0.self_attention.linear_proj.weight"]
    assert proj.dtype == torch.bfloat16
    assert torch.equal(proj, stored["layers.0.self_attn.o_proj.weight"][:, 24:])
