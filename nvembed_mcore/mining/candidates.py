"""Candidates of all records as files, one a shard of queries, and what becomes of them.

Letters: `Q` queries of a shard, `D` embedding size, `k` candidates of each query, best first.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nvembed_mcore.evaluation.shards import Shards
from nvembed_mcore.mining.inputs import Inputs
from nvembed_mcore.mining.search import Candidates, Rows, Search, search_until_enough
from nvembed_mcore.mining.select import Rules, allowed, barred, choose, lacks_candidates, limits

_SCORED = 4096
"""Documents of records that are scored at once: their vectors are in memory."""


@dataclass(frozen=True)
class Judged:
    """One shard's candidates and what became of them.

    Attributes:
        records: int64 [Q], numbers of the records.
        scores, documents: [Q, k], falling; `-inf` and -1 where a query has fewer.
        is_barred, is_allowed: bool [Q, k], as `mining.select` has them.
        limit: float64 [Q], what a negative must score below.
        columns: of each query the columns that were chosen.
        own, own_scores: of each record its documents' numbers and scores: positives, then negatives that are kept.
        num_positives: int64 [Q].
    """

    records: np.ndarray
    scores: np.ndarray
    documents: np.ndarray
    is_barred: np.ndarray
    is_allowed: np.ndarray
    limit: np.ndarray
    columns: list[np.ndarray]
    own: list[np.ndarray]
    own_scores: list[np.ndarray]
    num_positives: np.ndarray

    @property
    def positive_scores(self) -> list[np.ndarray]:
        return _first(self.own_scores, self.num_positives)


@dataclass(frozen=True)
class CandidateShards:
    """A folder of candidates.

    Attributes:
        folder: made by `begin`.
        inputs: what is mined from.
        queries: embeddings of the records' queries.
        vectors: embeddings of the corpus, and behind it of the records' documents that it lacks.
        rules: say what a query needs.
        depth: candidates of a query at most.
    """

    folder: Path
    inputs: Inputs
    queries: Shards
    vectors: Rows
    rules: Rules
    depth: int

    def __len__(self) -> int:
        return len(self.queries)

    def begin(self) -> list[int]:
        """Make the folder; the numbers of the shards that are not there."""
        self.folder.mkdir(exist_ok=True)
        return [number for number in range(len(self)) if not self._file(number).is_file()]

    def search(self, search: Search, number: int) -> None:
        """Search for one shard of queries and write what was found, aside first.

        Raises:
            ValueError: an embedding is not finite.
        """
        records, queries = self._records(number), np.asarray(self.queries[number])
        own_scores = self._own_scores(records, queries)
        for record, scores in zip(records, own_scores, strict=True):
            if not np.isfinite(scores).all():
                raise ValueError(f"record {record + 1}: the embedding of its query or of a positive is not finite")
        limit = self._limits(records, own_scores)

        def lacking(found: Candidates, places: np.ndarray) -> np.ndarray:
            return lacks_candidates(*self._judge(found, records[places], limit[places]), self.rules)

        size = len(self.inputs.documents)
        found = search_until_enough(search, queries, lacking, depth=self.depth, num_documents=size)
        aside = self.folder / f".writing-{self._file(number).name}"
        with open(aside, "wb") as file:
            np.savez(file, scores=found.scores, documents=found.documents, own_scores=np.concatenate(own_scores))
        os.replace(aside, self._file(number))

    def choose(self, number: int, query_ids: Sequence[str]) -> Judged:
        """The negatives of one shard's records, whose queries have these ids."""
        records = self._records(number)
        own = self.inputs.own(records)
        found, scores = self._read(number, len(records))
        own_scores = np.split(scores, np.cumsum([len(documents) for documents in own])[:-1])
        limit = self._limits(records, own_scores)
        is_barred, is_allowed = self._judge(found, records, limit)
        return Judged(
            records=records,
            scores=found.scores,
            documents=found.documents,
            is_barred=is_barred,
            is_allowed=is_allowed,
            limit=limit,
            columns=choose(is_allowed, self.rules, query_ids),
            own=own,
            own_scores=own_scores,
            num_positives=self.inputs.num_positives[records],
        )

    def _read(self, number: int, num_records: int) -> tuple[Candidates, np.ndarray]:
        """A shard's candidates and the scores of its records' own documents.

        Raises:
            ValueError: the file is damaged, or names documents that the corpus has not.
        """
        file, size = self._file(number), len(self.inputs.documents)
        try:
            with np.load(file) as arrays:
                scores, documents, own_scores = (arrays[name] for name in ("scores", "documents", "own_scores"))
            if not scores.shape == documents.shape == (num_records, documents.shape[-1]):
                raise ValueError(f"it holds {list(scores.shape)} scores of {list(documents.shape)} documents")
            if documents.dtype.kind != "i" or ((documents < -1) | (documents >= size)).any():
                raise ValueError(f"it names documents outside of 0 to {size - 1}")
        except (OSError, EOFError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file} cannot be used ({error}); remove it, and it is made again") from error
        return Candidates(scores, documents), own_scores

    def _file(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.npz"

    def _records(self, number: int) -> np.ndarray:
        begin = number * self.queries.shard_size
        return np.arange(begin, min(begin + self.queries.shard_size, self.queries.count))

    def _own_scores(self, records: np.ndarray, queries: np.ndarray) -> list[np.ndarray]:
        """Scores of each record's own documents, float32.

        They are summed in float64, so that they do not depend on what is scored beside them.
        """
        own = self.inputs.own(records)
        counts = [len(documents) for documents in own]
        numbers, of_query = np.concatenate(own), np.repeat(np.arange(len(records)), counts)
        products = np.empty(len(numbers), np.float32)
        for begin in range(0, len(numbers), _SCORED):
            part = slice(begin, begin + _SCORED)
            vectors, repeated = self.vectors[numbers[part]], queries[of_query[part]]
            products[part] = np.einsum("md,md->m", vectors, repeated, dtype=np.float64)
        return np.split(products, np.cumsum(counts)[:-1])

    def _limits(self, records: np.ndarray, own_scores: list[np.ndarray]) -> np.ndarray:
        positives = _first(own_scores, self.inputs.num_positives[records])
        return limits(np.array([scores.min() for scores in positives]), self.rules)

    def _judge(self, found: Candidates, records: np.ndarray, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which candidates are barred, and which may be negatives: bool [Q, k] both."""
        inputs, present = self.inputs, found.documents >= 0
        documents = np.where(present, found.documents, 0)
        texts, ids = inputs.text_keys[documents], inputs.id_keys[documents]
        is_barred = barred(texts, ids, present, *inputs.barred_of(records))
        return is_barred, allowed(found.scores, is_barred, limit, self.rules)


def _first(parts: list[np.ndarray], counts: np.ndarray) -> list[np.ndarray]:
    return [part[:count] for part, count in zip(parts, counts, strict=True)]
