"""Tokenising a data set into the files of a token store, by all cores.

This process cuts the data into blocks and writes what comes back, in order; workers parse and tokenise. A batch of
rows never spans blocks, so what is written does not depend on the number of workers.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from itertools import chain, groupby
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow
import xxhash

from nvembed_mcore.data.bare_tokenizer import BareTokenizer
from nvembed_mcore.data.faults import DataError, Problems
from nvembed_mcore.data.files import Block
from nvembed_mcore.data.prompts import EncodedTexts, encode_texts, prompt_tokens
from nvembed_mcore.data.records import Parsed, Record, parse_block
from nvembed_mcore.data.sources import blocks, source_fingerprint
from nvembed_mcore.data.workers import ordered_map
from nvembed_mcore.progress import progress

_LOG = logging.getLogger(__name__)
# A batch of rows ends at the first of these: Arrow's 32-bit offsets and the memory of a worker stay small.
_BATCH_RECORDS = 8192
_BATCH_CHARACTERS = 1 << 22
_LOCK = "lock"

_TOKENS = pyarrow.list_(pyarrow.int32())
SCHEMA = pyarrow.schema(
    [("query", _TOKENS), ("query_length", pyarrow.int32()), ("query_pooled_from", pyarrow.int32())]
    + [
        (name + suffix, kind)
        for name in ("pos", "neg")
        for suffix, kind in (
            ("", pyarrow.list_(_TOKENS)),
            ("_lengths", _TOKENS),
            ("_ids", pyarrow.list_(pyarrow.int64())),
        )
    ]
)


_SCORES = pyarrow.list_(pyarrow.float32())
SCORED_SCHEMA = pyarrow.schema([*SCHEMA, ("pos_scores", _SCORES), ("neg_scores", _SCORES)])
"""With what a teacher scores each document, for runs that distil."""


@dataclass(slots=True)
class Statistics:
    """What the build saw: counts of records, texts, tokens, texts that were cut, and blank negatives left out."""

    records: int = 0
    documents: int = 0
    tokens: int = 0
    truncated_queries: int = 0
    truncated_documents: int = 0
    blank_negatives: int = 0

    def add(self, other: Statistics) -> None:
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


@dataclass(frozen=True, slots=True)
class Encoder:
    """Tokenises records as one data set wants it; with a teacher's scores, which each record must have then, or
    without."""

    tokenizer: BareTokenizer
    query_instruction: str
    document_instruction: str
    max_query_tokens: int
    max_document_tokens: int
    with_scores: bool = False

    @property
    def schema(self) -> pyarrow.Schema:
        return SCORED_SCHEMA if self.with_scores else SCHEMA

    def queries(self, records: list[Record]) -> list[EncodedTexts]:
        """The queries of some records in order, those that follow each other with the same instruction together: the
        record's, where it has one, or the data set's."""
        encoded = []
        for instruction, some in groupby(records, lambda record: record.instruction):
            instruction = self.query_instruction if instruction is None else instruction
            texts = [record.query for record in some]
            encoded.append(encode_texts(self.tokenizer, texts, instruction, self.max_query_tokens))
        return encoded

    def documents(self, texts: list[str]) -> EncodedTexts:
        return encode_texts(self.tokenizer, texts, self.document_instruction, self.max_document_tokens)

    def document_pooled_from(self) -> int:
        return len(prompt_tokens(self.tokenizer, self.document_instruction))


def write_store(
    source: str,
    folder: Path,
    encoder: Encoder,
    identity: dict[str, Any],
    *,
    max_bad_records: int = 0,
    processes: int | None = None,
) -> None:
    """Tokenise `source` into a folder beside `folder`, then rename it.

    Args:
        identity: what names the store; `data` is the source's `source_fingerprint`.
        max_bad_records: so many bad lines are left out.
        processes: workers; None: one a core, 32 at most.

    Raises:
        DataError: as `TokenStore.build`.
    """
    _LOG.info("tokenising %s into %s", source, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_overs(folder)
    aside = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    aside.mkdir()
    begin = time.monotonic()
    try:
        lock = _locked(aside)
        build = _Build(source, max_bad_records)
        build.write_arrow(aside / "data.arrow", encoder, processes)
        if source_fingerprint(source) != identity["data"]:
            raise DataError(f"{source} changed while it was tokenised")
        identity = identity | build.rejected()
        description = {
            "fingerprint": identity_hash(identity),
            **identity,
            "document_pooled_from": encoder.document_pooled_from(),
            "bytes": (aside / "data.arrow").stat().st_size,
            "xxh3_128": build.content_hash,
            "statistics": asdict(build.statistics),
            "problems": build.problems.shown,
        }
        (aside / "store.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        lock.close()
        (aside / _LOCK).unlink()
        try:
            os.rename(aside, folder)
        except OSError:
            if not folder.is_dir():
                raise
            _LOG.info("another process finished %s first", folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _log_summary(build.statistics, time.monotonic() - begin)


def _locked(aside: Path) -> IO[str]:
    """Lock a folder that is being written, as long as this process lives or until the file is closed."""
    lock = (aside / f"{_LOCK}.new").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(lock.name, aside / _LOCK)  # so nobody sees it before it is locked
    return lock


def _remove_left_overs(folder: Path) -> None:
    """Remove what builds of this store wrote that were killed."""
    for aside in folder.parent.glob(f".{folder.name}.*"):
        # A build that goes on holds its lock, which is an OSError here; one that begins or ends has no such file.
        with contextlib.suppress(OSError), (aside / _LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(aside, ignore_errors=True)


def identity_hash(identity: dict[str, Any]) -> str:
    """32 hex digits that name a store."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _log_summary(found: Statistics, seconds: float) -> None:
    _LOG.info(
        "%d records, %d documents, %d tokens; cut: %d queries, %d documents; %.0f s, %.0f records/s",
        found.records,
        found.documents,
        found.tokens,
        found.truncated_queries,
        found.truncated_documents,
        seconds,
        found.records / max(seconds, 1e-9),
    )


