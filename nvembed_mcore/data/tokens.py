"""The token store: a data set tokenised once, then read through a memory map.

A store is a folder named by its fingerprint, with `data.arrow` (an Arrow stream, as `datasets.Dataset.from_file` reads
it) and `store.json` (what went in, and statistics). A row is one record:

    query, query_length                              int32 tokens, and how many
    pos, pos_lengths, pos_ids                        a list for each positive, their lengths, their document ids
    neg, neg_lengths, neg_ids                        likewise for the hard negatives

Document ids are the first 8 bytes of the SHA-256 of the id string, so documents of different data sets compare too.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow

from nvembed_mcore.config import DatasetConfig
from nvembed_mcore.data.prompts import EncodedTexts, check_room, encode_texts, prompt_tokens, query_prompt
from nvembed_mcore.data.records import DataError, Record, Tally, read_records
from nvembed_mcore.data.tokenizer import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LOG = logging.getLogger(__name__)
_FORMAT = 1
# A batch of rows ends at the first of these: Arrow's 32-bit offsets and the memory of the build stay small.
_BATCH_RECORDS = 1024
_BATCH_CHARACTERS = 1 << 22

_TOKENS = pyarrow.list_(pyarrow.int32())
_SCHEMA = pyarrow.schema(
    [("query", _TOKENS), ("query_length", pyarrow.int32())]
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


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised record. Token arrays are int32 [length], read-only views of the memory map, with `<s>`, the
    instruction where there is one, and `</s>`; ids are int64 [positives] and [negatives]."""

    query: np.ndarray
    query_pooled_from: int
    positives: list[np.ndarray]
    negatives: list[np.ndarray]
    document_pooled_from: int
    positive_ids: np.ndarray
    negative_ids: np.ndarray


@dataclass(slots=True)
class Statistics:
    """What the build saw: counts of records, texts, tokens, texts that were cut, and blank negatives left out."""

    records: int = 0
    documents: int = 0
    tokens: int = 0
    truncated_queries: int = 0
    truncated_documents: int = 0
    blank_negatives: int = 0


