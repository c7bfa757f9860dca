"""A teacher's scores for records, by all ranks together: what distillation trains on (distillation.py).

    OUTPUT            the records with `pos_scores` and `neg_scores`
    OUTPUT.work/      embeddings or scores, as long as there is something to do

An embedding model scores by the cosine of query and document. Each text is embedded once, in shards that the replicas
share and that the same command goes on with. A cross-encoder scores the pairs, which the ranks share by blocks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from nvembed_mcore.data.check.scores import Scores
from nvembed_mcore.data.convert.intake import check_output
from nvembed_mcore.data.faults import DataError
from nvembed_mcore.data.records import Record, read_records, write_records
from nvembed_mcore.evaluation.corpus import Corpus
from nvembed_mcore.evaluation.cross_encoder import CrossEncoderScorer
from nvembed_mcore.evaluation.embedders import Embedder
from nvembed_mcore.evaluation.shards import SHARD_SIZE, encode_shards, open_shards
from nvembed_mcore.mining.inputs import build_corpus
from nvembed_mcore.mining.search import Rows
from nvembed_mcore.parallel.groups import every_rank_does, first_rank_does
from nvembed_mcore.progress import show_each

BLOCK_RECORDS = 1024
_DIGITS = 6


def score_by_cosine(
    open_embedder: Callable[[], Embedder], records: str, output: str, *, shard_size: int = SHARD_SIZE
) -> dict[str, Any]:
    """Write records with the cosines of an embedding model; every rank calls this.

    Args:
        open_embedder: opens the teacher.
        records: what `read_records` reads.
        output: JSONL file to write.
        shard_size: texts that one replica embeds at a time.

    Returns:
        Figures for a report: records, distinct texts that were embedded, and the scores' ranges.

    Raises:
        DataError: the records cannot be read, or `output` cannot be written.
        ShardsError: the work folder holds embeddings of other texts or of another teacher.
    """
    _check(records, output)
    work = _work(output)
    embedder = open_embedder()
    first_rank_does(lambda: _prepare(records, work))
    corpora = {name: Corpus.open(work / name) for name in ("queries", "documents")}
    for name, corpus in corpora.items():
        encode_shards(
            embedder,
            corpus.texts,
            corpus.ids,
            work / f"embedded_{name}",
            are_queries=name == "queries",
            shard_size=shard_size,
            fingerprint=corpus.fingerprint,
            what=name,
        )
    texts = sum(map(len, corpora.values()))
    return first_rank_does(lambda: _write(records, output, _cosines(records, work), texts))


def score_pairs(open_teacher: Callable[[], CrossEncoderScorer], records: str, output: str) -> dict[str, Any]:
    """Write records with the logits of a cross-encoder; every rank calls this. Otherwise as `score_by_cosine`."""
    _check(records, output)
    work = _work(output)
    teacher = open_teacher()
    first_rank_does(lambda: _make_empty(work))

    def share() -> int:
        count = 0
        for number, block in enumerate(show_each(_blocks(records), "scores", "blocks")):
            if number % dist.get_world_size() == dist.get_rank():
                pairs = [(record.query, text) for record in block for text in (*record.pos, *record.neg)]
                np.save(work / f"scores-{number}.npy", teacher.scores(pairs))
                count += len(pairs)
        return count

    pairs = sum(every_rank_does(share))

    def scores() -> Iterator[np.ndarray]:
        return (np.load(work / f"scores-{number}.npy") for number in itertools.count())

    return first_rank_does(lambda: _write(records, output, scores(), pairs))


def _check(records: str, output: str) -> None:
    check_output(output)
    if os.path.realpath(records) == os.path.realpath(output):
        raise DataError(f"{output} is the file of records to score: give another OUTPUT")


def _work(output: str) -> Path:
    return Path(f"{output}.work")


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _blocks(records: str) -> Iterator[list[Record]]:
    rows = read_records(records)
    while block := list(itertools.islice(rows, BLOCK_RECORDS)):
        yield block


def _prepare(records: str, work: Path) -> None:
    """Write each distinct query and document once, and for each record the numbers of its own."""
    work.mkdir(parents=True, exist_ok=True)
    for name, texts_of in (("queries", lambda one: [one.query]), ("documents", lambda one: [*one.pos, *one.neg])):
        numbers, places = {}, array("q")
        build_corpus(_distinct(records, texts_of, numbers, places), work / name)
        np.save(work / f"{name}.npy", np.frombuffer(places, np.int64))


def _distinct(
    records: str, texts_of: Callable[[Record], Sequence[str]], numbers: dict[bytes, int], places: array
) -> Iterator[dict[str, str]]:
    """Rows of a corpus; fills `numbers`, by hash of a text, and `places`, the number of each text in turn."""
    for record in read_records(records):
        for text in texts_of(record):
            key = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if key not in numbers:
                numbers[key] = len(numbers)
                yield {"id": str(numbers[key]), "text": text}
            places.append(numbers[key])


def _cosines(records: str, work: Path) -> Iterator[np.ndarray]:
    """Of all documents of each block of records in turn."""
    queries, documents = (Rows(list(open_shards(work / f"embedded_{name}"))) for name in ("queries", "documents"))
    of_query, of_document = (np.load(work / f"{name}.npy") for name in ("queries", "documents"))
    first_record = first = 0
    for block in _blocks(records):
        counts = [len(record.pos) + len(record.neg) for record in block]
        mine = np.repeat(of_query[first_record : first_record + len(block)], counts)
        theirs = of_document[first : first + sum(counts)]
        yield np.einsum("nd,nd->n", queries[mine], documents[theirs])
        first_record, first = first_record + len(block), first + sum(counts)


def _write(records: str, output: str, scores: Iterator[np.ndarray], scored: int) -> dict[str, Any]:
    """Write the records with their scores, and take the work away; `scored` is what the teacher read."""
    found, count = Scores(), 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal count
        for block in show_each(_blocks(records), "records", "blocks"):
            values = iter(np.round(next(scores).astype(np.float64), _DIGITS).tolist())
            block = [_scored(record, values) for record in block]
            count += len(block)
            found.add(Scores.of(block))
            yield from map(_row, block)

    write_records(output, rows())
    shutil.rmtree(_work(output))
    return {"output": str(output), "records_written": count, "scored": scored, **found.as_dict()}


def _scored(record: Record, values: Iterator[float]) -> Record:
    pos_scores, neg_scores = (tuple(itertools.islice(values, len(texts))) for texts in (record.pos, record.neg))
    return dataclasses.replace(record, pos_scores=pos_scores, neg_scores=neg_scores)


def _row(record: Record) -> dict[str, Any]:
    fields = ("instruction", "query", "pos", "neg", "query_id", "pos_ids", "neg_ids", "pos_scores", "neg_scores")
    return {name: getattr(record, name) for name in fields if name != "instruction" or record.instruction is not None}
