"""Hugging Face folders with random weights, and what the processes of a `World` do with them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import MistralConfig

from nvembed_mcore.checkpoint.names import local_shard, name_table
from nvembed_mcore.config import ModelConfig, PoolingConfig, PrecisionConfig
from tests.helpers.cases import layout
from tests.helpers.checkpoints import seal

Tensors = dict[str, torch.Tensor]
INDEX = "model.safetensors.index.json"


def text_config(config: MistralConfig) -> dict[str, Any]:
    """As version 4 of transformers and the published NV-Embed write it."""
    fields = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim max_position_embeddings rms_norm_eps hidden_act sliding_window"
    ).split()
    values = {name: getattr(config, name) for name in fields if getattr(config, name) is not None}
    return values | {"model_type": "mistral", "rope_theta": config.rope_parameters["rope_theta"]}


def config_json(config: MistralConfig, pooling: PoolingConfig | None) -> dict[str, Any]:
    """`config.json` of a base model, or of NV-Embed with a head."""
    if pooling is None:
        return text_config(config) | {"architectures": ["MistralForCausalLM"]}
    return {
        "architectures": ["NVEmbedModel"],
        "model_type": "nvembed",
        "pooling": pooling.kind,
        "is_causal": False,
        "latent_attention_config": {
            "num_latents_value": pooling.num_latents,
            "num_cross_heads": pooling.num_heads,
            "cross_dim_head": pooling.head_width or config.hidden_size,
        },
        "text_config": text_config(config),
    }


def random_tensors(
    config: MistralConfig, pooling: PoolingConfig | None, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """By NV-Embed's names. Norms near one, so that a norm in another's place shows."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for entry in name_table(config, pooling or PoolingConfig(kind="mean")):
        for name, shape in entry.hf.items():
            values = torch.empty(shape, dtype=torch.float32).normal_(0, 0.1, generator=generator)
            tensors[name] = (values + ("norm" in name and name.endswith("weight"))).to(dtype)
    return tensors


def write_folder(
    path: Path, config: MistralConfig, pooling: PoolingConfig | None, dtype: torch.dtype, num_shards: int = 2
) -> Tensors:
    """A folder of these random weights, a base model's with its own prefix and an `lm_head`; returns its tensors."""
    tensors = random_tensors(config, pooling, dtype)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config_json(config, pooling)), encoding="utf-8")
    if pooling is None:
        tensors = {name.replace("embedding_model.", "model."): tensor for name, tensor in tensors.items()}
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    write_shards(path, tensors, num_shards)
    return tensors


