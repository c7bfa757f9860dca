"""Load an export without running the code inside it: the modelling file is this package's own copy."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvembed_mcore.checkpoint.hf_folder import WeightsError, check_sums, read_json
from nvembed_mcore.checkpoint.hf_model import check_token_ids, open_hf_model
from nvembed_mcore.checkpoint.names import BACKBONE
from nvembed_mcore.progress import show_each

ADAPTERS = "adapter_config.json"

if TYPE_CHECKING:
    from nvembed_mcore.checkpoint.hf_files.modeling_nvembed import NVEmbedModel


def load_exported(directory: str | os.PathLike, device: str = "cpu") -> NVEmbedModel:
    """The exported model, of either format, in evaluation mode and in the dtype of its weights.

    Raises:
        ConfigError, WeightsError: the folder, its configuration or its weights are missing, unreadable or at odds, as
            `import-hf` finds it too; this project did not write it, or its `modules.json` names foreign Python types;
            the tokenizer has ids that the model has not; or torch does not know the device, or it has too little
            memory.
    """
    from nvembed_mcore.checkpoint.hf_files.modeling_nvembed import NVEmbedConfig, NVEmbedModel

    directory = Path(directory)
    found = open_hf_model(directory)
    if (directory / ADAPTERS).exists():
        raise WeightsError(f"{directory} has an {ADAPTERS}: transformers would load its adapters too")
    config = read_json(directory / "config.json")
    settings: dict[str, Any] = {}
    if config.get("model_type") == "mistral" and "is_causal" in config and (directory / "modules.json").is_file():
        # The format `mean`: NV-Embed's model around the same weights, under names that have no prefix there.
        if found.pooling is None or found.pooling.kind != "mean":
            kind = found.pooling and found.pooling.kind
            raise WeightsError(f"{directory / '1_Pooling' / 'config.json'} asks for {kind!r} pooling, not for 'mean'")
        is_causal = config.pop("is_causal")
        wrapped = NVEmbedConfig(
            text_config=config, pooling="mean", is_causal=is_causal, query_prompt=exported_prompt(directory)
        )
        settings = {"config": wrapped, "key_mapping": {"^": BACKBONE}}
    elif config.get("model_type") != "nvembed" or "pooling" not in config:
        raise WeightsError(
            f"{directory} is not an export of this project: model_type is {config.get('model_type')!r} and pooling is "
            f"{config.get('pooling')!r} in config.json ('nvembed' and a kind of pooling are needed, or 'mistral', "
            f"is_causal and a modules.json beside it)"
        )
    check_token_ids(directory, found)
    check_sums(directory, found.folder.files)
    try:
        with _without_bars():
            model, report = NVEmbedModel.from_pretrained(
                directory,
                dtype="auto",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **settings,
            )
    except RuntimeError as error:  # what transformers raises for shapes that differ
        raise WeightsError(f"the weights in {directory} do not fit its config.json: {error}") from error
    if report["missing_keys"]:
        raise WeightsError(
            f"{directory} lacks {len(report['missing_keys'])} tensors: {sorted(report['missing_keys'])[:3]}"
        )
    for name, parameter in show_each(list(model.named_parameters()), "check weights", "tensors"):
        found.folder.check_finite([name], parameter.detach())
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA raises the latter
        raise WeightsError(f"cannot put the model of {directory} on device {device!r}: {error}") from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers' own bar would also go to a file, and with --quiet."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def exported_prompt(directory: str | os.PathLike) -> str:
    """What the model was exported to put in front of queries.

    Raises:
        WeightsError: `config_sentence_transformers.json` is missing or unreadable, or has no prompt named `query`.
    """
    file = Path(directory) / "config_sentence_transformers.json"
    prompts = read_json(file).get("prompts")
    prompt = prompts.get("query") if isinstance(prompts, dict) else None
    if not isinstance(prompt, str):
        raise WeightsError(f"{file}: the prompt named 'query' must be a string, got {prompt!r}")
    return prompt
