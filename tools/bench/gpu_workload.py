"""What the GPU benchmark computes: Mistral-7B with NV-Embed's head, and batches of MS-MARCO-like or of longest texts.

`MISTRAL` is for a GPU. `TINY` has the same parts, so that the whole benchmark can be proved on a CPU in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from nvembed_mcore.config import LoraConfig, ModelConfig, PoolingConfig
from nvembed_mcore.data.batch import Batch, Sample, make_batch
from nvembed_mcore.data.packing import Text

if TYPE_CHECKING:
    from transformers import MistralConfig

KINDS = ("msmarco", "longest")
LONGEST = 512
"""Tokens at which texts are cut, before `Size.shorter`."""
HARD_NEGATIVES = 7
PROMPT = 24
"""Tokens of `Instruct: ...` in front of a query, which are not pooled."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and how large its batches may be.

    Attributes:
        shorter: texts are so many times shorter.
        pack_tokens: token budget of a pack.
        queries: in a batch at first, from where it is doubled; each has a positive and seven hard negatives.
        most_queries: in a batch at most.
        large_queries: in the batch that is embedded twice (`step.way: cached`).
        steps: timed steps of a figure, behind one that is not.
    """

    hidden: int = 4096
    ffn: int = 14336
    layers: int = 32
    heads: int = 32
    groups: int = 8
    vocabulary: int = 32000
    latents: int = 512
    head_heads: int = 8
    rank: int = 16
    shorter: int = 1
    pack_tokens: int = 16_384
    queries: int = 4
    most_queries: int = 64
    large_queries: int = 32
    steps: int = 3

    def with_layers(self, layers: int) -> Size:
        return replace(self, layers=layers)

    def pack_queries(self) -> int:
        """Queries whose texts of MS-MARCO-like lengths about fill a pack."""
        return max(1, self.pack_tokens * self.shorter // (PROMPT + 9 + 105 * (1 + HARD_NEGATIVES)))

    def hf_config(self) -> MistralConfig:
        from transformers import MistralConfig

        return MistralConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            head_dim=self.hidden // self.heads,
            max_position_embeddings=32768,
            sliding_window=None,
        )

    def pooling(self) -> PoolingConfig:
        return PoolingConfig(num_latents=self.latents, num_heads=self.head_heads)

    def lora(self) -> LoraConfig:
        """On all projections, with the paper's alpha and dropout."""
        return LoraConfig(rank=self.rank)

    def model(self, *, adapters: bool) -> ModelConfig:
        lora = self.lora() if adapters else LoraConfig()
        return ModelConfig(config="random weights", pooling=self.pooling(), lora=lora)


MISTRAL = Size()
TINY = Size(
    hidden=64,
    ffn=128,
    layers=4,
    heads=4,
    groups=2,
    vocabulary=512,
    latents=8,
    head_heads=2,
    rank=4,
    shorter=8,
    pack_tokens=512,
    queries=1,
    most_queries=2,
    large_queries=4,
    steps=1,
)


def make_lengths(size: Size, kind: str, count: int, random: np.random.Generator, *, are_queries: bool) -> np.ndarray:
    """Tokens of `count` texts, int64.

    `msmarco`: passages are log-normal, mean 105 and 95th percentile 180 tokens, cut at 512; queries are a prompt and
    some nine tokens. `longest`: all texts have 512.
    """
    if kind == "longest":
        return np.full(count, LONGEST // size.shorter)
    found = PROMPT + random.lognormal(2.1, 0.4, count) if are_queries else random.lognormal(4.586, 0.369, count)
    return found.astype(np.int64).clip(8, LONGEST).clip(8) // size.shorter + (size.shorter > 1) * 2


def make_batches(size: Size, kind: str, queries: int, count: int = 1, seed: int = 0) -> list[Batch]:
    """Batches with as many queries each, the same for every side."""
    random = np.random.default_rng([seed, queries])
    return [_batch(size, kind, queries, random) for _ in range(count)]


def _batch(size: Size, kind: str, queries: int, random: np.random.Generator) -> Batch:
    columns = 1 + HARD_NEGATIVES
    of_queries = make_lengths(size, kind, queries, random, are_queries=True)
    of_passages = make_lengths(size, kind, queries * columns, random, are_queries=False).reshape(queries, columns)

    def text(length: int, pooled_from: int) -> Text:
        return Text(random.integers(3, size.vocabulary, length).astype(np.int32), pooled_from)

    return make_batch(
        [
            Sample(
                query=text(int(of_queries[number]), PROMPT // size.shorter),
                passages=[text(int(length), 0) for length in of_passages[number]],
                passage_ids=np.arange(number * columns, (number + 1) * columns),
                positive_ids=np.array([number * columns]),
                in_batch=True,
            )
            for number in range(queries)
        ]
    )


def columns_of(batch: Batch) -> list[list[Text]]:
    """The batch as sentence-transformers has it: queries, positives, first hard negatives, and so on."""
    passages = batch.texts[batch.num_queries :]
    columns = 1 + HARD_NEGATIVES
    return [batch.texts[: batch.num_queries]] + [passages[place::columns] for place in range(columns)]
