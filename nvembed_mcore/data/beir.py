"""Test sets in BEIR's format: `corpus.jsonl`, `queries.jsonl`, `qrels/{split}.tsv`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvembed_mcore.data.files import DataError, Problems, blocks, numbered_lines, rows
from nvembed_mcore.data.records import Fault, check_string, required_text

_LOG = logging.getLogger(__name__)


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
    corpus = {key: text for key, text in _read_id_text(folder / "corpus.jsonl", _document_text).items() if text}
    all_queries = _read_id_text(folder / "queries.jsonl", _query_text)
    qrels = _read_qrels(folder / "qrels" / f"{split}.tsv", all_queries)
    judged = [document for judgements in qrels.values() for document in judgements]
    unknown = sum(document not in corpus for document in judged)
    if unknown == len(judged):
        raise DataError(f"none of the {len(judged)} documents that {folder}/qrels judges is in {folder}/corpus.jsonl")
    if unknown:
        _LOG.warning("%s: %d of %d judged documents are missing or have no text", folder, unknown, len(judged))
    return BeirSet(corpus, {key: all_queries[key] for key in qrels}, qrels)


def read_queries(folder: str | Path, split: str = "test") -> dict[str, str]:
    """Query id -> text of the queries that a split judges; the corpus is not read.

    Raises:
        DataError: as `read_beir`, of `queries.jsonl` and the judgements.
    """
    queries = _read_id_text(Path(folder) / "queries.jsonl", _query_text)
    return {key: queries[key] for key in _read_qrels(Path(folder) / "qrels" / f"{split}.tsv", queries)}


def _document_text(row: dict[str, Any]) -> str:
    for name in ("title", "text"):
        if row.get(name) is not None:
            check_string(row[name], name, name)
    if row.get("text") is None:
        raise Fault("text is missing", "text")
    return f"{row.get('title') or ''} {row['text']}".strip()


def _query_text(row: dict[str, Any]) -> str:
    return required_text(row, "text")


def _read_id_text(path: Path, text_of: Callable[[dict[str, Any]], str]) -> dict[str, str]:
    """`_id` -> text of a JSON Lines file."""
    problems = Problems(path)
    texts: dict[str, str] = {}
    for number, row, column_of in (one for block in blocks(path) for one in rows(block, problems.add)):
        try:
            key = required_text(row, "_id")
            if key in texts:
                raise Fault(f"_id {key!r} is used before", "_id")
            texts[key] = text_of(row)
        except Fault as fault:
            problems.add(number, column_of(fault.field), fault.reason)
    problems.raise_if_too_many()
    if not texts:
        raise DataError(f"{path} holds no records")
    return texts


def _read_qrels(path: Path, queries: dict[str, str]) -> dict[str, dict[str, int]]:
    """Query id -> document id -> relevance, from lines `query-id TAB corpus-id TAB score` under a header."""
    problems = Problems(path)
    qrels: dict[str, dict[str, int]] = {}
    for number, _, raw in (line for block in blocks(path) for line in numbered_lines(block)):
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
