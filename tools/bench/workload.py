"""What the training-step benchmark trains on: the quick start's pairs, tokenizer, model and recipe.

Documents are cut at 512 tokens instead of the quick start's 128, so that lengths differ as real ones do. All of it is
a function of the folder and the settings, so every process that opens the folder sees the same batches and weights.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

from nvembed_mcore.config import EvalConfig, RunConfig, StepConfig
from nvembed_mcore.data.packing import Text
from nvembed_mcore.data.python_docs import PACKAGES, build_python_docs
from nvembed_mcore.data.source import BatchSource
from nvembed_mcore.data.tokenizer import load_tokenizer, write_mistral_tokenizer
from nvembed_mcore.data.tokens import TokenStore
from nvembed_mcore.optim import learning_rate

QUICK_START = Path("examples/quickstart")
MAX_DOCUMENT_TOKENS = 512
HELD_OUT = 3000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A folder with data, tokenizer and architecture, and how it is trained.

    Attributes:
        folder: where `prepare` writes.
        wider: factor on the quick start's widths; the number of heads stays.
        batch_size: pairs of a batch.
        steps: steps of the learning rate's schedule.
        threads: of each process.
    """

    folder: str
    wider: int
    batch_size: int
    steps: int
    threads: int

    def prepare(self) -> None:
        """Write the tokenizer, the data and the architecture, as far as they are not there yet."""
        folder = Path(self.folder)
        if not (folder / "tokenizer").is_dir():
            write_mistral_tokenizer(folder / "tokenizer")
        tokenizer = load_tokenizer(folder / "tokenizer")
        build_python_docs(folder / "data", tokenizer, packages=PACKAGES, held_out=HELD_OUT, negatives=2)
        architecture = json.loads((QUICK_START / "mistral.json").read_text(encoding="utf-8"))
        for name in ("hidden_size", "intermediate_size", "head_dim"):
            architecture[name] *= self.wider
        self._architecture.write_text(json.dumps(architecture, indent=1) + "\n", encoding="utf-8")

    @property
    def _architecture(self) -> Path:
        return Path(self.folder) / f"mistral-x{self.wider}.json"

    @property
    def initial(self) -> Path:
        """Where the initial weights are exported to."""
        return Path(self.folder) / f"initial-x{self.wider}"

    @property
    def held_out(self) -> Path:
        """The test set, in BEIR format."""
        return Path(self.folder) / "data" / "heldout"

    @cached_property
    def config(self) -> RunConfig:
        """The quick start's first stage with these settings."""
        text = (QUICK_START / "stage1.yaml").read_text(encoding="utf-8").replace("runs/quickstart", self.folder)
        parser = ArgumentParser()
        parser.add_class_arguments(RunConfig)
        config = RunConfig(**parser.instantiate(parser.parse_object(yaml.safe_load(text))).as_dict())
        pooling = dataclasses.replace(config.model.pooling, head_width=config.model.pooling.head_width * self.wider)
        return dataclasses.replace(
            config,
            steps=self.steps,
            batch_size=self.batch_size,
            data=dataclasses.replace(config.data, max_document_tokens=MAX_DOCUMENT_TOKENS),
            model=dataclasses.replace(config.model, config=str(self._architecture), pooling=pooling),
            # A wider model takes smaller steps.
            optim=dataclasses.replace(config.optim, lr=config.optim.lr / self.wider),
            step=StepConfig(),
            eval=EvalConfig(),
        )

    @cached_property
    def source(self) -> BatchSource:
        """Batches by number."""
        config = self.config
        tokenizer = load_tokenizer(config.data.tokenizer)
        limits = dict(
            max_query_tokens=config.data.max_query_tokens, max_document_tokens=config.data.max_document_tokens
        )
        stores = [
            TokenStore.build(dataset, tokenizer, **limits, cache_dir=config.data.cache_dir)
            for dataset in config.data.datasets
        ]
        return BatchSource(config.data, stores, batch_size=config.batch_size, seed=config.seed, stage=config.stage)

    def pairs(self, number: int) -> list[tuple[Text, Text]]:
        """The queries of a batch, each with its document."""
        batch = self.source.batch(number)
        return list(zip(batch.texts[: batch.num_queries], batch.texts[batch.num_queries :], strict=True))

    def grouped_pairs(self, numbers: Sequence[int], place: int) -> list[tuple[Text, Text]]:
        """The pairs of several batches, longest documents first, dealt anew into batches: number `place` of these."""
        pairs = [pair for number in numbers for pair in self.pairs(number)]
        pairs.sort(key=lambda pair: -len(pair[1]))
        return pairs[place * self.batch_size : (place + 1) * self.batch_size]

    def learning_rate(self, number: int) -> float:
        """Learning rate of the step on batch `number`, counted from 0."""
        return learning_rate(self.config.optim, min(number + 1, self.steps), self.steps)