class _Hashed(io.RawIOBase):
    """A file that is hashed as it is written, so that the hash is of the bytes that were meant."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, xxhash.xxh3_128()

    def writable(self) -> bool:
        return True

    def write(self, part: bytes) -> int:
        self._hash.update(part)
        return self._file.write(part)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


@dataclass(slots=True)
class _Build:
    """What was read and written so far."""

    source: str
    max_bad_records: int
    statistics: Statistics = field(default_factory=Statistics)
    bad_lines: list[str] = field(default_factory=list)
    paths: dict[str, int] = field(default_factory=dict)
    problems: Problems = field(init=False)
    content_hash: str = ""

    def __post_init__(self) -> None:
        self.problems = Problems(self.source, allowed=self.max_bad_records)

    def write_arrow(self, path: Path, encoder: Encoder, processes: int | None) -> None:
        """As `read_records` does: all bad lines are counted before they are refused."""
        with path.open("wb") as file:
            hashed = _Hashed(file)
            with pyarrow.ipc.new_stream(hashed, encoder.schema) as writer:
                for tokenised in self._with_progress(self._tokenised(encoder, processes)):
                    self._note(tokenised)
                    if not self.problems.too_many:
                        self.statistics.add(tokenised.statistics)
                        for batch in pyarrow.ipc.open_stream(tokenised.stream):
                            writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        self.content_hash = hashed.hexdigest()
        self.problems.raise_if_too_many()
        if not self.statistics.records:
            raise DataError(f"{self.source} holds no records")
        if self.problems.count:
            _LOG.warning("%s", self.problems.message())
        if self.statistics.blank_negatives:
            _LOG.warning("%s: %d blank negatives were left out", self.source, self.statistics.blank_negatives)

    def rejected(self) -> dict[str, Any]:
        """The part of a store's identity that says which records were left out; nothing when none was."""
        if not self.bad_lines:
            return {}
        lines = hashlib.sha256("\n".join(self.bad_lines).encode()).hexdigest()[:16]
        return {"rejected": {"records": len(self.bad_lines), "lines": lines}}

    def _tokenised(self, encoder: Encoder, processes: int | None) -> Iterator[_Tokenised]:
        how = dict(processes=processes, start=_start_worker, start_arguments=(encoder, os.getpid()), what=self.source)
        return ordered_map(_tokenise, blocks(self.source), **how)

    def _with_progress(self, blocks_done: Iterator[_Tokenised]) -> Iterator[_Tokenised]:
        """What is left to do says the reading of the file; this says how fast."""
        begin = time.monotonic()
        with progress(f"tokenise {Path(self.source).name}", None, "records") as shown:
            for one in blocks_done:
                yield one
                rate = self.statistics.records / max(time.monotonic() - begin, 1e-9)
                shown.update(self.statistics.records, f"{rate:,.0f} records/s")

    def _note(self, tokenised: _Tokenised) -> None:
        """Count a block's bad lines, each by its file's place among the files: their names are not the data's."""
        file = self.paths.setdefault(tokenised.path, len(self.paths))
        for line, column, reason in tokenised.problems:
            self.problems.add(line, column, reason, tokenised.path)
            if not self.problems.too_many:
                self.bad_lines.append(f"{file}:{line}")


@dataclass(frozen=True, slots=True)
class _Tokenised:
    """A block's rows as an Arrow stream, what they were, and its bad lines."""

    path: str
    stream: bytes
    statistics: Statistics
    problems: list[tuple[int, int, str]]


