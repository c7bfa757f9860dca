"""The part of the configuration that says what a run trains on, and the error that every part raises."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


class ConfigError(ValueError):
    """A value of the configuration cannot work; the message names the field and both values."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One data set of the blend."""

    path: str
    """Training data: a file (JSON Lines, CSV, TSV, Parquet; text also compressed), a folder of such files of one kind,
    a BEIR folder (corpus.jsonl, queries.jsonl, qrels/train.tsv), a folder that `datasets` saved, or
    `hf:NAME[:CONFIG[:SPLIT]]`. Rows hold records (`query`, `pos`, `neg`), or have the fields of FlagEmbedding,
    Tevatron or sentence-transformers."""
    instruction: str = ""
    """The task in one sentence; a query becomes `Instruct: {instruction}\\nQuery: {text}`. Empty: no prompt. The
    `instruction` of a record takes its place."""
    task: Literal["retrieval", "classification", "clustering", "sts"] = "retrieval"
    """Sets what the two switches below mean when they are null."""
    weight: float | None = None
    """Share of the blend relative to the other data sets; null means the number of its records, to the power of
    1 / `data.blend_temperature`."""
    max_records: int | None = None
    """Use at most so many of its records: a fixed pseudo-random choice, the same in every stage and for every seed."""
    in_batch_negatives: bool | None = None
    """Whether the passages of other queries serve as negatives; null means: for retrieval only."""
    instruct_documents: bool | None = None
    """Whether documents carry the instruction too (symmetric tasks); null means: for sts only."""
    num_positives: int = 1
    """Positives a query uses at most in a step, each with its own term of the loss; of more, as with negatives."""
    num_negatives: int = 7
    """Hard negatives a query uses at most; of more, a different choice is drawn in each epoch."""
    distill: bool = True
    """Whether `loss.distillation` is for its queries too: then each record must have a teacher's scores."""

    @property
    def uses_in_batch_negatives(self) -> bool:
        return self.task == "retrieval" if self.in_batch_negatives is None else self.in_batch_negatives

    @property
    def instructs_documents(self) -> bool:
        return self.task == "sts" if self.instruct_documents is None else self.instruct_documents

    def __post_init__(self) -> None:
        require(self.num_positives >= 1, f"data.datasets.num_positives must be at least 1, got {self.num_positives}")
        require(self.num_negatives >= 0, f"data.datasets.num_negatives must not be negative, got {self.num_negatives}")
        require(
            self.weight is None or 0 < self.weight < math.inf,
            f"data.datasets.weight of {self.path} must be a number above 0, got {self.weight}",
        )
        require(
            self.max_records is None or self.max_records >= 1,
            f"data.datasets.max_records of {self.path} must be at least 1, got {self.max_records}",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run trains on."""

    tokenizer: str
    """A folder with a Hugging Face fast tokenizer (`nvembed data tokenizer DIR` writes Mistral's)."""
    datasets: list[DatasetConfig]
    """The blend. Samples of all data sets are mixed in each batch (paper section 2.2), unless
    `one_dataset_batches`."""
    blend_temperature: float = 1.0
    """Share of a data set without a `weight`: its number of records to the power of 1 / this. 1: by records; the
    larger, the closer to the same share for each data set."""
    one_dataset_batches: bool = False
    """Every batch comes from one data set; over the steps, data sets take turns by their shares."""
    max_query_tokens: int = 512
    """Longest query in tokens, prompt and special tokens included; longer ones are cut and keep `</s>`."""
    max_document_tokens: int = 512
    """Longest document in tokens, likewise."""
    cache_dir: str = "cache/tokens"
    """Where the tokenised stores live, one folder a fingerprint."""
    max_bad_records: int = 0
    """So many bad records of a data set are left out when it is tokenised, with a warning. Which ones they are enters
    the data's fingerprint."""

    def __post_init__(self) -> None:
        require(len(self.datasets) > 0, "data.datasets must name at least one data set, got none")
        # Below 0.1 shares would be powers above 10, which leave nothing for any but the largest data set.
        require(
            0.1 <= self.blend_temperature < math.inf,
            f"data.blend_temperature must be a number from 0.1 up, got {self.blend_temperature}",
        )
        for name, least in (("max_query_tokens", 3), ("max_document_tokens", 3), ("max_bad_records", 0)):
            require(getattr(self, name) >= least, f"data.{name} must be at least {least}, got {getattr(self, name)}")
