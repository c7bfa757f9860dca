"""Retrieval metrics of a model in training, by all its ranks together.

The ranks share the corpus: each data-parallel rank embeds its part of the documents block by block, searches each
block and lets it go. What it keeps are the best documents of every query among its own; then each rank gets all
ranks' lists of its share of the queries, merges and scores them. So a rank holds the queries' embeddings, one block of
the documents', and lists, however large the corpus is; the texts' tokens are held by all.

The ranking is that of one process: documents are numbered over the whole corpus, and equal scores go by number.
Documents that are the same text are embedded once, so that they tie exactly, wherever they lie.

Letters: `Q` queries, `N` different documents, `k` documents that are ranked, `W` data-parallel size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from nvembed_mcore import device
from nvembed_mcore.config import DataConfig, EvalConfig, EvalSetConfig
from nvembed_mcore.config_eval import METRICS
from nvembed_mcore.data.beir import read_beir
from nvembed_mcore.data.packing import Text
from nvembed_mcore.data.prompts import encode_texts
from nvembed_mcore.evaluation.retrieval import (
    DOCUMENT_BLOCK,
    best_of,
    mean_metrics,
    relevance_of,
    score_queries,
    search_numbered,
)
from nvembed_mcore.parallel.gather import deal_rows, gather_rows, share_from_last_stage, shares
from nvembed_mcore.parallel.groups import Groups, every_rank_does
from nvembed_mcore.schedule import Chunks, embed_share, embed_texts, inference

DEPTH = 100
"""Documents of a query that are ranked."""


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str], instruction: str, max_tokens: int) -> list[Text]:
    """Texts as the trainer packs them."""
    encoded = encode_texts(tokenizer, texts, instruction, max_tokens)
    return [Text(tokens, encoded.pooled_from) for tokens in encoded.split()]


class RetrievalEvaluation:
    """The test sets of a run, tokenised once.

    Attributes:
        fingerprint: of all their tokens and judgements, 16 hexadecimal digits: values of equal ones can be compared.
    """

    def __init__(self, config: EvalConfig, data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        """
        Raises:
            DataError: a folder or one of its files is missing or damaged.
        """
        self._sets = {one.name: _TestSet(one, data, tokenizer) for one in config.test_sets}
        self._has_names = bool(config.sets)
        digests = [f"{name} {one.fingerprint}" for name, one in self._sets.items()]
        self.fingerprint = hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]

    def __call__(self, chunks: Chunks, groups: Groups, token_budget: int) -> dict[str, float]:
        """The metrics of `evaluation.retrieval.score_run`, the same on every rank: the means over the test sets by
        their plain names; of `eval.sets` also those of each, as `NAME/ndcg_at_10`.

        Raises:
            ValueError: an embedding is not finite; on every rank.
        """
        values = torch.zeros(len(self._sets), len(METRICS), dtype=torch.float64, device=device.current())
        with inference(chunks):
            for row, one in zip(values, self._sets.values(), strict=True):
                scores = one.score_queries(chunks, groups, token_budget)
                if scores is not None:
                    row.copy_(torch.tensor([*mean_metrics(scores).values()], dtype=torch.float64))
        values = share_from_last_stage(values, groups).cpu()
        found = dict(zip(METRICS, values.mean(0).tolist(), strict=True))
        if self._has_names:
            for name, row in zip(self._sets, values.tolist(), strict=True):
                found |= {f"{name}/{metric}": value for metric, value in zip(METRICS, row, strict=True)}
        return found


class _TestSet:
    """One BEIR-format test set.

    Attributes:
        documents: N different ones, in the order of the first place where each stands in the corpus.
        places: int64 [copies] of each: where it stands.
    """

    def __init__(self, config: EvalSetConfig, data: DataConfig, tokenizer: PreTrainedTokenizerFast) -> None:
        beir = read_beir(Path(config.path))
        self.relevance = relevance_of(beir)
        self.queries = tokenize(tokenizer, list(beir.queries.values()), config.instruction, data.max_query_tokens)
        corpus = tokenize(tokenizer, list(beir.corpus.values()), "", data.max_document_tokens)
        places: dict[bytes, list[int]] = {}
        for place, text in enumerate(corpus):
            places.setdefault(text.token_ids.tobytes(), []).append(place)
        self.places = [np.array(some) for some in places.values()]
        self.documents = [corpus[some[0]] for some in self.places]
        digest = hashlib.sha256(repr(self.relevance).encode())
        for text in [*self.queries, *corpus]:
            digest.update(b"%d %d " % (len(text), text.pooled_from))
            digest.update(text.token_ids.tobytes())
        self.fingerprint = digest.hexdigest()

    def score_queries(self, chunks: Chunks, groups: Groups, token_budget: int) -> np.ndarray | None:
        """Metrics of every query, float64 [Q, 4], on the last pipeline stage; None elsewhere. To be used in
        `inference`.
        """
        queries = embed_texts(chunks, groups, self.queries, token_budget)
        blocks = embed_share(chunks, groups, self.documents, token_budget, DOCUMENT_BLOCK)
        lists = _search_together(queries, blocks)
        if lists is None:
            return None
        owned = shares(len(self.queries), groups.dp_size)
        ranked = [self.expanded(*one) for one in zip(*_merged(*lists, len(self.documents), groups), strict=True)]
        mine = score_queries(ranked, [self.relevance[number] for number in owned[groups.dp_rank]])
        rows = torch.from_numpy(mine).to(device.current())
        return gather_rows(rows, owned, groups.dp).cpu().numpy()

    def expanded(self, scores: Tensor, numbers: Tensor) -> list[int]:
        """One query's ranking of the whole corpus, where different documents have these scores [k], falling.

        A document that is not among the `k` best different ones has `k` before it, so nothing is missed.
        """
        found = [
            (-score, place)
            for score, number in zip(scores.tolist(), numbers.tolist(), strict=True)
            for place in self.places[number]
        ]
        return [int(place) for _, place in sorted(found)[:DEPTH]]


def _search_together(queries: Tensor | None, blocks: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """The best of this rank's documents for each query, [Q, k] as of `search_numbered`; None without queries, on other
    stages than the last.

    Raises:
        ValueError: what some rank found wrong, on every rank.
    """
    lists, failure = None, None
    try:
        lists = None if queries is None else search_numbered(queries, blocks, DEPTH)
    except ValueError as error:
        failure = error
    for _ in blocks:
        pass  # the ranks of a pipeline go through it together, come what may

    def tell() -> None:
        if failure is not None:
            raise failure

    every_rank_does(tell)
    return lists


def _merged(scores: Tensor, numbers: Tensor, num_documents: int, groups: Groups) -> tuple[Tensor, Tensor]:
    """The best of all ranks' documents for this rank's share of the queries, both [q, k], from its own best for all.

    A rank may have found fewer than k, having fewer documents; its lists are filled with what comes last.
    """
    k = min(DEPTH, num_documents)
    lacking = (0, k - scores.size(1))
    scores = torch.nn.functional.pad(scores, lacking, value=-torch.inf)
    numbers = torch.nn.functional.pad(numbers, lacking, value=num_documents)
    scores, numbers = (deal_rows(one, groups.dp).transpose(0, 1).flatten(1) for one in (scores, numbers))
    return best_of(scores, numbers, k)
