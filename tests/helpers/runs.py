"""A run small enough for a test: the real tokenizer, forty records, a tiny architecture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nvembed_mcore.config import (
    CheckpointConfig,
    DataConfig,
    DatasetConfig,
    EvalConfig,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PoolingConfig,
    RunConfig,
    StepConfig,
)
from nvembed_mcore.data.tokenizer import write_mistral_tokenizer
from tests.helpers.models import tiny_config

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau".split()


def record(i: int) -> dict[str, Any]:
    """Query and documents of different lengths that share a word."""
    word = WORDS[i % len(WORDS)]
    return {
        "query": f"find {word} number {i}",
        "pos": [f"{word} " * (1 + i % 7) + f"is number {i}"],
        "neg": [f"{WORDS[(i + k) % len(WORDS)]} is not number {i}" for k in range(1, 1 + i % 4)],
    }


def write_word_tokenizer(directory: Path) -> None:
    """A token for each word: loaded and hashed in a millisecond, where Mistral's takes half a second."""
    words = [*"<unk> <s> </s> Instruct : Query Find it find number is not".split(), *WORDS, *map(str, range(40))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))  # noqa: S106
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(directory)  # noqa: S106


def write_inputs(folder: Path, num_records: int = 40, *, with_words: bool = False) -> Path:
    """Tokenizer, records, a BEIR folder and `config.json` in `folder`.

    Args:
        with_words: a vocabulary of a few words in place of Mistral's, where starting and saving must be quick.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (write_word_tokenizer if with_words else write_mistral_tokenizer)(folder / "tokenizer")
    records = [record(i) for i in range(num_records)]
    (folder / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    beir = folder / "beir"
    (beir / "qrels").mkdir(parents=True)
    lines = [json.dumps({"_id": f"d{i}", "title": "", "text": one["pos"][0]}) for i, one in enumerate(records)]
    (beir / "corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    lines = [json.dumps({"_id": f"q{i}", "text": one["query"]}) for i, one in enumerate(records[:10])]
    (beir / "queries.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = ["query-id\tcorpus-id\tscore"] + [f"q{i}\td{i}\t1" for i in range(10)]
    (beir / "qrels" / "test.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    vocab_size = 80 if with_words else 32000
    architecture = tiny_config(vocab_size=vocab_size, max_position_embeddings=64, initializer_range=0.1).to_dict()
    (folder / "config.json").write_text(json.dumps(architecture), encoding="utf-8")
    return folder


def run_config(inputs: Path, run_dir: Path, **changes: Any) -> RunConfig:
    """Eight steps of nine queries; `changes` replace top-level fields."""
    config = RunConfig(
        run_dir=str(run_dir),
        steps=8,
        batch_size=9,
        data=DataConfig(
            tokenizer=str(inputs / "tokenizer"),
            datasets=[DatasetConfig(path=str(inputs / "train.jsonl"), instruction="Find it", num_negatives=2)],
            max_query_tokens=24,
            max_document_tokens=32,
            cache_dir=str(inputs / "cache"),
        ),
        model=ModelConfig(
            config=str(inputs / "config.json"), pooling=PoolingConfig(num_latents=6, num_heads=4, head_width=12)
        ),
        parallel=ParallelConfig(timeout_minutes=2),
        step=StepConfig(tokens_per_microbatch=160),
        loss=LossConfig(temperature=0.1),
        optim=OptimConfig(lr=2e-3, warmup_steps=2),
        checkpoint=CheckpointConfig(every_steps=3),
        eval=EvalConfig(path=str(inputs / "beir"), instruction="Find it", every_steps=4),
        log=LogConfig(progress=False, tensorboard=False),
    )
    return dataclasses.replace(config, **changes)


def write_config(config: RunConfig) -> Path:
    """The configuration as a YAML file beside its run folder, for `nvembed train`."""
    from nvembed_mcore.resume import plain

    file = Path(f"{config.run_dir}.yaml")
    file.write_text(yaml.safe_dump(plain(config), sort_keys=False), encoding="utf-8")
    return file
