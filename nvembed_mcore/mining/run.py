"""Hard negatives for records of any size, by all ranks together.

    OUTPUT/records.jsonl    the records with their mined negatives, ids and scores
           report.html      what was found, and report.json with the same figures
           work/            corpus, embeddings and candidates: the same command goes on with them

Whatever the number of ranks, the files are the same: shards of documents and of queries are of fixed sizes, each is
made by one rank, and the first rank chooses and writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from nvembed_mcore.data.records import Record, read_records, write_records
from nvembed_mcore.evaluation.embedders import Embedder
from nvembed_mcore.evaluation.shards import SHARD_SIZE, encode_shards, open_shards
from nvembed_mcore.mining.approximate import approximate_search, build_index, check_faiss
from nvembed_mcore.mining.findings import Findings, Judged
from nvembed_mcore.mining.inputs import Inputs, open_inputs, prepare
from nvembed_mcore.mining.report import write_report
from nvembed_mcore.mining.search import Candidates, Rows, Search, exact_search, search_until_enough
from nvembed_mcore.mining.select import Rules, allowed, barred, choose, lacks_candidates, limits
from nvembed_mcore.parallel.groups import every_rank_does, first_rank_does

EXACT = "exact"
_SCORED = 1024
"""Records whose positives are scored at once: their vectors are in memory."""


@dataclass(frozen=True)
class Mining:
    """What to mine and how.

    Raises:
        ValueError: a value cannot work; the message names the option.
    """

    records: str
    output: str
    corpus: str | None = None
    """None: all documents of the records."""
    rules: Rules = dataclasses.field(default_factory=Rules)
    depth: int = 1000
    """Candidates that a query gets at most."""
    index: str = EXACT
    """`exact`, or FAISS's description of an index."""
    keep_negatives: bool = False
    """Whether the records' own negatives stay, in front of the mined ones."""
    shard_size: int = SHARD_SIZE
    """Documents, and queries, of a shard."""
    suspects: int = 50
    """Of the report."""

    def __post_init__(self) -> None:
        if self.depth < self.rules.last:
            raise ValueError(f"--range ends at rank {self.rules.last}, beyond --depth {self.depth}")
        if self.depth < self.rules.negatives:
            raise ValueError(f"--negatives {self.rules.negatives} is more than --depth {self.depth}")
        if self.shard_size < 1:
            raise ValueError(f"--shard-size must be at least 1, got {self.shard_size}")
        if self.suspects < 0:
            raise ValueError(f"--suspects must be at least 0, got {self.suspects}")
        if self.index != EXACT:
            check_faiss(self.index)

    @property
    def work(self) -> Path:
        return Path(self.output) / "work"


Progress = Callable[[str, int, int], None]
"""Called on the first rank: with what is counted, how many of it are done, and of how many."""


def mine(
    open_embedder: Callable[[], Embedder], mining: Mining, progress: Progress = lambda *_: None
) -> dict[str, Any] | None:
    """Mine negatives; every rank calls this, and the first gets the report's figures.

    Args:
        open_embedder: opens the model, which is let go before the search.
        mining: what to mine and how.
        progress: see `Progress`.

    Raises:
        ValueError: the data cannot be read, the model cannot embed, the output folder holds the work of other data or
            another model, or the index cannot be made.
    """
    embedders = _encode(open_embedder, mining, progress)
    inputs = open_inputs(mining.work / "inputs")
    documents = list(open_shards(mining.work / "documents"))
    others = list(open_shards(mining.work / "others")) if inputs.others else []
    stage = _Stage(mining, inputs, Rows([*documents, *others]), embedders)
    first_rank_does(stage.begin)
    if mining.index == EXACT:
        search = exact_search(documents)
    else:
        path = stage.index_file()
        first_rank_does(lambda: path.is_file() or build_index(documents, mining.index, path, seed=mining.rules.seed))
        search = approximate_search(path, documents)
    every_rank_does(lambda: stage.search_all(search, progress))
    return first_rank_does(lambda: _write(stage, progress))