_worker: dict[str, Encoder] = {}
"""What this process tokenises with."""


def _start_worker(encoder: Encoder, parent: int) -> None:
    _worker["encoder"] = encoder
    if os.getpid() != parent:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have workers of their own


def _tokenise(block: Block) -> _Tokenised:
    encoder = _worker["encoder"]
    parsed = parse_block(block, needs_scores=encoder.with_scores)
    statistics = Statistics(blank_negatives=parsed.blank_negatives)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, encoder.schema) as writer:
        for begin, end in _batches(parsed.records):
            try:
                writer.write_batch(_arrow_batch(parsed.records[begin:end], encoder, statistics))
            except ValueError as error:
                _name_culprit(block, parsed, encoder)
                raise DataError(f"{block.path}:{parsed.lines[begin]}: {error}") from error
    return _Tokenised(block.path, sink.getvalue().to_pybytes(), statistics, parsed.problems)


def _name_culprit(block: Block, parsed: Parsed, encoder: Encoder) -> None:
    """Raise for the first record that cannot be tokenised by itself."""
    for line, record in zip(parsed.lines, parsed.records, strict=True):
        try:
            _arrow_batch([record], encoder, Statistics())
        except ValueError as error:
            raise DataError(f"{block.path}:{line}: {error}") from error


def _batches(records: list[Record]) -> Iterator[tuple[int, int]]:
    """Where each batch begins and ends."""
    begin = characters = 0
    for end, record in enumerate(records, start=1):
        characters += len(record.query) + sum(map(len, record.pos)) + sum(map(len, record.neg))
        if end - begin == _BATCH_RECORDS or characters >= _BATCH_CHARACTERS or end == len(records):
            yield begin, end
            begin, characters = end, 0


def _arrow_batch(records: list[Record], encoder: Encoder, statistics: Statistics) -> pyarrow.RecordBatch:
    """Tokenise some records and count them in `statistics`."""
    queries = encoder.queries(records)
    lengths = np.concatenate([some.lengths for some in queries])
    token_ids = np.concatenate([some.token_ids for some in queries])
    pooled_from = np.repeat([some.pooled_from for some in queries], [len(some) for some in queries])
    columns: list[pyarrow.Array] = [
        pyarrow.ListArray.from_arrays(_offsets(lengths), pyarrow.array(token_ids)),
        pyarrow.array(lengths),
        pyarrow.array(pooled_from.astype(np.int32)),
    ]
    for texts_of, ids_of in (("pos", "pos_ids"), ("neg", "neg_ids")):
        texts = [getattr(record, texts_of) for record in records]
        documents = encoder.documents(list(chain.from_iterable(texts)))
        bounds = _offsets([len(some) for some in texts])
        ids = document_hashes([name for record in records for name in getattr(record, ids_of)])
        columns += [
            pyarrow.ListArray.from_arrays(bounds, _token_lists(documents)),
            pyarrow.ListArray.from_arrays(bounds, pyarrow.array(documents.lengths)),
            pyarrow.ListArray.from_arrays(bounds, pyarrow.array(ids)),
        ]
        statistics.documents += len(documents)
        statistics.tokens += len(documents.token_ids)
        statistics.truncated_documents += documents.truncated
    if encoder.with_scores:
        columns += [_score_lists([record.scores[name] for record in records]) for name in ("pos_scores", "neg_scores")]
    statistics.records += len(records)
    statistics.tokens += len(token_ids)
    statistics.truncated_queries += sum(some.truncated for some in queries)
    return pyarrow.RecordBatch.from_arrays(columns, schema=encoder.schema)


def document_hashes(names: list[str]) -> np.ndarray:
    """Documents' ids as signed numbers of 64 bits: the first 8 bytes (little-endian) of the SHA-256 of an id."""
    digests = b"".join([hashlib.sha256(name.encode()).digest()[:8] for name in names])
    return np.frombuffer(digests, "<i8")


def _token_lists(encoded: EncodedTexts) -> pyarrow.ListArray:
    return pyarrow.ListArray.from_arrays(_offsets(encoded.lengths), pyarrow.array(encoded.token_ids))


def _score_lists(scores: list[tuple[float, ...]]) -> pyarrow.ListArray:
    values = np.fromiter(chain.from_iterable(scores), np.float32)
    return pyarrow.ListArray.from_arrays(_offsets([len(some) for some in scores]), pyarrow.array(values))


def _offsets(lengths: list[int] | np.ndarray) -> pyarrow.Array:
    """Where each of some runs begins in their concatenation, and the end; int32 [runs + 1]."""
    ends = np.cumsum(lengths, dtype=np.int64)
    assert not len(ends) or ends[-1] < 2**31, "a batch of rows is bounded far below"
    return pyarrow.array(np.concatenate([[0], ends]).astype(np.int32))
