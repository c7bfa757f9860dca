"""Texts with ids, read once from any of the usual files and then through a memory map.

A corpus is a folder with `texts.arrow` (an Arrow file with the columns `id` and `text`) and `texts.json` (what it was
made of). Ten million documents take no memory but what the system caches of them.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import logging
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow

from nvembed_mcore import redact
from nvembed_mcore.data.faults import DataError, Fault, Problems, document_text, required_text
from nvembed_mcore.data.files import blocks, hash_of_file, kind_of_file, line_blocks, numbered_lines, rows

_LOG = logging.getLogger(__name__)
_FORMAT = 1
_SCHEMA = pyarrow.schema([("id", pyarrow.large_string()), ("text", pyarrow.large_string())])
# A batch ends at the first of these, so that the memory of the build stays small.
_BATCH_ROWS = 4096
_BATCH_CHARACTERS = 1 << 22
_ID_FIELDS = ("_id", "id")


class Column(Sequence[str]):
    """One column of a corpus: a sequence of strings that lie in a file."""

    def __init__(self, batches: list[pyarrow.RecordBatch], name: str) -> None:
        self._columns = [batch.column(name) for batch in batches]
        self._starts = list(itertools.accumulate((len(column) for column in self._columns), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, place: int) -> str: ...

    @overload
    def __getitem__(self, place: slice) -> list[str]: ...

    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            begin, end, step = place.indices(len(self))
            return [self[index] for index in range(begin, end, step)]
        index = place + len(self) if place < 0 else place
        if not 0 <= index < len(self):
            raise IndexError(f"text {place} of {len(self)}")
        batch = bisect.bisect_right(self._starts, index) - 1
        return self._columns[batch][index - self._starts[batch]].as_py()


@dataclass(frozen=True)
class Corpus:
    """Texts and their ids, in the order of the file.

    Attributes:
        fingerprint: SHA-256 of all ids and texts, as `fingerprint_of`.
        source: the file that they come from.
        blank: rows without any text, which were left out.
    """

    ids: Column
    texts: Column
    fingerprint: str
    source: str
    blank: int

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def build(cls, source: str | Path, folder: str | Path) -> Corpus:
        """Read a file into `folder`, or open what was read from it before.

        Read are the data files of `data.files` (JSON Lines, Parquet, CSV, TSV) with `_id` or `id`, `text` and perhaps
        `title` (a document is title, a space, and text, as BEIR has it), and any other file as UTF-8 lines, whose ids
        are their numbers from 1; text also compressed. It is written aside and renamed. Call it on one process; the
        others `open` the folder.

        Raises:
            DataError: the file is missing, empty or bad, a line of a text file is blank, or an id is used twice; or
                `folder` holds other texts.
        """
        source, folder = Path(source), Path(folder)
        identity = {"format": _FORMAT, "kind": kind_of_file(source), "sha256": hash_of_file(source)}
        description = folder / "texts.json"
        if description.is_file():
            found = read_json(description)
            if any(found.get(key) != value for key, value in identity.items()):
                raise DataError(
                    f"{folder} holds the texts of {found.get('source')} with SHA-256 {found.get('sha256')}, that of "
                    f"{source} is {identity['sha256']}; give another folder"
                )
            return cls.open(folder)
        folder.mkdir(parents=True, exist_ok=True)
        aside = folder / ".writing-texts.arrow"
        try:
            facts = identity | {"source": redact.text(str(source))} | _write(source, aside)
            os.replace(aside, folder / "texts.arrow")
        except BaseException:
            aside.unlink(missing_ok=True)
            if not any(folder.iterdir()):
                folder.rmdir()
            raise
        write_json(description, facts)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: str | Path) -> Corpus:
        """Open a corpus that was built.

        Raises:
            DataError: the folder holds none, or a damaged one.
        """
        folder = Path(folder)
        facts = read_json(folder / "texts.json")
        try:
            reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(folder / "texts.arrow")))
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            opened = cls(
                Column(batches, "id"), Column(batches, "text"), facts["fingerprint"], facts["source"], facts["blank"]
            )
        except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
            raise DataError(f"{folder} holds no complete corpus: {error!r}") from error
        if len(opened) != facts["rows"]:
            raise DataError(f"{folder} holds {len(opened)} texts, its texts.json says {facts['rows']}")
        return opened


def source_file(path: str | Path, *, are_queries: bool) -> Path:
    """The file that a path means: itself, or `queries.jsonl` or `corpus.jsonl` of a BEIR folder."""
    path = Path(path)
    return path / ("queries.jsonl" if are_queries else "corpus.jsonl") if path.is_dir() else path


def fingerprint_of(ids: Sequence[str], texts: Sequence[str]) -> str:
    """SHA-256 of all ids and texts, in order.

    Raises:
        ValueError: a text is blank; the message has its index and id.
    """
    digest = hashlib.sha256()
    for number, (key, text) in enumerate(zip(ids, texts, strict=True)):
        if not text.strip():
            raise ValueError(f"text {number} of {len(texts)}, id {key!r}, is empty: {text!r}")
        _add(digest, key, text)
    return digest.hexdigest()


def _add(digest: Any, key: str, text: str) -> None:
    key_bytes, text_bytes = key.encode(), text.encode()
    digest.update(b"%d %d " % (len(key_bytes), len(text_bytes)))
    digest.update(key_bytes)
    digest.update(text_bytes)


def _write(source: Path, file: Path) -> dict[str, Any]:
    """Write all rows of `source` to an Arrow file; returns what was seen."""
    problems = Problems(source)
    pairs = _id_rows(source, problems) if kind_of_file(source) else _lines(source, problems)
    digest, seen, count, blank = hashlib.sha256(), _Ids(), 0, 0
    ids: list[str] = []
    texts: list[str] = []
    size = 0
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_file(sink, _SCHEMA) as writer:

        def flush() -> None:
            if ids:
                writer.write_batch(pyarrow.record_batch([ids, texts], schema=_SCHEMA))
            ids.clear()
            texts.clear()

        for line, key, text in pairs:
            if not text.strip():
                blank += 1
                continue
            _add(digest, key, text)
            seen.add(key, line)
            ids.append(key)
            texts.append(text)
            count, size = count + 1, size + len(text)
            if len(ids) == _BATCH_ROWS or size >= _BATCH_CHARACTERS:
                flush()
                size = 0
        flush()
    problems.raise_if_too_many()
    if not count:
        raise DataError(f"{source} holds no texts")
    if blank:
        _LOG.warning("%s: %d documents without text were left out", source, blank)
    seen.check(source, file)
    return {"rows": count, "blank": blank, "fingerprint": digest.hexdigest()}


class _Ids:
    """All ids of a file as 8-byte hashes, to find those that occur twice without keeping the strings."""

    def __init__(self) -> None:
        self._hashes, self._lines = array("q"), array("q")

    def add(self, key: str, line: int) -> None:
        self._hashes.append(
            int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)
        )
        self._lines.append(line)

    def check(self, source: Path, file: Path) -> None:
        """Raise a `DataError` for ids that occur twice; `file` holds the rows, since hashes may collide."""
        hashes = np.frombuffer(self._hashes, np.int64)
        order = np.argsort(hashes, kind="stable")
        equal = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        if not len(equal):
            return
        reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(file)))
        ids = Column([reader.get_batch(number) for number in range(reader.num_record_batches)], "id")
        problems = Problems(source)
        pairs = sorted((int(order[place + 1]), int(order[place])) for place in equal)
        for second, first in pairs:
            if ids[first] == ids[second]:
                where = f"the id {ids[second]!r} is used before, in line {self._lines[first]}"
                problems.add(self._lines[second], 1, where)
        problems.raise_if_too_many()


def _id_rows(source: Path, problems: Problems) -> Iterator[tuple[int, str, str]]:
    """Line, id and text of each row."""
    for number, row, column_of in (one for block in blocks(source) for one in rows(block, problems.add)):
        try:
            yield number, _id(row), document_text(row)
        except Fault as fault:
            problems.add(number, column_of(fault.field), fault.reason)


def _id(row: dict[str, Any]) -> str:
    """Numbers count as ids too: what is written without quotes in one file has them in another."""
    name = next((name for name in _ID_FIELDS if row.get(name) is not None), None)
    if name is None:
        raise Fault("neither _id nor id is there")
    if type(row[name]) is int:
        return str(row[name])
    return required_text(row, name)


def _lines(source: Path, problems: Problems) -> Iterator[tuple[int, str, str]]:
    """Number, the same as an id, and text of each line of a UTF-8 file."""
    for number, offset, raw in (line for block in line_blocks(source) for line in numbered_lines(block)):
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            where = f"byte {offset + error.start} of the file is 0x{raw[error.start]:02x}"
            problems.add(number, error.start + 1, f"not UTF-8: {where} ({error.reason})")
            continue
        if text.strip():
            yield number, str(number), text
        else:
            problems.add(number, 1, "the text is empty")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file that `write_json` wrote.

    Raises:
        DataError: it cannot be read, or holds no object.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{file} must hold an object, got {found!r}")
    return found


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write aside and rename."""
    aside = file.with_name(f".writing-{file.name}")
    aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, file)