def _encode(open_embedder: Callable[[], Embedder], mining: Mining, progress: Progress) -> dict[str, Any]:
    """Embed documents and queries, as far as they are not there; returns what the embeddings depend on."""
    embedder = open_embedder()
    prepare_all = partial(prepare, mining.records, mining.corpus, keep_negatives=mining.keep_negatives)
    first_rank_does(lambda: prepare_all(mining.work / "inputs"))
    inputs = open_inputs(mining.work / "inputs")
    parts = {"documents": inputs.documents, "others": inputs.others, "queries": inputs.queries}
    for name, texts in parts.items():
        if texts is None:
            continue
        encode_shards(
            embedder,
            texts.texts,
            texts.ids,
            mining.work / name,
            are_queries=name == "queries",
            shard_size=mining.shard_size,
            progress=lambda done, total, rate, name=name: progress(name, done, total),
        )
    return {"queries": embedder.facts(True), "documents": embedder.facts(False)}


class _Stage:
    """The search of all shards of queries, and what is chosen of it."""

    def __init__(self, mining: Mining, inputs: Inputs, rows: Rows, embedders: dict[str, Any]) -> None:
        self.mining, self.inputs, self.rows, self.embedders = mining, inputs, rows, embedders
        self.queries = open_shards(mining.work / "queries")
        facts = {
            "inputs": inputs.fingerprint,
            "embedders": embedders,
            "rules": dataclasses.asdict(mining.rules),
            "depth": mining.depth,
            "index": mining.index,
            "shard_size": mining.shard_size,
        }
        self.folder = mining.work / f"candidates-{_name_of(facts)}"

    def begin(self) -> None:
        self.folder.mkdir(exist_ok=True)

    def index_file(self) -> Path:
        """Where an index of the documents lies: it serves other rules too."""
        texts, embedder = self.inputs.documents.fingerprint, self.embedders["documents"]
        name = _name_of([self.mining.index, self.mining.rules.seed, self.mining.shard_size, texts, embedder])
        return self.mining.work / f"index-{name}.faiss"

    def tidy(self) -> None:
        """Delete candidates that other settings left."""
        for folder in self.mining.work.glob("candidates-*"):
            if folder != self.folder:
                shutil.rmtree(folder)

    def search_all(self, search: Search, progress: Progress) -> None:
        """This rank's shards of queries, as far as they are not there."""
        missing = [number for number in range(len(self.queries)) if not self._file(number).is_file()]
        mine = missing[dist.get_rank() :: dist.get_world_size()]
        for done, number in enumerate(mine, 1):
            self._search(search, number)
            progress("searches", done, len(mine))

    def _file(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.npz"

    def _records(self, number: int) -> np.ndarray:
        begin = number * self.queries.shard_size
        return np.arange(begin, min(begin + self.queries.shard_size, self.queries.count))

    def _search(self, search: Search, number: int) -> None:
        """Search for one shard of queries and write what was found, aside first."""
        records, queries = self._records(number), np.asarray(self.queries[number])
        own = self._own_scores(records, queries)
        lowest = np.array([scores.min() for scores in self._of_positives(own, records)])
        rules = self.mining.rules

        def lacking(found: Candidates, places: np.ndarray) -> np.ndarray:
            return lacks_candidates(*self._judge(found, records[places], limits(lowest[places], rules)), rules)

        size = len(self.inputs.documents)
        found = search_until_enough(search, queries, lacking, depth=self.mining.depth, num_documents=size)
        aside = self.folder / f".writing-{self._file(number).name}"
        with open(aside, "wb") as file:
            np.savez(file, scores=found.scores, documents=found.documents, own=own)
        os.replace(aside, self._file(number))

    def _own_scores(self, records: np.ndarray, queries: np.ndarray) -> np.ndarray:
        """Scores of all documents that belong to the records, float32, one after the other.

        They are summed in float64, so that they do not depend on what is scored beside them.
        """
        scores = []
        for begin in range(0, len(records), _SCORED):
            part = slice(begin, begin + _SCORED)
            vectors = self.rows[self._own_documents(records[part])]
            counts = np.diff(self._own_starts(records[part]))
            repeated = np.repeat(queries[part], counts, axis=0)
            scores.append(np.einsum("md,md->m", vectors, repeated, dtype=np.float64).astype(np.float32))
        return np.concatenate(scores)

    def _own_starts(self, records: np.ndarray) -> np.ndarray:
        return self.inputs.own_starts[records[0] : records[-1] + 2]

    def _own_documents(self, records: np.ndarray) -> np.ndarray:
        starts = self._own_starts(records)
        return self.inputs.own_documents[starts[0] : starts[-1]]

    def _split(self, own: np.ndarray, records: np.ndarray) -> list[np.ndarray]:
        """What there is of all own documents of the records, record by record."""
        starts = self._own_starts(records)
        return np.split(own, (starts - starts[0])[1:-1])

    def own_documents(self, number: int) -> list[np.ndarray]:
        """Numbers of each record's own documents, of one shard."""
        records = self._records(number)
        return self._split(self._own_documents(records), records)

    def _of_positives(self, own: np.ndarray, records: np.ndarray) -> list[np.ndarray]:
        """The part of it that belongs to positives."""
        counts = self.inputs.num_positives[records]
        return [part[:count] for part, count in zip(self._split(own, records), counts, strict=True)]

    def _judge(self, found: Candidates, records: np.ndarray, limit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which candidates are barred, and which may be negatives: bool [Q, k] both."""
        inputs, present = self.inputs, found.documents >= 0
        documents = np.where(present, found.documents, 0)
        keys = inputs.query_keys[records]
        is_barred = barred(
            inputs.text_keys[documents],
            inputs.id_keys[documents],
            present,
            *([inputs.barred[kind].of(of_query) for of_query in keys] for kind in ("text", "id")),
        )
        return is_barred, allowed(found.scores, is_barred, limit, self.mining.rules)

    def choose(self, number: int, query_ids: list[str]) -> tuple[Judged, list[np.ndarray]]:
        """What became of a shard's candidates, and the scores of each record's own documents."""
        records, rules = self._records(number), self.mining.rules
        with np.load(self._file(number)) as file:
            found, own = Candidates(file["scores"], file["documents"]), file["own"]
        positive_scores = self._of_positives(own, records)
        limit = limits(np.array([scores.min() for scores in positive_scores]), rules)
        is_barred, is_allowed = self._judge(found, records, limit)
        judged = Judged(
            records=records,
            scores=found.scores,
            documents=found.documents,
            is_barred=is_barred,
            is_allowed=is_allowed,
            limit=limit,
            columns=choose(is_allowed, rules, query_ids),
            positives=self._of_positives(self._own_documents(records), records),
            positive_scores=positive_scores,
        )
        return judged, self._split(own, records)


def _name_of(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _write(stage: _Stage, progress: Progress) -> dict[str, Any]:
    """Choose the negatives of all shards; write the records and the report."""
    mining, output = stage.mining, Path(stage.mining.output)
    findings = Findings(mining.rules, len(stage.inputs.documents), mining.suspects)

    def rows() -> Iterator[dict[str, Any]]:
        records = read_records(mining.records)
        for number in range(len(stage.queries)):
            part = list(itertools.islice(records, stage.queries.shard_size))
            judged, own_scores = stage.choose(number, [record.query_id for record in part])
            findings.add(judged)
            own = zip(stage.own_documents(number), own_scores, strict=True)
            for place, (record, (numbers, scores)) in enumerate(zip(part, own, strict=True)):
                columns = judged.columns[place]
                mined = judged.documents[place, columns].tolist(), judged.scores[place, columns]
                yield _row(stage, record, numbers.tolist(), scores, *mined)
            progress("choices", number + 1, len(stage.queries))

    write_records(output / "records.jsonl", rows())
    stage.tidy()
    settings = {name: value for name, value in dataclasses.asdict(mining).items() if name != "output"}
    fingerprints = {"inputs": stage.inputs.fingerprint, **stage.embedders}
    return write_report(output, findings, stage.inputs, settings, fingerprints)


def _row(
    stage: _Stage, record: Record, own: list[int], own_scores: np.ndarray, mined: list[int], scores: np.ndarray
) -> dict[str, Any]:
    """A record with its negatives, those that it keeps in front.

    Documents that are the same text must share an id, or training takes a positive's copy for a negative: the corpus
    says the id of all documents that it holds.
    """
    corpus, num_positives = stage.inputs.documents, len(record.pos)
    names = (record.pos_ids + record.neg_ids)[: len(own)]
    ids = [corpus.ids[number] if number < len(corpus) else name for number, name in zip(own, names, strict=True)]
    kept = record.neg if stage.mining.keep_negatives else ()
    return {
        "query": record.query,
        "pos": record.pos,
        "neg": [*kept, *(corpus.texts[number] for number in mined)],
        "query_id": record.query_id,
        "pos_ids": ids[:num_positives],
        "neg_ids": ids[num_positives:] + [corpus.ids[number] for number in mined],
        "pos_scores": _rounded(own_scores[:num_positives]),
        "neg_scores": _rounded(own_scores[num_positives:]) + _rounded(scores),
    }


def _rounded(scores: np.ndarray) -> list[float]:
    return [round(float(score), 6) for score in scores]
