"""Data in BEIR's format: `corpus.jsonl`, `queries.jsonl`, `qrels/{split}.tsv`, each plain or compressed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvembed_mcore.data import files
from nvembed_mcore.data.faults import DataError, Fault, Problems, document_text, required_text
from nvembed_mcore.data.files import COMPRESSIONS, Block, line_blocks, numbered_lines, rows
from nvembed_mcore.data.layouts import find_layout

_LOG = logging.getLogger(__name__)
_RECORDS = find_layout(("query", "pos", "neg"))


@dataclass(frozen=True)
class BeirSet:
    """A test set in BEIR's format.

    Attributes:
        corpus: document id -> title, a space, and text (or what there is of them).
        queries: query id -> text, for the queries that have judgements.
        qrels: query id -> document id -> relevance.
    """

    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]


def read_beir(folder: str | Path, split: str = "test") -> BeirSet:
    """Read `corpus.jsonl`, `queries.jsonl` and `qrels/{split}.tsv` of a folder.

    Queries without judgements are left out. Documents without any text are left out, and judgements of documents that
    the corpus lacks are kept (such a document cannot be found, and counts as missed); both are counted and logged.

    Raises:
        DataError: a file is missing or empty, a line is bad, a query is blank, an id is used twice, or no judged
            document is in the corpus.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"no BEIR folder at {folder}")
    corpus_file, queries_file, qrels_file = beir_files(folder, split)
    corpus = {key: text for _, key, text in read_texts(corpus_file, document_text) if text}
    queries = {key: text for _, key, text in read_texts(queries_file, _query_text)}
    qrels = _read_qrels(qrels_file, queries)
    _count_unknown(folder, qrels, corpus)
    return BeirSet(corpus, {key: queries[key] for key in qrels}, qrels)


def read_queries(folder: str | Path, split: str = "test") -> dict[str, str]:
    """Query id -> text of the queries that a split judges; the corpus is not read.

    Raises:
        DataError: as `read_beir`, of `queries.jsonl` and the judgements.
    """
    _, queries_file, qrels_file = beir_files(Path(folder), split)
    queries = {key: text for _, key, text in read_texts(queries_file, _query_text)}
    return {key: queries[key] for key in _read_qrels(qrels_file, queries)}


def beir_files(folder: Path, split: str) -> tuple[Path, Path, Path]:
    """Corpus, queries and judgements of a folder; which are missing is not looked at."""
    return tuple(_plain_or_packed(folder / name) for name in ("corpus.jsonl", "queries.jsonl", f"qrels/{split}.tsv"))


def beir_blocks(folder: Path) -> Iterator[Block]:
    """The queries that `qrels/train.tsv` judges as blocks of records, in the order of `queries.jsonl`.

    Positives are the documents with a score above 0, negatives those judged 0 or less; ids are the files'. Documents
    that are missing or have no text are left out, then queries without a positive; both are counted and logged. Only
    documents that are judged are held in memory, with all queries. The line of a record is its query's.

    Raises:
        DataError: as `read_beir`.
    """
    corpus_file, queries_file, qrels_file = beir_files(folder, "train")
    if not qrels_file.is_file():
        raise DataError(f"no data file at {qrels_file}: a BEIR folder is trained on by its training judgements")
    queries = {key: (line, text) for line, key, text in read_texts(queries_file, _query_text)}
    qrels = _read_qrels(qrels_file, queries)
    judged = {document for judgements in qrels.values() for document in judgements}
    corpus = {key: text for _, key, text in read_texts(corpus_file, document_text, judged) if text}
    _count_unknown(folder, qrels, corpus)
    lines: list[str] = []
    first, size, without = 1, 0, 0
    for key, (line, text) in queries.items():
        record = _record_row(key, text, qrels.get(key, {}), corpus)
        without += key in qrels and not record["pos"]
        if not record["pos"]:
            continue
        lines += [""] * (line - first - len(lines))  # so that a record's line is its query's
        lines.append(json.dumps(record, ensure_ascii=False))
        size += len(lines[-1])
        if size >= files.BLOCK_BYTES:
            yield _block(queries_file, first, lines)
            lines, first, size = [], line + 1, 0
    if lines:
        yield _block(queries_file, first, lines)
    if without:
        _LOG.warning("%s: %d of %d judged queries have no positive and are left out", folder, without, len(qrels))