class TokenStore:
    """Random access to a tokenised data set; `build` or `open` makes one.

    Attributes:
        folder: where it lies.
        fingerprint: 32 hex digits of the data, the tokenizer, the prompt, the limits and this format.
        statistics: what the build saw.
    """

    def __init__(self, folder: Path, description: dict[str, Any], batches: list[_Batch]) -> None:
        self.folder = folder
        self.fingerprint: str = description["fingerprint"]
        self.statistics = Statistics(**description["statistics"])
        self._query_pooled_from: int = description["query_pooled_from"]
        self._document_pooled_from: int = description["document_pooled_from"]
        self._batches = batches
        self._starts = np.cumsum([0, *(batch.rows for batch in batches)]).tolist()

    @classmethod
    def build(
        cls,
        dataset: DatasetConfig,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_query_tokens: int,
        max_document_tokens: int,
        cache_dir: str | Path,
    ) -> TokenStore:
        """Tokenise a data set, or open its store when it exists.

        The store is written aside and renamed when complete, so a build that was killed leaves none, and of two
        builds at once the later one uses the store of the earlier. Call it on one process of a machine (or of those
        that share `cache_dir`); afterwards the others call `open` with this store's folder.

        Args:
            dataset: path, instruction and whether documents carry the instruction.
            tokenizer: a fast tokenizer.
            max_query_tokens, max_document_tokens: limits with prompt and special tokens; longer texts are cut.
            cache_dir: where stores live.

        Raises:
            DataError: the data file is missing, empty, bad (as `read_records`) or changed while it was read, or an
                existing store is damaged.
            ValueError: the instruction leaves no room under a limit.
        """
        document_instruction = dataset.instruction if dataset.instructs_documents else ""
        check_room(tokenizer, dataset.instruction, max_query_tokens)
        check_room(tokenizer, document_instruction, max_document_tokens)
        source = Path(dataset.path)
        identity = {
            "format": _FORMAT,
            "data": _file_hash(source),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "query_prompt": query_prompt(dataset.instruction),
            "document_prompt": query_prompt(document_instruction),
            "max_query_tokens": max_query_tokens,
            "max_document_tokens": max_document_tokens,
        }
        fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
        folder = Path(cache_dir) / fingerprint
        if not folder.exists():
            encoder = _Encoder(
                tokenizer, dataset.instruction, document_instruction, max_query_tokens, max_document_tokens
            )
            _write_store(source, folder, encoder, {"fingerprint": fingerprint, **identity})
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path) -> TokenStore:
        """Open the store that `build` made in `folder`.

        Raises:
            DataError: there is none, or it is damaged.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"no token store at {folder}")
        try:
            description = json.loads((folder / "store.json").read_text())
            found, written = (folder / "data.arrow").stat().st_size, description["bytes"]
            if found != written:
                raise ValueError(f"data.arrow has {found} bytes, {written} were written")
            batches = _map_batches(folder / "data.arrow")
            store = cls(folder, description, batches)
            if len(store) != store.statistics.records:
                raise ValueError(f"data.arrow has {len(store)} records, {store.statistics.records} were written")
        except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
            raise DataError(
                f"the token store {folder} is damaged ({error}); remove the folder to build it anew"
            ) from error
        return store

    def __len__(self) -> int:
        return self._starts[-1]

    def example(self, index: int) -> Example:
        """Record `index`, 0 <= index < len(self).

        Raises:
            IndexError: there is no such record.
        """
        batch, row = self._locate(index)
        positives, positive_ids = batch.positives.row(row)
        negatives, negative_ids = batch.negatives.row(row)
        return Example(
            query=batch.queries.item(row),
            query_pooled_from=self._query_pooled_from,
            positives=positives,
            negatives=negatives,
            document_pooled_from=self._document_pooled_from,
            positive_ids=positive_ids,
            negative_ids=negative_ids,
        )

    def query_lengths(self) -> np.ndarray:
        """Tokens of each query, int32 [records]."""
        return np.concatenate([batch.query_lengths for batch in self._batches])

    def document_lengths(self) -> np.ndarray:
        """Tokens of each document, positives and negatives, int32 [documents]."""
        return np.concatenate([lengths for batch in self._batches for lengths in batch.document_lengths])

    def _locate(self, index: int) -> tuple[_Batch, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of a store with {len(self)} records ({self.folder})")
        number = bisect.bisect_right(self._starts, index) - 1
        return self._batches[number], index - self._starts[number]


class _Lists:
    """A list column of one Arrow batch as two numpy views: where each row begins, and the values of all rows."""

    def __init__(self, column: pyarrow.ListArray) -> None:
        self.offsets = column.offsets.to_numpy()
        self.values = column.values if isinstance(column.values, pyarrow.ListArray) else column.values.to_numpy()

    def item(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]


class _Documents:
    """The positives or the negatives of one Arrow batch."""

    def __init__(self, batch: pyarrow.RecordBatch, name: str) -> None:
        rows = _Lists(batch.column(name))
        self._texts = _Lists(rows.values)
        self._first = rows.offsets
        self._ids = _Lists(batch.column(f"{name}_ids"))

    def row(self, row: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Token arrays and ids of one record's documents."""
        bounds = self._texts.offsets[self._first[row] : self._first[row + 1] + 1].tolist()
        tokens = self._texts.values
        return [tokens[a:b] for a, b in zip(bounds, bounds[1:], strict=False)], self._ids.item(row)


class _Batch:
    """Views of one Arrow batch of the memory map; making them reads no tokens."""

    def __init__(self, batch: pyarrow.RecordBatch) -> None:
        self.rows = batch.num_rows
        self.queries = _Lists(batch.column("query"))
        self.positives = _Documents(batch, "pos")
        self.negatives = _Documents(batch, "neg")
        self.query_lengths = batch.column("query_length").to_numpy()
        self.document_lengths = [batch.column(name).values.to_numpy() for name in ("pos_lengths", "neg_lengths")]


def _map_batches(path: Path) -> list[_Batch]:
    import datasets

    table = datasets.Dataset.from_file(str(path)).data.table
    if not table.schema.equals(_SCHEMA):
        raise ValueError(f"the columns of data.arrow are {table.schema.names}, not {_SCHEMA.names}")
    return [_Batch(batch) for batch in table.to_batches()]


@dataclass(frozen=True, slots=True)
class _Encoder:
    """Tokenises records as one data set wants it."""

    tokenizer: PreTrainedTokenizerFast
    query_instruction: str
    document_instruction: str
    max_query_tokens: int
    max_document_tokens: int

    def queries(self, texts: list[str]) -> EncodedTexts:
        return encode_texts(self.tokenizer, texts, self.query_instruction, self.max_query_tokens)

    def documents(self, texts: list[str]) -> EncodedTexts:
        return encode_texts(self.tokenizer, texts, self.document_instruction, self.max_document_tokens)

    def pooled_from(self) -> dict[str, int]:
        return {
            "query_pooled_from": len(prompt_tokens(self.tokenizer, self.query_instruction)),
            "document_pooled_from": len(prompt_tokens(self.tokenizer, self.document_instruction)),
        }


