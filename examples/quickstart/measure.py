"""Retrieval on the held-out set: BM25, the exported model, both fused, and a few searches to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.table import Table

from nvembed_mcore.checkpoint.hf_export import export
from nvembed_mcore.checkpoint.hf_import import RandomWeights
from nvembed_mcore.checkpoint.names import local_shard, name_table
from nvembed_mcore.config import PoolingConfig
from nvembed_mcore.data.beir import read_beir
from nvembed_mcore.evaluation.exported import ExportedEncoder
from nvembed_mcore.evaluation.lexical import reciprocal_rank_fusion
from nvembed_mcore.evaluation.retrieval import relevance_of, score_run, search
from nvembed_mcore.model.mistral import read_mistral_config

Scores = dict[str, float]
Ranking = Sequence[np.ndarray]
"""For each query, document numbers from best to worst."""

MAX_TOKENS = 128


class Held:
    """The held-out queries over their own documents."""

    def __init__(self, folder: Path) -> None:
        beir = read_beir(folder)
        self.queries, self.documents = list(beir.queries.values()), list(beir.corpus.values())
        self.relevance = relevance_of(beir)

    def score(self, ranking: Ranking) -> Scores:
        """nDCG@10, recall@10, recall@100 and MRR@10."""
        return dict(score_run(ranking, self.relevance))


def dense_rankings(export_dir: Path, queries: list[str], *corpora: list[str]) -> list[Ranking]:
    """The 100 nearest documents of each query in each corpus, by an exported model."""
    encoder = ExportedEncoder(str(export_dir), instruction=None, max_length=MAX_TOKENS, device="cpu")
    encoded = encoder(queries, True)
    return [list(search(encoded, encoder(documents, False), 100)[1].numpy()) for documents in corpora]


def fused(first: Ranking, second: Ranking) -> list[np.ndarray]:
    """Reciprocal rank fusion of two rankings, cut at 100."""
    return [one[:100] for one in reciprocal_rank_fusion([first, second])]


def untrained_export(run: Path, output: Path) -> Path:
    """The model that a run began with, as an exported folder: the same random weights by the same seed."""
    return export_untrained(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")), output)


def export_untrained(config: dict[str, Any], output: Path, format: str = "nv-embed") -> Path:
    """The random weights of a configuration's tree as an exported folder, in one of `hf_export.FORMATS`."""
    hf_config = read_mistral_config(config["model"]["config"])
    pooling = PoolingConfig(**config["model"]["pooling"])
    table = {entry.name: entry for entry in name_table(hf_config, pooling)}
    weights = RandomWeights(table.values(), config["seed"], hf_config.initializer_range, pooling)

    def read(name: str) -> torch.Tensor:
        return local_shard(table[name], lambda hf_name: weights.read(hf_name, table[name].hf[hf_name]), 0, 1)

    export(
        read,
        hf_config,
        pooling,
        output,
        tokenizer_dir=config["data"]["tokenizer"],
        attention_mask=config["model"]["attention_mask"],
        format=format,
        max_tokens=max(config["data"]["max_query_tokens"], config["data"]["max_document_tokens"]),
        instruction=config["data"]["datasets"][0]["instruction"],
        card_facts={},
    )
    return output


def example_searches(held: Held, untrained: Path, after: Ranking, number: int = 3) -> Table:
    """A few held-out queries with their best three documents before and after training."""
    table = Table(title="Three held-out queries", show_lines=True)
    for heading in ("query", "untrained", "trained"):
        table.add_column(heading, max_width=44)
    # Every n-th of those whose document is among the best ten: the table of metrics tells how many that are.
    found = [i for i, ranked in enumerate(after) if set(held.relevance[i]) & set(ranked[:10].tolist())]
    chosen = found[:: max(1, len(found) // number)][:number] or list(range(number))
    (before,) = dense_rankings(untrained, [held.queries[query] for query in chosen], held.documents)
    for query, ranked in zip(chosen, before, strict=True):
        table.add_row(held.queries[query], _best(held, query, ranked), _best(held, query, after[query]))
    return table


def _best(held: Held, query: int, ranked: np.ndarray) -> str:
    lines = []
    for place, document in enumerate(ranked[:3].tolist(), 1):
        mark = "*" if document in held.relevance[query] else " "
        code = [line for line in held.documents[document].splitlines() if not line.lstrip().startswith("@")]
        lines.append(f"{place}{mark} {code[0].strip()[:38]}")
    return "\n".join(lines)
