"""Low-rank adapters merged into the weights beside them, as an export holds them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import MistralConfig

from nvembed_mcore.checkpoint.names import LORA_A, LORA_B, local_shard, name_table, to_hf
from nvembed_mcore.config import LoraConfig, PoolingConfig


def merged(
    read_global: Callable[[str], torch.Tensor], hf_config: MistralConfig, pooling: PoolingConfig, lora: LoraConfig
) -> Callable[[str], torch.Tensor]:
    """`read_global` with `W + (alpha / rank) B A` in place of each adapted weight.

    Args:
        read_global: parameter name of the encoder -> its whole tensor; adapters too.

    Returns:
        A function that gives adapted weights in float32 and others as they are. It holds one parameter at a time, its
        parts and the low-rank product of one of them.
    """
    table = {entry.name: entry for entry in name_table(hf_config, pooling, lora)}
    adapters = {name: entry.name for entry in table.values() if entry.is_adapter for name in entry.hf}

    def read(name: str) -> torch.Tensor:
        entry, tensor = table[name], read_global(name)
        bases = {part: part.removesuffix(".weight") for part in entry.hf}
        adapted = [part for part, base in bases.items() if base + LORA_A in adapters]
        if not adapted:
            return tensor
        parts = to_hf(entry, tensor.float())
        for part in adapted:
            a, b = (read_global(adapters[bases[part] + suffix]).float() for suffix in (LORA_A, LORA_B))
            parts[part] = torch.addmm(parts[part], b, a, alpha=lora.scale)
        return local_shard(entry, parts.__getitem__, 0, 1)

    return read
