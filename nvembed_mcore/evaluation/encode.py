"""Embeddings and retrieval metrics of a model in training, by all its ranks together."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from transformers import PreTrainedTokenizerFast

from nvembed_mcore import device
from nvembed_mcore.config import DataConfig, EvalConfig
from nvembed_mcore.data.beir import read_beir
from nvembed_mcore.data.packing import Text
from nvembed_mcore.data.prompts import encode_texts
from nvembed_mcore.evaluation.retrieval import RetrievalMetrics, relevance_of, score_run, search
from nvembed_mcore.parallel.gather import share_from_last_stage
from nvembed_mcore.parallel.groups import Groups
from nvembed_mcore.schedule import embed_texts

METRICS = tuple(RetrievalMetrics.__annotations__)


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str], instruction: str, max_tokens: int) -> list[Text]:
    """Texts as the trainer packs them."""
    encoded = encode_texts(tokenizer, texts, instruction, max_tokens)
    return [Text(tokens, encoded.pooled_from) for tokens in encoded.split()]


class RetrievalEvaluation:
    """A BEIR-format test set, tokenised once."""

    def __init__(self, config: EvalConfig, data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        """
        Raises:
            DataError: the folder or one of its files is missing or damaged.
        """
        beir = read_beir(Path(config.path))
        self.relevance = relevance_of(beir)
        self.queries = tokenize(tokenizer, list(beir.queries.values()), config.instruction, data.max_query_tokens)
        self.documents = tokenize(tokenizer, list(beir.corpus.values()), "", data.max_document_tokens)

    def __call__(self, chunks: list[DistributedDataParallel], groups: Groups, token_budget: int) -> dict[str, float]:
        """The metrics of `evaluation.retrieval.score_run`, the same on every rank."""
        embeddings = embed_texts(chunks, groups, self.queries + self.documents, token_budget)
        values = torch.zeros(len(METRICS), dtype=torch.float64, device=device.current())
        if embeddings is not None:
            queries, documents = embeddings[: len(self.queries)], embeddings[len(self.queries) :]
            _, ranked = search(queries, documents, 100)
            scores = score_run(ranked, self.relevance)
            values = torch.tensor([scores[name] for name in METRICS], dtype=torch.float64, device=values.device)
        return dict(zip(METRICS, share_from_last_stage(values, groups).tolist(), strict=True))
