"""The token store: a data set tokenised once, then read by record.

A store is a folder named by what is in it, with `data.arrow` (an Arrow stream, as `datasets.Dataset.from_file` reads
it) and `store.json` (what went in, statistics, and the hash of `data.arrow`). A row is one record:

    query, query_length, query_pooled_from           int32 tokens, how many, and the first pooled position
    pos, pos_lengths, pos_ids                        a list for each positive, their lengths, their document ids
    neg, neg_lengths, neg_ids                        likewise for the hard negatives
    pos_scores, neg_scores                           of a store for distillation: float32, what a teacher scores each

Document ids are the first 8 bytes of the SHA-256 of the id string, so documents of different data sets compare too.
"""

from __future__ import annotations

import bisect
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow

from nvembed_mcore.config import DatasetConfig
from nvembed_mcore.data.bare_tokenizer import BareTokenizer
from nvembed_mcore.data.faults import DataError, Problems
from nvembed_mcore.data.prompts import check_room, query_prompt
from nvembed_mcore.data.sources import source_fingerprint
from nvembed_mcore.data.token_build import SCHEMA, SCORED_SCHEMA, Encoder, Statistics, identity_hash, write_store
from nvembed_mcore.data.token_file import Batch, TokenFile
from nvembed_mcore.data.tokenizer import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

