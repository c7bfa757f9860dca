"""Evaluation by the ranks of a layout: what each rank ranked and held. Called on all ranks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from nvembed_mcore.config import EvalConfig, EvalSetConfig, RunConfig
from tests.helpers import runs

SETS = [EvalSetConfig(name=name, path="", instruction=words) for name, words in (("one", "Find it"), ("two", ""))]
DEPTH, BLOCK = 9, 4
"""Documents that are ranked, and those of a block: few, so that both cut through equal scores."""


def write_sets(inputs: Path) -> EvalConfig:
    """Two test sets with graded judgements, in which a third of the texts stand several times."""
    chosen = []
    for number, one in enumerate(SETS):
        folder, random = inputs / f"set-{one.name}", np.random.default_rng(number)
        (folder / "qrels").mkdir(parents=True)
        texts = [runs.record(i)["pos"][0] for i in range(20 + 5 * number)]
        texts = [texts[i] for i in random.permutation([*range(len(texts)), *range(0, len(texts), 3), 0, 0, 3])]
        lines = [json.dumps({"_id": f"d{i}", "title": "", "text": text}) for i, text in enumerate(texts)]
        (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        lines = [json.dumps({"_id": f"q{i}", "text": runs.record(i)["query"]}) for i in range(7)]
        (folder / "queries.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        judged = [(f"q{i}", f"d{d}", random.integers(0, 3)) for i in range(7) for d in random.permutation(20)[:5]]
        rows = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in judged)]
        (folder / "qrels" / "test.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
        chosen.append(dataclasses.replace(one, path=str(folder)))
    return EvalConfig(sets=chosen)


def evaluated(config: RunConfig) -> dict[str, Any]:
    """A run's model before its first step, evaluated in its layout.

    Returns:
        `scores`: what is logged. `ranked`: for each test set, this rank's queries with their documents.
        `embedded`: for each test set, the numbers of documents that this rank embedded, block by block.
    """
    from nvembed_mcore.evaluation import encode

    chunks, groups, evaluation = _opened(config)
    ranked, embedded = [], []
    whole, share = encode.score_queries, encode.embed_share

    def score_queries(documents, relevant):
        ranked.append(documents)
        return whole(documents, relevant)

    def embed_share(*args):
        embedded.append([])
        for block, numbers in share(*args):
            embedded[-1].append(numbers.tolist())
            yield block, numbers

    replaced = dict(score_queries=score_queries, embed_share=embed_share, DEPTH=DEPTH, DOCUMENT_BLOCK=BLOCK)
    with mock.patch.multiple(encode, **replaced):
        scores = evaluation(chunks, groups, 60)
    place = {"dp": groups.dp_rank, "is_last": groups.is_last_stage, "training": chunks[0].training}
    return place | {"scores": scores, "ranked": ranked, "embedded": embedded}


def _opened(config: RunConfig):
    from nvembed_mcore.build import build_model, read_architecture
    from nvembed_mcore.data.tokenizer import load_tokenizer
    from nvembed_mcore.evaluation.encode import RetrievalEvaluation
    from nvembed_mcore.parallel.groups import initialize

    groups = initialize(config.parallel)
    chunks = build_model(config, read_architecture(config.model), groups)
    return chunks, groups, RetrievalEvaluation(config.eval, config.data, load_tokenizer(config.data.tokenizer))


def brute_force(config: RunConfig) -> list[list[list[int]]]:
    """For each test set, the ranking of each query: all embeddings on one process, every pair, one sort."""
    from nvembed_mcore.schedule import embed_texts

    chunks, groups, evaluation = _opened(config)
    found = []
    for one in evaluation._sets.values():
        queries = embed_texts(chunks, groups, one.queries, 60)
        documents = embed_texts(chunks, groups, one.documents, 60)
        scores = np.empty((len(queries), sum(map(len, one.places))))
        for number, places in enumerate(one.places):
            scores[:, places] = (queries @ documents[number])[:, None].numpy()
        assert (np.sort(scores)[:, 1:] == np.sort(scores)[:, :-1]).any()
        order = [sorted(range(len(row)), key=lambda place, row=row: (-row[place], place)) for row in scores]
        found.append([row[:DEPTH] for row in order])
    return found


def refused(config: RunConfig) -> str:
    """What an evaluation says when one data-parallel rank finds a number that is none."""
    from nvembed_mcore.evaluation import encode

    chunks, groups, evaluation = _opened(config)
    share = encode.embed_share

    def embed_share(*args):
        for block, numbers in share(*args):
            yield torch.where(numbers[:, None] == 0, torch.nan, block), numbers

    with mock.patch.object(encode, "embed_share", embed_share):
        try:
            evaluation(chunks, groups, 60)
        except ValueError as error:
            return str(error)
    return "nothing"