def _write_store(source: Path, folder: Path, encoder: _Encoder, identity: dict[str, Any]) -> None:
    """Tokenise `source` into a folder beside `folder`, then rename it."""
    _LOG.info("tokenising %s into %s", source, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}"
    aside.mkdir()
    try:
        statistics = _write_arrow(source, aside / "data.arrow", encoder)
        if _file_hash(source) != identity["data"]:
            raise DataError(f"{source} changed while it was tokenised")
        description = {
            **identity,
            **encoder.pooled_from(),
            "bytes": (aside / "data.arrow").stat().st_size,
            "statistics": asdict(statistics),
        }
        (aside / "store.json").write_text(json.dumps(description, indent=2) + "\n")
        try:
            os.rename(aside, folder)
        except OSError:
            if not folder.is_dir():
                raise
            _LOG.info("another process finished %s first", folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _LOG.info(
        "%d records, %d documents, %d tokens; cut: %d queries, %d documents",
        statistics.records,
        statistics.documents,
        statistics.tokens,
        statistics.truncated_queries,
        statistics.truncated_documents,
    )


def _write_arrow(source: Path, path: Path, encoder: _Encoder) -> Statistics:
    statistics, tally = Statistics(), Tally()
    with path.open("wb") as file:
        with pyarrow.ipc.new_stream(file, _SCHEMA) as writer:
            for records in _batched(read_records(source, tally)):
                writer.write_batch(_arrow_batch(records, encoder, statistics))
        file.flush()
        os.fsync(file.fileno())
    statistics.blank_negatives = tally.blank_negatives
    return statistics


def _batched(records: Iterator[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += len(record.query) + sum(map(len, record.pos)) + sum(map(len, record.neg))
        if len(batch) == _BATCH_RECORDS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _arrow_batch(records: list[Record], encoder: _Encoder, statistics: Statistics) -> pyarrow.RecordBatch:
    """Tokenise some records and count them in `statistics`."""
    queries = encoder.queries([record.query for record in records])
    columns: list[pyarrow.Array] = [_token_lists(queries), pyarrow.array(queries.lengths)]
    for texts_of, ids_of in (("pos", "pos_ids"), ("neg", "neg_ids")):
        texts = [getattr(record, texts_of) for record in records]
        documents = encoder.documents(list(chain.from_iterable(texts)))
        bounds = _offsets([len(some) for some in texts])
        ids = [document_hash(name) for record in records for name in getattr(record, ids_of)]
        columns += [
            pyarrow.ListArray.from_arrays(bounds, _token_lists(documents)),
            pyarrow.ListArray.from_arrays(bounds, pyarrow.array(documents.lengths)),
            pyarrow.ListArray.from_arrays(bounds, pyarrow.array(ids, pyarrow.int64())),
        ]
        statistics.documents += len(documents)
        statistics.tokens += len(documents.token_ids)
        statistics.truncated_documents += documents.truncated
    statistics.records += len(records)
    statistics.tokens += len(queries.token_ids)
    statistics.truncated_queries += queries.truncated
    return pyarrow.RecordBatch.from_arrays(columns, schema=_SCHEMA)


def document_hash(name: str) -> int:
    """A document's id as a signed number of 64 bits: the first 8 bytes (little-endian) of the SHA-256 of its id."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def _token_lists(encoded: EncodedTexts) -> pyarrow.ListArray:
    return pyarrow.ListArray.from_arrays(_offsets(encoded.lengths), pyarrow.array(encoded.token_ids))


def _offsets(lengths: list[int] | np.ndarray) -> pyarrow.Array:
    """Where each of some runs begins in their concatenation, and the end; int32 [runs + 1]."""
    ends = np.cumsum(lengths, dtype=np.int64)
    assert not len(ends) or ends[-1] < 2**31, "a batch of rows is bounded far below"
    return pyarrow.array(np.concatenate([[0], ends]).astype(np.int32))


def _file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except FileNotFoundError as error:
        raise DataError(f"no data file at {path}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return digest.hexdigest()
