"""The sizes of a backbone, without the library that computes it."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any

from nvembed_mcore.config_data import ConfigError
from nvembed_mcore.model.config_json import read_text_config


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder's sizes, under the names of transformers' `MistralConfig`, so that what counts with one takes both."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    gated_mlp: bool = True
    """Whether the feed-forward block has three matrices (gate, up, down), as Mistral's has, or two."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "gated_mlp" and (type(value) is not int or value < 1):
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_key_value_heads {self.num_key_value_heads} does not divide num_attention_heads "
                f"{self.num_attention_heads}"
            )

    @classmethod
    def read(cls, path: str | os.PathLike) -> Architecture:
        """The sizes that a Hugging Face `config.json` (or the folder that holds it) gives.

        The `text_config` of an NV-Embed folder counts too.

        Raises:
            ConfigError: there is no such file, it is no JSON object, or a size is missing or no number.
        """
        raw, file = read_text_config(path)
        try:
            return cls.of(raw)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error

    @classmethod
    def of(cls, raw: dict[str, Any]) -> Architecture:
        """The sizes in a Hugging Face configuration.

        Raises:
            ConfigError: one is missing or is no size.
        """
        sizes = {field.name: raw.get(field.name) for field in fields(cls) if field.name != "gated_mlp"}
        if sizes["num_key_value_heads"] is None:
            sizes["num_key_value_heads"] = sizes["num_attention_heads"]
        heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
        if sizes["head_dim"] is None and type(heads) is type(hidden) is int and heads > 0:
            sizes["head_dim"] = hidden // heads
        return cls(**sizes)
