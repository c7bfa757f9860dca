"""The model of a run with its initial weights: from Hugging Face or PEFT folders, an earlier stage, or at random."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from transformers import MistralConfig

from nvembed_mcore.checkpoint import hf_import, peft, store
from nvembed_mcore.checkpoint.hf_folder import HfFolder
from nvembed_mcore.checkpoint.hf_model import check_pooling, open_hf_model, same_head
from nvembed_mcore.checkpoint.names import Entry, name_table
from nvembed_mcore.config import ConfigError, ModelConfig, ParallelConfig, PoolingConfig, PrecisionConfig, RunConfig
from nvembed_mcore.model import fp8_step
from nvembed_mcore.model.encoder import Encoder, wrap_data_parallel
from nvembed_mcore.model.mistral import read_mistral_config
from nvembed_mcore.parallel.groups import Groups, every_rank_does, first_rank_does

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
    encoders = build_encoders(
        config.model, hf_config, config.parallel, groups, seed=config.seed, **_of_training(config, hf_config)
    )
    return wrap_data_parallel(encoders, config.parallel, distributed_optimizer=config.optim.distributed)


def build_empty_model(config: RunConfig, hf_config: MistralConfig, groups: Groups) -> list[DistributedDataParallel]:
    """The same without the weights: nothing is read and no rank is asked, so that a dry run can do it.

    Raises:
        ConfigError: the layers cannot be built as the configuration describes them.
    """
    encoders = _empty_encoders(config.model, hf_config, config.parallel, groups, **_of_training(config, hf_config))
    return wrap_data_parallel(encoders, config.parallel, distributed_optimizer=config.optim.distributed)


def check_start(model: ModelConfig, hf_config: MistralConfig) -> None:
    """Look at what `model.init_from` says of itself, without its weights.

    Raises:
        ConfigError, WeightsError: as `build_model`.
    """
    start = store.find_checkpoint(model.init_from)
    if start:
        _parts_to_make(start, model, hf_config)
    else:
        check_pooling(open_hf_model(model.init_from), model.pooling)


def _of_training(config: RunConfig, hf_config: MistralConfig) -> dict[str, Any]:
    """What the encoders of a run need that those which only embed do not."""
    if any(dim >= hf_config.hidden_size for dim in config.loss.matryoshka_dims):
        raise ConfigError(
            f"loss.matryoshka_dims must be below the model's hidden_size {hf_config.hidden_size}, got "
            f"{config.loss.matryoshka_dims}"
        )
    dropout = config.model.adapters.dropout if config.model.adapters else 0.0
    if config.loss.r_drop_weight and not dropout and not hf_config.attention_dropout:
        raise ConfigError(
            f"loss.r_drop_weight = {config.loss.r_drop_weight} compares embeddings under different dropout, but "
            f"nothing is dropped: model.lora.rank is {config.model.lora.rank}, model.lora.dropout "
            f"{config.model.lora.dropout} and the model's attention_dropout {hf_config.attention_dropout}"
        )
    temperature = config.loss.temperature if config.loss.learn_temperature else None
    return {"precision": config.precision, "temperature": temperature}


def _empty_encoders(
    model: ModelConfig,
    hf_config: MistralConfig,
    parallel: ParallelConfig,
    groups: Groups,
    *,
    precision: PrecisionConfig | None,
    temperature: float | None,
) -> list[Encoder]:
    return [
        Encoder(hf_config, model, parallel, groups, precision=precision, chunk=chunk, temperature=temperature)
        for chunk in range(parallel.chunks_per_stage)
    ]


def build_encoders(
    model: ModelConfig,
    hf_config: MistralConfig,
    parallel: ParallelConfig,
    groups: Groups,
    *,
    precision: PrecisionConfig | None = None,
    seed: int = 0,
    temperature: float | None = None,
) -> list[Encoder]:
    """This stage's chunks with their initial weights, without anything that only training needs.

    Args:
        precision: data types; None: the default ones.
        seed: of the weights that are drawn.
        temperature: where a learned temperature starts; None: it is not learned.

    Raises:
        ConfigError, WeightsError: as `build_model`.
    """
    start = store.find_checkpoint(model.init_from) if model.init_from else None
    table = name_table(hf_config, model.pooling, model.adapters)
    sources = _sources(model, seed, hf_config, start, groups)
    missing = _parts_to_make(start, model, hf_config) if start else {entry.name for entry in table}
    encoders = _empty_encoders(model, hf_config, parallel, groups, precision=precision, temperature=temperature)
    log.info("%s", encoders[0].backend)
    if start:
        store.load_weights(start, encoders, but=missing)
        log.info("weights from step %d of %s", start.step, start.path)
    entries = [entry for entry in table if entry.name in missing]
    every_rank_does(lambda: [_fill(encoder, entries, sources, groups) for encoder in encoders])
    return encoders


def _parts_to_make(start: store.Checkpoint, model: ModelConfig, hf_config: MistralConfig) -> set[str]:
    """Parameters that the checkpoint does not give: it has no head or adapters at all, or a PEFT folder brings them.

    A head or adapters that it has must be those of the configuration.
    """
    saved_pooling = PoolingConfig(**start.facts["config"]["model"]["pooling"])
    has_head = any(entry.is_head for entry in name_table(hf_config, saved_pooling))
    if has_head and not same_head(saved_pooling, model.pooling, hf_config.hidden_size):
        changed = store.differences(dataclasses.asdict(saved_pooling), dataclasses.asdict(model.pooling))
        lines = "".join(f"\n  model.pooling.{line}" for line in changed)
        raise ConfigError(f"the head of model.init_from {start.path} is another one (saved -> now):{lines}")
    table = name_table(hf_config, model.pooling, model.adapters)
    heads, adapters = ({entry.name for entry in table if entry.part == part} for part in ("head", "adapters"))
    has_adapters = _check_adapters(start, model)
    brings_head = model.lora.init_from is not None and peft.has_head(model.lora.init_from)
    return (heads if brings_head or not has_head else set()) | (set() if has_adapters else adapters)


def _check_adapters(start: store.Checkpoint, model: ModelConfig) -> bool:
    """Whether the checkpoint has adapters, which must then be those of the configuration; their dropout may change."""
    saved = store.adapters_of(start.facts)
    if saved is None:
        return False
    now = store.adapter_settings(dataclasses.asdict(model.lora))
    changed = [line for line in store.differences(saved, now) if not line.startswith("dropout:")]
    if changed:
        lines = "".join(f"\n  model.lora.{line}" for line in changed)
        raise ConfigError(
            f"model.init_from {start.path} has other adapters (saved -> now):{lines}\nSet these back, or export it, "
            f"which merges its adapters, and start from the export"
        )
    if model.lora.init_from:
        raise ConfigError(
            f"model.init_from {start.path} and model.lora.init_from {model.lora.init_from} both bring adapters: "
            f"give one of them"
        )
    return True


def _sources(
    model: ModelConfig, seed: int, hf_config: MistralConfig, start: store.Checkpoint | None, groups: Groups
) -> list[HfFolder | hf_import.RandomWeights]:
    """Where parameters come from that no checkpoint gives; the first source that has one gives it."""
    sources = []
    random = hf_import.RandomWeights(
        name_table(hf_config, model.pooling, model.adapters),
        seed,
        hf_config.initializer_range,
        model.pooling,
    )
    if model.init_from and not start:
        found = every_rank_does(lambda: open_hf_model(model.init_from))[groups.rank]
        check_pooling(found, model.pooling)
        hf_import.verify_sums(found.folder)
        sources.append(found.folder)
    if model.lora.init_from:
        parts = peft.parts_in(store.open_weights(start)) if start else peft.parts_from((sources or [random])[0])
        fingerprint = first_rank_does(lambda: peft.base_fingerprint(parts, hf_config))
        opened = every_rank_does(lambda: peft.open_peft_folder(model, hf_config, fingerprint))
        sources.insert(0, opened[groups.rank])
    return [*sources, random]


def _fill(encoder: Encoder, entries: list[Entry], sources: list, groups: Groups) -> None:
    """Weights by name, the same in every layout; the encoder's part of `entries`."""
    parameters = encoder.parameters_by_global_name()
    entries = [entry for entry in entries if entry.name in parameters]

    for source in sources:
        missing = hf_import.load_weights(source, entries, parameters, groups.tp_rank, groups.tp_size)
        entries = [entry for entry in entries if entry.name in missing]
    fp8_step.forget_weights(encoder)