def write_shards(path: Path, tensors: Tensors, num_shards: int) -> None:
    """Tensors dealt to files in turn, with their index."""
    weight_map = {}
    for number in range(num_shards):
        file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        names = list(tensors)[number::num_shards]
        save_file({name: tensors[name] for name in names}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def tensors_of(path: Path) -> Tensors:
    """All tensors of a folder, read by the safetensors library."""
    found: Tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def build_encoder(config: MistralConfig, pooling: PoolingConfig, dtype: str, tp: int, pp: int):
    """Our encoder in this layout, its weights not filled; with its groups and configuration of parallelism."""
    from nvembed_mcore.model.encoder import Encoder

    parallel, groups = layout(tp, pp, False)
    model = ModelConfig(config="unused", pooling=pooling)
    return Encoder(config, model, parallel, groups, precision=PrecisionConfig(dtype=dtype)), parallel, groups


def import_and_save(folder: Path, output: Path, pooling: PoolingConfig, dtype: str, tp: int, pp: int) -> set[str]:
    """Fill the encoder as a run does it, and save its weights as a run does; returns what the folder lacks."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from nvembed_mcore.checkpoint import store
    from nvembed_mcore.checkpoint.hf_import import load_weights
    from nvembed_mcore.checkpoint.hf_model import open_hf_model

    source = open_hf_model(folder)
    config = source.hf_config
    encoder, _, groups = build_encoder(config, pooling, dtype, tp, pp)
    parameters = encoder.parameters_by_global_name()
    entries = [entry for entry in name_table(config, pooling) if entry.name in parameters]
    missing = load_weights(source.folder, entries, parameters, groups.tp_rank, groups.tp_size)
    if groups.rank == 0:
        (output / "state").mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save({"0": store.weights_of(encoder)}, str(output / "state"))
    if groups.rank == 0:
        # Megatron's writer leaves its plans in the table of contents, which ours does not.
        contents = pickle.loads((output / "state/.metadata").read_bytes())  # noqa: S301
        del contents.all_local_plans
        (output / "state/.metadata").write_bytes(pickle.dumps(contents))
        facts = {"step": 0, "config": {"loss": {}, "model": {"pooling": vars(pooling)}}, "hf_config": config.to_dict()}
        (output / "run.json").write_text(json.dumps(facts), encoding="utf-8")
        seal(output, 0)
    return missing


def export_weights(checkpoint: Path, output: Path, config: MistralConfig, pooling: PoolingConfig, dtype: torch.dtype):
    """The weights of a checkpoint as Hugging Face files, in shards of about 100 KB or, for large models, 500 MB."""
    from nvembed_mcore.checkpoint.safetensors_stream import write_weights
    from nvembed_mcore.checkpoint.store import find_checkpoint, open_weights

    output.mkdir()
    limit = 100_000 if config.hidden_size < 1000 else 500_000_000
    write_weights(open_weights(find_checkpoint(checkpoint)), name_table(config, pooling), output, dtype, limit)


def many(function: Callable, arguments: list[tuple]) -> list:
    """Several calls in one job, which joins the processes only once."""
    return [function(*one) for one in arguments]


def imported(folder: Path, output: Path, dtype: str | None = None):
    """`nvembed import-hf`, by all ranks."""
    from nvembed_mcore.checkpoint.import_run import import_hf

    return import_hf(str(folder), str(output), dtype=dtype)


def command(arguments: list[str]) -> int:
    """`nvembed`, by all ranks."""
    from nvembed_mcore.cli import main

    return main(arguments)


def load_and_compare(
    checkpoint: Path, folder: Path, pooling: PoolingConfig, dtype: str, tp: int, pp: int
) -> list[str]:
    """Fill the encoder from a checkpoint of weights; names of local parameters that are not the folder's numbers."""
    from nvembed_mcore.checkpoint.store import find_checkpoint, load_weights

    found = find_checkpoint(checkpoint)
    config = MistralConfig.from_dict(found.facts["hf_config"])
    encoder, _, groups = build_encoder(config, pooling, dtype, tp, pp)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.fill_(float("nan"))
    load_weights(found, [encoder])
    tensors = tensors_of(folder)
    table = {entry.name: entry for entry in name_table(config, pooling)}
    different = []
    for name, parameter in encoder.parameters_by_global_name().items():
        shard = local_shard(table[name], lambda hf: tensors[hf], groups.tp_rank, groups.tp_size)
        if not torch.equal(parameter, shard.to(parameter.dtype)):
            different.append(name)
    return different


def parity(folder: Path, pooling: PoolingConfig, heads: int, tp: int, pp: int) -> dict[str, float]:
    """Largest difference of hidden states and of embeddings from Hugging Face's model, relative to the largest."""
    from transformers import MistralModel

    from nvembed_mcore.checkpoint.hf_import import load_weights
    from nvembed_mcore.checkpoint.hf_model import open_hf_model
    from nvembed_mcore.data.packing import make_pack
    from nvembed_mcore.model.encoder import wrap_data_parallel
    from nvembed_mcore.schedule import embed_packs
    from tests.helpers import models

    source = open_hf_model(folder)
    config = source.hf_config
    encoder, parallel, groups = build_encoder(config, pooling, "float32", tp, pp)
    parameters = encoder.parameters_by_global_name()
    table = name_table(config, pooling)
    entries = [entry for entry in table if entry.name in parameters]
    load_weights(source.folder, entries, parameters, groups.tp_rank, groups.tp_size)
    states: list[torch.Tensor] = []
    if groups.is_last_stage:
        encoder.decoder.final_layernorm.register_forward_hook(
            lambda module, inputs, output: states.append(output[:, 0])
        )
    chunks = wrap_data_parallel([encoder], parallel, distributed_optimizer=False)
    texts = models.random_texts([7, 16, 3, 12], config.vocab_size)
    found = embed_packs(chunks, [make_pack(texts)])
    if not groups.is_last_stage:
        return {}
    tensors = tensors_of(folder)
    reference = MistralModel(config).eval()
    prefix = "embedding_model."
    reference.load_state_dict(
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    )
    reference.config.is_causal = False
    for layer in reference.layers:
        layer.self_attn.is_causal = False
    head = {
        entry.name.removeprefix("pooling."): local_shard(entry, tensors.__getitem__, 0, 1)
        for entry in table
        if entry.is_head
    }
    with torch.no_grad():
        expected = torch.cat([models.reference_states(reference, text) for text in texts])
        vectors = torch.stack(
            [models.reference_embedding(reference, head, text, pooling.kind, heads) for text in texts]
        )
    return {
        "states": ((states[0] - expected).abs().max() / expected.abs().max()).item(),
        "embeddings": (found[0] - vectors).abs().max().item(),
    }
