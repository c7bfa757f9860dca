"""Load an export without running the code inside it: the modelling file is this package's own copy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvembed_mcore.checkpoint.hf_folder import WeightsError, open_hf_folder, read_json
from nvembed_mcore.checkpoint.hf_model import check_modules
from nvembed_mcore.checkpoint.names import BACKBONE

if TYPE_CHECKING:
    from nvembed_mcore.checkpoint.hf_files.modeling_nvembed import NVEmbedModel


def load_exported(directory: str | os.PathLike, device: str = "cpu") -> NVEmbedModel:
    """The exported model, of either format, in evaluation mode and in the dtype of its weights.

    Raises:
        WeightsError: the folder, its configuration or its weights are missing or unreadable, this project did not
            write it, or its `modules.json` names foreign Python types; or torch does not know the device, or it has
            too little memory.
    """
    from nvembed_mcore.checkpoint.hf_files.modeling_nvembed import NVEmbedConfig, NVEmbedModel

    directory = Path(directory)
    folder = open_hf_folder(directory)
    config = read_json(directory / "config.json")
    has_modules = check_modules(directory / "modules.json")
    settings: dict[str, Any] = {}
    if config.get("model_type") == "mistral" and "is_causal" in config and has_modules:
        # The format `mean`: NV-Embed's model around the same weights, under names that have no prefix there.
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
    try:
        model, report = NVEmbedModel.from_pretrained(
            directory, dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True, **settings
        )
    except RuntimeError as error:  # what transformers raises for shapes that differ
        raise WeightsError(f"the weights in {directory} do not fit its config.json: {error}") from error
    if report["missing_keys"]:
        raise WeightsError(
            f"{folder.path} lacks {len(report['missing_keys'])} tensors: {sorted(report['missing_keys'])[:3]}"
        )
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA raises the latter
        raise WeightsError(f"cannot put the model of {directory} on device {device!r}: {error}") from error


def exported_prompt(directory: str | os.PathLike) -> str:
    """What the model was exported to put in front of queries.

    Raises:
        WeightsError: `config_sentence_transformers.json` is missing or unreadable, or has no prompt named `query`.
    """
    file = Path(directory) / "config_sentence_transformers.json"
    prompt = read_json(file).get("prompts", {}).get("query")
    if not isinstance(prompt, str):
        raise WeightsError(f"{file}: the prompt named 'query' must be a string, got {prompt!r}")
    return prompt