_FORMAT = 1
_IDENTITY = (
    "format",
    "data",
    "tokenizer",
    "query_prompt",
    "document_prompt",
    "max_query_tokens",
    "max_document_tokens",
)


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised record. Token arrays are int32 [length] and read-only, with `<s>`, the instruction where there is
    one, and `</s>`; ids are int64 [positives] and [negatives], and so are a teacher's scores, float32, of a store that
    has them."""

    query: np.ndarray
    query_pooled_from: int
    positives: list[np.ndarray]
    negatives: list[np.ndarray]
    document_pooled_from: int
    positive_ids: np.ndarray
    negative_ids: np.ndarray
    positive_scores: np.ndarray | None = None
    negative_scores: np.ndarray | None = None


class TokenStore:
    """Random access to a tokenised data set; `build` or `open` makes one.

    Attributes:
        folder: where it lies.
        fingerprint: 32 hex digits of the identity.
        identity: what is in it, as JSON values: data, tokenizer, prompts, limits, format, and `rejected`: how many
            records were left out, and a digest of their lines.
        statistics: what the build saw.
    """

    def __init__(self, folder: Path, description: dict[str, Any], file: TokenFile) -> None:
        self.folder = folder
        self.fingerprint: str = description["fingerprint"]
        self.identity = {key: description[key] for key in _IDENTITY}
        self.identity["rejected"] = description.get("rejected", {"records": 0})
        self._problems: list[str] = description.get("problems", [])
        self.statistics = Statistics(**description["statistics"])
        self._document_pooled_from: int = description["document_pooled_from"]
        self._hash: str = description["xxh3_128"]
        self._file = file
        self._starts = np.cumsum([0, *(batch.rows for batch in file.batches)]).tolist()

    @classmethod
    def build(
        cls,
        dataset: DatasetConfig,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_query_tokens: int,
        max_document_tokens: int,
        cache_dir: str | Path,
        max_bad_records: int = 0,
        with_scores: bool = False,
        processes: int | None = None,
    ) -> TokenStore:
        """Tokenise a data set, or open its store when it exists and its bytes are those that were written.

        The store is written aside and renamed when complete, so a build that was killed leaves none, and of two
        builds at once the later one uses the store of the earlier. Call it on one process of a machine (or of those
        that share `cache_dir`); afterwards the others call `open` with this store's folder.

        Args:
            dataset: path, instruction and whether documents carry the instruction.
            tokenizer: a fast tokenizer.
            max_query_tokens, max_document_tokens: limits with prompt and special tokens; longer texts are cut.
            cache_dir: where stores live.
            max_bad_records: so many records that validation rejects are left out.
            with_scores: keep a teacher's scores; a record without is rejected. Where none is, the store has the
                fingerprint, and so a run the order of samples, that it has without scores.
            processes: workers for data of more than a few megabytes; None: one a core, 32 at most.

        Raises:
            DataError: the data file is missing, empty, bad (as `read_records`) or changed while it was read, a
                record cannot be tokenised, or an existing store is damaged or had more bad records.
            ValueError: the instruction leaves no room under a limit.
        """
        document_instruction = dataset.instruction if dataset.instructs_documents else ""
        check_room(tokenizer, dataset.instruction, max_query_tokens)
        check_room(tokenizer, document_instruction, max_document_tokens)
        source = dataset.path
        identity = {
            "format": _FORMAT,
            "data": source_fingerprint(source),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "query_prompt": query_prompt(dataset.instruction),
            "document_prompt": query_prompt(document_instruction),
            "max_query_tokens": max_query_tokens,
            "max_document_tokens": max_document_tokens,
        }
        # The columns name the folder, so that a store of other columns is not taken for this one; they are not in the
        # fingerprint, which decides the order of samples.
        schema = SCORED_SCHEMA if with_scores else SCHEMA
        folder = Path(cache_dir) / identity_hash(identity | {"columns": schema.names})
        if not folder.exists():
            instructions, limits = (dataset.instruction, document_instruction), (max_query_tokens, max_document_tokens)
            encoder = Encoder(BareTokenizer.of(tokenizer), *instructions, *limits, with_scores)
            write_store(source, folder, encoder, identity, max_bad_records=max_bad_records, processes=processes)
        store = cls.open(folder)
        store._verify()
        store._refuse_if_more_rejected(source, max_bad_records)
        return store

    @classmethod
    def open(cls, folder: str | Path) -> TokenStore:
        """Open the store that `build` made, or found whole, in `folder`; this does not read it.

        Raises:
            DataError: there is none, or it is damaged.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"no token store at {folder}")
        try:
            description = _read_description(folder / "store.json")
            found, written = (folder / "data.arrow").stat().st_size, description["bytes"]
            if found != written:
                raise ValueError(f"data.arrow has {found} bytes, {written} were written")
            store = cls(folder, description, TokenFile(folder / "data.arrow"))
            if len(store) != store.statistics.records:
                raise ValueError(f"data.arrow has {len(store)} records, {store.statistics.records} were written")
        except (OSError, ValueError, TypeError, pyarrow.ArrowException) as error:
            raise _damaged(folder, error) from error
        return store

    def check(self) -> None:
        """Whether it is still the file that was opened; cheap enough for every step.

        Raises:
            StorageError: it is not.
        """
        self._file.check()

    def __len__(self) -> int:
        return self._starts[-1]

    def example(self, index: int) -> Example:
        """Record `index`, 0 <= index < len(self).

        Raises:
            IndexError: there is no such record.
            StorageError: it cannot be read.
        """
        batch, row = self._locate(index)
        positives, positive_ids = batch.positives.row(row)
        negatives, negative_ids = batch.negatives.row(row)
        positive_scores, negative_scores = batch.scores(row)
        return Example(
            query=batch.queries.item(row),
            query_pooled_from=int(batch.query_pooled_from.part(row, row + 1)[0]),
            positives=positives,
            negatives=negatives,
            document_pooled_from=self._document_pooled_from,
            positive_ids=positive_ids,
            negative_ids=negative_ids,
            positive_scores=positive_scores,
            negative_scores=negative_scores,
        )

    def query_lengths(self) -> np.ndarray:
        """Tokens of each query, int32 [records]."""
        return np.concatenate([batch.query_lengths.all() for batch in self._file.batches])

    def document_lengths(self) -> np.ndarray:
        """Tokens of each document, positives and negatives, int32 [documents]."""
        return np.concatenate([lengths.all() for batch in self._file.batches for lengths in batch.document_lengths])

    def _verify(self) -> None:
        """Read all of it, and compare with the hash of what was written."""
        begin = time.monotonic()
        found = self._file.content_hash()
        if found != self._hash:
            raise _damaged(self.folder, f"the XXH3 of data.arrow is {found}, {self._hash} was written")
        log.info("%s is as it was written; reading it took %.1f s", self.folder, time.monotonic() - begin)

    def _refuse_if_more_rejected(self, source: str, allowed: int) -> None:
        """As the build would have: another run may have allowed more."""
        Problems(source, allowed, self.identity["rejected"]["records"], self._problems).raise_if_too_many()

    def _locate(self, index: int) -> tuple[Batch, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of a store with {len(self)} records ({self.folder})")
        number = bisect.bisect_right(self._starts, index) - 1
        return self._file.batches[number], index - self._starts[number]


def _damaged(folder: Path, reason: object) -> DataError:
    return DataError(f"the token store {folder} is damaged ({reason}); remove the folder to build it anew")


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    for key in (*_IDENTITY, "fingerprint", "bytes", "xxh3_128", "statistics", "document_pooled_from"):
        if key not in description:
            raise ValueError(f"{path.name} lacks {key!r}")
    return description
