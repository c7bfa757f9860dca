"""What a Hugging Face `config.json` says of the backbone, as plain values: no library that computes is needed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nvembed_mcore.config_data import ConfigError


def read_text_config(path: str | os.PathLike) -> tuple[dict[str, Any], Path]:
    """The backbone's part of a `config.json`, or of that in a folder, and the file.

    Raises:
        ConfigError: there is no such file, or it holds no JSON object.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"no Hugging Face config.json at {file}")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    return text_config(raw, file), file


def text_config(raw: Any, file: Path) -> dict[str, Any]:
    """The part of a `config.json` that describes the backbone: all of it, or an NV-Embed folder's `text_config`.

    Raises:
        ConfigError: it is no JSON object.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} must hold an object, got {raw!r}")
    found = raw.get("text_config", raw)
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: text_config must be an object, got {found!r}")
    return found
