"""Weights from a Hugging Face folder, or random ones, into the encoder: streamed, and each rank reads only its slices.

Two sources have the same interface (`has`, `read`): `HfFolder` reads safetensors, `RandomWeights` draws each tensor
from a generator of its own. Both speak NV-Embed's names.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist

from nvembed_mcore.checkpoint.hf_folder import HfFolder, check_sums
from nvembed_mcore.checkpoint.names import HEAD, LORA_A, LORA_B, Entry, copy_shard
from nvembed_mcore.config import PoolingConfig
from nvembed_mcore.parallel.groups import every_rank_does
from nvembed_mcore.progress import show_each


class RandomWeights:
    """Initial weights that depend on the seed and on a tensor's Hugging Face name alone, not on the layout.

    Backbone: normal(0, `initializer_range`) for the embedding and linears. Head: latents and the embedding of layers
    normal(0, 1) and linears as torch makes them (uniform within 1/sqrt(inputs), weights and biases), which is what
    NV-Embed's code does; with `pooling.initializer_range` set, linears and the embedding of layers are normal with
    that deviation and biases zero. Norms are one, and zero where they have a bias. Adapters as PEFT makes them: A like
    torch's linears, B zero.
    """

    may_lack = ()

    def __init__(self, entries: Iterable[Entry], seed: int, initializer_range: float, pooling: PoolingConfig) -> None:
        self.shapes = {name: shape for entry in entries for name, shape in entry.hf.items()}
        self.seed, self.initializer_range, self.pooling = seed, initializer_range, pooling

    def has(self, hf_name: str) -> bool:
        """Whether the table names this tensor."""
        return hf_name in self.shapes

    def read(self, hf_name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The whole tensor, float32 on the CPU."""
        if hf_name.endswith(LORA_B):  # so that the model starts as its base
            return torch.zeros(shape)
        module, kind = hf_name.rsplit(".", 1)
        if "norm" in module.rsplit(".", 1)[-1]:
            return torch.ones(shape) if kind == "weight" else torch.zeros(shape)
        if kind == "latents":
            return torch.randn(shape, generator=self._generator(hf_name))
        deviation = self.pooling.initializer_range if hf_name.startswith(HEAD) else self.initializer_range
        if module.endswith(".layer_embedding"):
            return self._normal(hf_name, shape, 1.0 if deviation is None else deviation)
        if deviation is not None and not hf_name.endswith(LORA_A):
            is_bias = kind == "bias"
            return torch.zeros(shape) if is_bias else self._normal(hf_name, shape, deviation)
        bound = 1 / math.sqrt(self.shapes[f"{module}.weight"][1])
        return torch.empty(shape).uniform_(-bound, bound, generator=self._generator(hf_name))

    def _normal(self, hf_name: str, shape: tuple[int, ...], deviation: float) -> torch.Tensor:
        return torch.empty(shape).normal_(0.0, deviation, generator=self._generator(hf_name))

    def _generator(self, hf_name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}:{hf_name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def load_weights(
    source: HfFolder | RandomWeights,
    entries: Iterable[Entry],
    parameters: Mapping[str, torch.Tensor],
    tp_rank: int,
    tp_size: int,
) -> set[str]:
    """Fill parameters, one Hugging Face tensor after the other; numbers are converted to each one's dtype.

    Args:
        entries: what this rank holds (its pipeline stage's part of the name table).
        parameters: the local tensors to fill, by the encoder's names.

    Returns:
        Names of the parameters that the source does not have; they are left alone. They are those of whole parts
        (backbone, head, adapters) that it may lack; some of a part and not all is an error.

    Raises:
        WeightsError: a tensor of a part that the source has or must have is missing, or any tensor has the wrong
            shape or numbers that are not finite.
    """
    entries = list(entries)
    has = {entry.part for entry in entries if any(source.has(name) for name in entry.hf)}
    missing = set()
    for entry in show_each(entries, "load weights", "tensors"):
        if entry.part not in has and entry.part in source.may_lack:
            missing.add(entry.name)
            continue
        local = parameters[entry.name].detach()
        copy_shard(entry, lambda name, e=entry: source.read(name, e.hf[name]), local, tp_rank, tp_size)
        if isinstance(source, HfFolder):
            source.check_finite(entry.hf, local)
    return missing


def verify_sums(folder: HfFolder) -> int:
    """Compare the folder's weight files with the SHA-256 that it lists; every rank calls this and reads its share.

    Returns:
        How many files are listed and were compared.

    Raises:
        WeightsError: on every rank, when a file has other bytes than those that were written.
    """
    mine = folder.files[dist.get_rank() :: dist.get_world_size()]
    return sum(every_rank_does(lambda: check_sums(folder.path, mine)))
