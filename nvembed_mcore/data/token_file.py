"""The rows of a token store's `data.arrow`, read by place.

Not through a memory map: where a mapped file was cut short or its disk fails, the kernel kills the process without a
word (SIGBUS). A read that fails is an error with a name.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow
import xxhash

from nvembed_mcore.data.token_build import SCHEMA, SCORED_SCHEMA
from nvembed_mcore.exits import StorageError

_BLOCK_BYTES = 1 << 22


class TokenFile:
    """An open `data.arrow`.

    Attributes:
        path: where it lies.
        batches: its rows, a few thousand each.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            OSError, pyarrow.ArrowException: it cannot be read.
            ValueError: it has other columns.
        """
        self.path, self._name = path, str(path)
        self._file = path.open("rb", buffering=0)
        self._state = _state(os.fstat(self._file.fileno()))
        with pyarrow.memory_map(str(path)) as source:
            whole = source.read_buffer()
            reader = pyarrow.ipc.open_stream(whole)
            if not any(reader.schema.equals(one) for one in (SCHEMA, SCORED_SCHEMA)):
                raise ValueError(f"the columns of {path.name} are {reader.schema.names}, not {SCHEMA.names}")
            self.batches = [Batch(self, batch, whole.address) for batch in reader]

    def check(self) -> None:
        """Whether it is still the file that was opened, by its place, size and time.

        Raises:
            StorageError: it is not.
        """
        try:
            now = _state(os.stat(self._name))
        except OSError as error:
            raise StorageError(f"a token store was taken away while it was in use: {error}") from error
        if now != self._state:
            raise StorageError(
                f"{self.path} changed while it was in use: (inode, bytes, time of the last change) were "
                f"{self._state}, are {now}"
            )

    def content_hash(self) -> str:
        """XXH3 of all bytes, 128 bits in hex; reads the whole file."""
        digest = xxhash.xxh3_128()
        with self.path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def read(self, offset: int, count: int) -> bytes:
        """Bytes of the file.

        Raises:
            StorageError: they cannot be read.
        """
        try:
            found = os.pread(self._file.fileno(), count, offset)
        except OSError as error:
            raise StorageError(f"cannot read {self.path} at byte {offset}: {error}") from error
        if len(found) != count:
            raise StorageError(
                f"{self.path} ends at byte {offset + len(found)}, where {count - len(found)} more were: it was cut "
                f"while it was in use"
            )
        return found


class Batch:
    """The columns of one Arrow batch; making it reads no tokens."""

    def __init__(self, file: TokenFile, batch: pyarrow.RecordBatch, start: int) -> None:
        """Args: start: address of the first byte of the map that `batch` was read through."""

        def column(name: str) -> _Lists | _Numbers:
            return _column(file, batch.column(name), start)

        self.rows = batch.num_rows
        self.queries = column("query")
        self.query_pooled_from = column("query_pooled_from")
        self.query_lengths = column("query_length")
        self.document_lengths = [column(name).values for name in ("pos_lengths", "neg_lengths")]
        self.positives = _Documents(column("pos"), column("pos_ids"))
        self.negatives = _Documents(column("neg"), column("neg_ids"))
        has_scores = "pos_scores" in batch.schema.names
        self._scores = [column(name) for name in ("pos_scores", "neg_scores")] if has_scores else []

    def scores(self, row: int) -> list[np.ndarray | None]:
        """What a teacher scores the positives and the negatives of one record, float32; twice None without scores."""
        return [scores.item(row) for scores in self._scores] or [None, None]


class _Numbers:
    """A run of numbers in the file."""

    def __init__(self, file: TokenFile, array: pyarrow.Array, start: int) -> None:
        assert array.offset == 0 and array.null_count == 0
        self._file, self.dtype, self.count = file, np.dtype(array.type.to_pandas_dtype()), len(array)
        self._begin = array.buffers()[1].address - start if self.count else 0

    def part(self, begin: int, end: int) -> np.ndarray:
        """Numbers `begin` to before `end`, a read-only array."""
        size = self.dtype.itemsize
        return np.frombuffer(self._file.read(self._begin + begin * size, (end - begin) * size), self.dtype)

    def all(self) -> np.ndarray:
        return self.part(0, self.count)


class _Lists:
    """A list column: where each row begins, and the values of all rows."""

    def __init__(self, file: TokenFile, array: pyarrow.ListArray, start: int) -> None:
        self._offsets = _Numbers(file, array.offsets, start)
        self.values = _column(file, array.values, start)

    def bounds(self, begin: int, end: int) -> list[int]:
        """Where rows `begin` to before `end` begin among the values, and the end."""
        return self._offsets.part(begin, end + 1).tolist()

    def item(self, row: int) -> np.ndarray:
        return self.values.part(*self.bounds(row, row + 1))


class _Documents:
    """The positives or the negatives of one Arrow batch."""

    def __init__(self, texts: _Lists, ids: _Lists) -> None:
        self._texts, self._ids = texts, ids

    def row(self, row: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Token arrays and ids of one record's documents."""
        ends = self._texts.values.bounds(*self._texts.bounds(row, row + 1))
        tokens = self._texts.values.values.part(ends[0], ends[-1])
        bounds = [end - ends[0] for end in ends]
        return [tokens[a:b] for a, b in zip(bounds, bounds[1:], strict=False)], self._ids.item(row)


def _column(file: TokenFile, array: pyarrow.Array, start: int) -> _Lists | _Numbers:
    return (_Lists if isinstance(array, pyarrow.ListArray) else _Numbers)(file, array, start)


def _state(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_ino, found.st_size, found.st_mtime_ns