def read_texts(
    path: Path,
    text_of: Callable[[dict[str, Any]], str],
    wanted: Container[str] | None = None,
    id_field: str = "_id",
) -> Iterator[tuple[int, str, str]]:
    """Line, id and text of each row of a file, of the ids in `wanted` alone if they are given.

    Raises:
        DataError: the file cannot be read, holds no row, or a line is bad; raised at its end.
    """
    problems = Problems(path)
    found: set[str] = set()
    empty = True
    for line, row, column_of in (one for block in files.blocks(path) for one in rows(block, problems.add)):
        empty = False
        try:
            key = required_text(row, id_field)
            if wanted is not None and key not in wanted:
                continue
            if key in found:
                raise Fault(f"{id_field} {key!r} is used before", id_field)
            found.add(key)
            yield line, key, text_of(row)
        except Fault as fault:
            problems.add(line, column_of(fault.field), fault.reason)
    problems.raise_if_too_many()
    if empty:
        raise DataError(f"{path} holds no records")


def _plain_or_packed(path: Path) -> Path:
    packed = (path.with_name(path.name + ending) for ending in COMPRESSIONS)
    return next((one for one in (path, *packed) if one.is_file()), path)


def _query_text(row: dict[str, Any]) -> str:
    return required_text(row, "text")


def _record_row(key: str, text: str, judgements: dict[str, int], corpus: dict[str, str]) -> dict[str, Any]:
    pos_ids = [document for document, score in judgements.items() if score > 0 and document in corpus]
    neg_ids = [document for document, score in judgements.items() if score <= 0 and document in corpus]
    pos, neg = [corpus[one] for one in pos_ids], [corpus[one] for one in neg_ids]
    return {"query": text, "pos": pos, "neg": neg, "query_id": key, "pos_ids": pos_ids, "neg_ids": neg_ids}


def _block(path: Path, first: int, lines: list[str]) -> Block:
    return Block(str(path), "lines", first, 0, "\n".join(lines).encode(), layout=_RECORDS)


def _count_unknown(folder: Path, qrels: dict[str, dict[str, int]], corpus: Container[str]) -> None:
    judged = [document for judgements in qrels.values() for document in judgements]
    unknown = sum(document not in corpus for document in judged)
    if unknown == len(judged):
        raise DataError(f"none of the {len(judged)} documents that {folder}/qrels judges is in {folder}/corpus.jsonl")
    if unknown:
        _LOG.warning("%s: %d of %d judged documents are missing or have no text", folder, unknown, len(judged))


def _read_qrels(path: Path, queries: Container[str]) -> dict[str, dict[str, int]]:
    """Query id -> document id -> relevance, from lines `query-id TAB corpus-id TAB score` under a header."""
    problems = Problems(path)
    qrels: dict[str, dict[str, int]] = {}
    for number, _, raw in (line for block in line_blocks(path) for line in numbered_lines(block)):
        cells = raw.decode("utf-8", errors="replace").split("\t")
        if number == 1 and cells[-1].strip() == "score" or not raw.strip():
            continue
        if len(cells) != 3:
            problems.add(number, 1, f"{len(cells)} columns, not query-id, corpus-id and score with tabs between")
        elif cells[0] not in queries:
            problems.add(number, 1, f"query {cells[0]!r} is not in queries.jsonl")
        else:
            column = len(cells[0]) + len(cells[1]) + 3
            try:
                qrels.setdefault(cells[0], {})[cells[1]] = int(cells[2])
            except ValueError:
                problems.add(number, column, f"the score must be a whole number, got {cells[2]!r}")
    problems.raise_if_too_many()
    if not qrels:
        raise DataError(f"{path} holds no records")
    return qrels
