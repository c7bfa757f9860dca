"""Load an export without running the code inside it: the modelling file is this package's own copy."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nvembed_mcore.checkpoint.hf_folder import WeightsError, open_hf_folder

if TYPE_CHECKING:
    from nvembed_mcore.checkpoint.hf_files.modeling_nvembed import NVEmbedModel


def load_exported(directory: str | os.PathLike, device: str = "cpu") -> NVEmbedModel:
    """The exported model in evaluation mode, in the dtype of its weights.

    Raises:
        WeightsError: the folder, its configuration or its weights are missing or unreadable, or this project did not
            write it; or torch does not know the device, or it has too little memory.
    """
    from nvembed_mcore.checkpoint.hf_files.modeling_nvembed import NVEmbedModel

    directory = Path(directory)
    folder = open_hf_folder(directory)
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"cannot read {directory / 'config.json'}: {error}") from error
    if config.get("model_type") != "nvembed" or "pooling" not in config:
        raise WeightsError(
            f"{directory} is not an export of this project: model_type is {config.get('model_type')!r} and pooling is "
            f"{config.get('pooling')!r} in config.json ('nvembed' and a kind of pooling are needed)"
        )
    try:
        model, report = NVEmbedModel.from_pretrained(
            directory, dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True
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
