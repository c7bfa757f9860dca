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

import torch.distributed as dist

from nvembed_mcore.data.records import Record, read_records, write_records
from nvembed_mcore.evaluation.embedders import Embedder
from nvembed_mcore.evaluation.shards import SHARD_SIZE, encode_shards, open_shards
from nvembed_mcore.mining.approximate import approximate_search, build_index, check_faiss
from nvembed_mcore.mining.candidates import CandidateShards, Judged
from nvembed_mcore.mining.findings import Findings
from nvembed_mcore.mining.inputs import Inputs, open_inputs, own_documents, prepare
from nvembed_mcore.mining.report import write_report
from nvembed_mcore.mining.search import Rows, exact_search
from nvembed_mcore.mining.select import Rules
from nvembed_mcore.parallel.groups import every_rank_does, first_rank_does
from nvembed_mcore.progress import progress

EXACT = "exact"


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
    """Whether the records' own negatives stay, in front of the mined ones, but for those that are its positives."""
    shard_size: int = SHARD_SIZE
    """Documents, and queries, of a shard."""
    suspects: int = 50
    """Of the report."""

    def __post_init__(self) -> None:
        rules = self.rules
        if self.depth < 1:
            raise ValueError(f"--depth must be at least 1, got {self.depth}")
        if rules.last is not None and rules.last > self.depth:
            raise ValueError(f"--range ends at rank {rules.last}, beyond --depth {self.depth}")
        room = min(rules.end, self.depth) - rules.skip
        if rules.negatives > room:
            raise ValueError(f"--negatives {rules.negatives} is more than the {room} ranks of --range and --depth")
        if self.shard_size < 1:
            raise ValueError(f"--shard-size must be at least 1, got {self.shard_size}")
        if self.suspects < 0:
            raise ValueError(f"--suspects must be at least 0, got {self.suspects}")
        if os.path.realpath(self.records) in map(os.path.realpath, (self.output, self.file)):
            raise ValueError(
                f"{self.file} would be written among the records that are mined for, {self.records}; give another "
                f"OUTPUT"
            )
        if self.index != EXACT:
            check_faiss(self.index)

    @property
    def file(self) -> Path:
        return Path(self.output) / "records.jsonl"

    @property
    def work(self) -> Path:
        return Path(self.output) / "work"


def mine(open_embedder: Callable[[], Embedder], mining: Mining) -> dict[str, Any]:
    """Mine negatives; every rank calls this, and gets the report's figures.

    Args:
        open_embedder: opens the model, which is let go before the search.
        mining: what to mine and how.

    Raises:
        ValueError: the data cannot be read, the model cannot embed, the output folder holds the work of other data or
            another model, or the index cannot be made.
    """
    embedders = _encode(open_embedder, mining)
    inputs = open_inputs(mining.work / "inputs", mining.corpus)
    documents = list(open_shards(mining.work / "documents"))
    others = list(open_shards(mining.work / "others")) if inputs.others else []
    if mining.index == EXACT:
        search = exact_search(documents)
    else:
        path = _index_file(mining, inputs, embedders["documents"])
        first_rank_does(lambda: path.is_file() or build_index(documents, mining.index, path, seed=mining.rules.seed))
        search = approximate_search(path, documents)
    how = [dataclasses.asdict(mining.rules), mining.depth, mining.index, mining.shard_size]
    candidates = CandidateShards(
        mining.work / f"candidates-{_name_of([inputs.fingerprint, embedders, how])}",
        inputs,
        queries=open_shards(mining.work / "queries"),
        vectors=Rows([*documents, *others]),
        rules=mining.rules,
        depth=mining.depth,
    )
    missing = first_rank_does(candidates.begin)

    def search_mine() -> None:
        numbers = missing[dist.get_rank() :: dist.get_world_size()]
        with progress("search", len(numbers), "shards of queries") as shown:
            for done, number in enumerate(numbers, 1):
                candidates.search(search, number)
                shown.update(done)

    every_rank_does(search_mine)
    return first_rank_does(lambda: _write(mining, candidates, embedders))


def _encode(open_embedder: Callable[[], Embedder], mining: Mining) -> dict[str, Any]:
    """Embed documents and queries, as far as they are not there; returns what the embeddings depend on."""
    embedder = open_embedder()
    prepare_all = partial(prepare, mining.records, mining.corpus, keep_negatives=mining.keep_negatives)
    first_rank_does(lambda: prepare_all(mining.work / "inputs"))
    inputs = open_inputs(mining.work / "inputs", mining.corpus)
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
            fingerprint=texts.fingerprint,
            what=name,
        )
    return {"queries": embedder.facts(True), "documents": embedder.facts(False)}


def _index_file(mining: Mining, inputs: Inputs, embedder: dict[str, Any]) -> Path:
    """Where an index of the documents lies; it serves other rules too."""
    facts = [mining.index, mining.rules.seed, mining.shard_size, inputs.documents.fingerprint, embedder]
    return mining.work / f"index-{_name_of(facts)}.faiss"


def _name_of(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _write(mining: Mining, candidates: CandidateShards, embedders: dict[str, Any]) -> dict[str, Any]:
    """Choose the negatives of all shards; write the records and the report."""
    inputs, output = candidates.inputs, Path(mining.output)
    findings = Findings(mining.rules, len(inputs.documents), mining.suspects)

    def rows() -> Iterator[dict[str, Any]]:
        records = read_records(mining.records)
        with progress("choose", len(candidates), "shards of queries") as shown:
            for number in range(len(candidates)):
                part = list(itertools.islice(records, candidates.queries.shard_size))
                judged = candidates.choose(number, [record.query_id for record in part])
                findings.add(judged)
                for place, record in enumerate(part):
                    yield _row(record, inputs, judged, place, mining.keep_negatives)
                shown.update(number + 1)

    write_records(mining.file, rows())
    for folder in mining.work.glob("candidates-*"):
        if folder != candidates.folder:
            shutil.rmtree(folder)  # other settings left them
    settings = {name: value for name, value in dataclasses.asdict(mining).items() if name != "output"}
    return write_report(output, findings, inputs, settings, {"inputs": inputs.fingerprint, **embedders})


def _row(record: Record, inputs: Inputs, judged: Judged, place: int, keep_negatives: bool) -> dict[str, Any]:
    """A record with its negatives, those that it keeps in front.

    Documents that are the same text must share an id, or training takes a positive's copy for a negative: the corpus
    says the id of all documents that it holds, and of a text that it holds twice the first one.
    """
    columns, own, corpus = judged.columns[place], judged.own[place].tolist(), inputs.documents
    mined, num_positives = judged.documents[place, columns], len(record.pos)
    texts, names = zip(*own_documents(record, keep_negatives), strict=True)
    ids = [corpus.ids[number] if number < len(corpus) else name for number, name in zip(own, names, strict=True)]
    scores = [round(float(score), 6) for score in (*judged.own_scores[place], *judged.scores[place, columns])]
    instruction = {} if record.instruction is None else {"instruction": record.instruction}
    return {
        **instruction,
        "query": record.query,
        "pos": record.pos,
        "neg": [*texts[num_positives:], *(corpus.texts[number] for number in mined.tolist())],
        "query_id": record.query_id,
        "pos_ids": ids[:num_positives],
        "neg_ids": ids[num_positives:] + [corpus.ids[number] for number in inputs.first_copies[mined].tolist()],
        "pos_scores": scores[:num_positives],
        "neg_scores": scores[num_positives:],
    }
