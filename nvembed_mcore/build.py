"""The model of a run with its initial weights: from Hugging Face or PEFT folders, an earlier stage, or at random."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel
from transformers import MistralConfig

from nvembed_mcore.checkpoint import hf_import, peft, store
from nvembed_mcore.checkpoint.hf_folder import HfFolder
from nvembed_mcore.checkpoint.hf_model import check_pooling, open_hf_model, same_head
from nvembed_mcore.checkpoint.names import Entry, name_table
from nvembed_mcore.config import ConfigError, LoraConfig, ModelConfig, PoolingConfig, RunConfig
from nvembed_mcore.model.encoder import Encoder, wrap_data_parallel
from nvembed_mcore.model.mistral import read_mistral_config
from nvembed_mcore.parallel.groups import Groups, every_rank_does

log = logging.getLogger(__name__)


def read_architecture(model: ModelConfig) -> MistralConfig:
    """The backbone's configuration, from wherever the weights or the architecture come."""
    if model.config is not None:
        return read_mistral_config(model.config)
    start = store.find_checkpoint(model.init_from)
    if start:
        return MistralConfig.from_dict(start.facts["hf_config"])
    if not (Path(model.init_from) / "config.json").is_file():
        raise ConfigError(
            f"model.init_from: {model.init_from} is neither a run or checkpoint folder with a complete checkpoint "
            f"nor a Hugging Face folder with a config.json"
        )
    return read_mistral_config(model.init_from)


def build_model(config: RunConfig, hf_config: MistralConfig, groups: Groups) -> list[DistributedDataParallel]:
    """This stage's chunks of the encoder with their initial weights, under data parallelism.

    Raises:
        ConfigError: what `model.init_from` or `model.lora.init_from` holds is not what the configuration describes.
        WeightsError: a folder's weights are missing or damaged.
    """
    if any(dim >= hf_config.hidden_size for dim in config.loss.matryoshka_dims):
        raise ConfigError(
            f"loss.matryoshka_dims must be below the model's hidden_size {hf_config.hidden_size}, got "
            f"{config.loss.matryoshka_dims}"
        )
    start = store.find_checkpoint(config.model.init_from) if config.model.init_from else None
    missing = _parts_to_make(start, config.model, hf_config) if start else set()
    temperature = config.loss.temperature if config.loss.learn_temperature else None
    encoders = [
        Encoder(hf_config, config.model, config.parallel, groups, chunk=chunk, temperature=temperature)
        for chunk in range(config.parallel.chunks_per_stage)
    ]
    if start:
        store.load_weights(start, encoders, but=missing)
        log.info("weights from step %d of %s", start.step, start.path)
    sources = _sources(config, hf_config, is_from_checkpoint=start is not None)
    table = name_table(hf_config, config.model.pooling, config.model.lora)
    entries = [entry for entry in table if not start or entry.name in missing]
    every_rank_does(lambda: [_fill(encoder, entries, sources, groups) for encoder in encoders])
    return wrap_data_parallel(encoders, config.parallel, distributed_optimizer=config.optim.distributed)


def base_of(model: ModelConfig, hf_config: MistralConfig) -> dict[str, str] | None:
    """Name and fingerprint of the Hugging Face folder that the backbone comes from, if need be through earlier stages;
    None where it comes from random weights."""
    if model.init_from is None:
        return None
    start = store.find_checkpoint(model.init_from)
    if start:
        return start.facts.get("base")
    folder = open_hf_model(model.init_from).folder
    return {"name": model.init_from, "fingerprint": peft.base_fingerprint(folder, hf_config)}


def _parts_to_make(start: store.Checkpoint, model: ModelConfig, hf_config: MistralConfig) -> set[str]:
    """Parameters that the checkpoint has not, because it has no head or no adapters at all.

    A head or adapters that it has must be those of the configuration.
    """
    saved_pooling = PoolingConfig(**start.facts["config"]["model"]["pooling"])
    has_head = any(entry.is_head for entry in name_table(hf_config, saved_pooling))
    if has_head and not same_head(saved_pooling, model.pooling, hf_config.hidden_size):
        changed = store.differences(dataclasses.asdict(saved_pooling), dataclasses.asdict(model.pooling))
        lines = "".join(f"\n  model.pooling.{line}" for line in changed)
        raise ConfigError(f"the head of model.init_from {start.path} is another one (saved -> now):{lines}")
    table = name_table(hf_config, model.pooling, model.lora)
    heads, adapters = ({entry.name for entry in table if entry.part == part} for part in ("head", "adapters"))
    saved_lora, lora = store.adapters_of(start.facts), _settings(model.lora)
    if saved_lora and saved_lora != lora:
        raise ConfigError(
            f"model.init_from {start.path} has adapters {saved_lora}, model.lora now is {lora}. Export it, which "
            f"merges them, and start from the export, or set model.lora to what it has"
        )
    if saved_lora and model.lora.init_from:
        raise ConfigError(
            f"model.init_from {start.path} and model.lora.init_from {model.lora.init_from} both bring adapters: "
            f"give one of them"
        )
    return (set() if has_head else heads) | (set() if saved_lora else adapters)


def _settings(lora: LoraConfig | None) -> dict | None:
    return store.adapter_settings(dataclasses.asdict(lora)) if lora else None


def _sources(
    config: RunConfig, hf_config: MistralConfig, *, is_from_checkpoint: bool
) -> list[HfFolder | hf_import.RandomWeights]:
    """Where parameters come from; the first source that has one gives it."""
    model, sources = config.model, []
    base = None
    if model.init_from and not is_from_checkpoint:
        found = open_hf_model(model.init_from)
        check_pooling(found, model.pooling)
        hf_import.verify_sums(found.folder)
        base = found.folder
    if model.lora and model.lora.init_from:
        sources.append(peft.open_peft_folder(model, hf_config, base))
    if base:
        sources.append(base)
    entries = name_table(hf_config, model.pooling, model.lora)
    random = hf_import.RandomWeights(entries, config.seed, hf_config.initializer_range, model.pooling)
    return [*sources, random]


def _fill(encoder: Encoder, entries: list[Entry], sources: list, groups: Groups) -> None:
    """Weights by name, the same in every layout; the encoder's part of `entries`."""
    parameters = encoder.parameters_by_global_name()
    entries = [entry for entry in entries if entry.name in parameters]

    for source in sources:
        missing = hf_import.load_weights(source, entries, parameters, groups.tp_rank, groups.tp_size)
        entries = [entry for entry in entries if entry.name in missing]
