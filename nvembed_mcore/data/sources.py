"""What the path of a data set is: a file, a folder, or the name of one that the `datasets` library loads.

    a file               of a kind that `files` lists
    a folder             of such files of one kind, read in the order of their names; `corpus.*` in it are no records
    a BEIR folder        corpus.jsonl, queries.jsonl and qrels/train.tsv (`beir`)
    a saved data set     a folder that `datasets` wrote (`save_to_disk`); of several splits `train`
    hf:NAME[:CONFIG[:SPLIT]]

The last is a name on the Hugging Face hub, or a local folder, for `datasets.load_dataset`; `train` if SPLIT is not
named. Nothing of it is run: only data files are loaded, and a name is looked up because it was given.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvembed_mcore import paths
from nvembed_mcore.data import files
from nvembed_mcore.data.beir import beir_blocks, beir_files, read_texts
from nvembed_mcore.data.faults import DataError, Fault, document_text
from nvembed_mcore.data.files import Block, arrow_blocks, hash_of_file, kind_of_file, rows
from nvembed_mcore.data.layouts import Layout, UnknownLayout, find_layout

if TYPE_CHECKING:
    import datasets

_HUB = "hf:"
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
_ROWS_LOOKED_AT = 10
_SPLIT = re.compile(r"(?<![a-z])(train|validation|valid|val|dev|test|eval)(?![a-z])")


def blocks(path: str | Path) -> Iterator[Block]:
    """The rows of a data set as blocks, in order, each with the layout of its records.

    The layout is that of the first row that has a known one; rows of another are bad lines of `records.parse_block`.

    Raises:
        DataError: the data set is missing, cannot be read, or is of an unknown kind or layout.
    """
    if is_loaded(path):
        return _loaded_blocks(path)
    if _is_beir(Path(path)):
        return beir_blocks(Path(path))
    return _file_blocks(Path(path))


def source_fingerprint(path: str | Path) -> str:
    """What a data set holds, in 64 hex digits of SHA-256; where it lies does not matter.

    Of a file it is the hash of its bytes; of a folder that of the names and hashes of all files that are read, a
    corpus of document ids included; of what `datasets` loads that of the Arrow files that it made.

    Raises:
        DataError: as `blocks`.
    """
    if is_loaded(path):
        source = _load(path)
        return _hash_of_all([(str(index), Path(one["filename"])) for index, one in enumerate(source.cache_files)])
    path = Path(path)
    if _is_beir(path):
        return _hash_of_all([(str(one.relative_to(path)), one) for one in beir_files(path, "train")])
    read = data_files(path)
    if _layout(path).kind == "document ids":
        read = read + _corpus_files(path)
    if len(read) == 1 and not path.is_dir():
        return hash_of_file(path)
    folder = path if path.is_dir() else path.parent
    return _hash_of_all([(str(one.relative_to(folder)), one) for one in read])


def data_files(path: Path) -> list[Path]:
    """The files of records of a file (itself) or a folder, by their names.

    Raises:
        DataError: a folder holds none, or files of several kinds or splits.
    """
    if not path.is_dir():
        return [path]
    found = [one for one in sorted(path.iterdir()) if _is_data(one) and not one.name.startswith("corpus.")]
    if not found:
        raise DataError(f"{path} holds no data file, nor BEIR's files, nor what datasets wrote")
    for what, part in (("kinds", kind_of_file), ("splits", _split)):
        parts = {part(one): one.name for one in found}
        if len(parts) > 1:
            names = ", ".join(sorted(parts.values()))
            raise DataError(
                f"{path} holds files of several {what} ({names}): name one file, or a folder of one of them"
            )
    return found


def is_loaded(path: str | Path) -> bool:
    """Whether it is for `datasets` to load: a name after `hf:`, or a folder that it wrote."""
    return str(path).startswith(_HUB) or any((Path(path) / name).is_file() for name in (_SAVED, _SAVED_SPLITS))


def _is_beir(path: Path) -> bool:
    return all(one.is_file() for one in beir_files(path, "train")[:2])


def _is_data(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".") and kind_of_file(path) is not None


def _split(path: Path) -> str:
    """The split that a file's name has as a word, if it does."""
    match = _SPLIT.search(path.name.lower())
    return match[1] if match else ""


def _columns_of_records(names: Sequence[str]) -> list[str]:
    """Of a table's columns those to read; all where no layout is known, which its first row will tell."""
    try:
        return find_layout(names).columns(names)
    except Fault:
        return list(names)


def _read(path: Path) -> Iterator[Block]:
    """The blocks of a file or of a folder's files."""
    return chain.from_iterable(files.blocks(one, _columns_of_records) for one in data_files(path))


def _layout(path: Path) -> Layout:
    """The layout of the first row that has one, if it is among the first rows; of a file without any row no matter."""
    unknown: list[DataError] = []
    for block in _read(path):
        for line, row, column_of in rows(block, lambda line, column, reason: None):
            try:
                return find_layout(row)
            except Fault as fault:
                error = DataError(f"{block.path}:{line}:{column_of(fault.field)}: {fault.reason}")
                if not isinstance(fault, UnknownLayout):
                    raise error from fault
                unknown.append(error)
            if len(unknown) == _ROWS_LOOKED_AT:
                raise unknown[0]
    if unknown:
        raise unknown[0]
    return find_layout(("query", "pos"))


def _file_blocks(path: Path) -> Iterator[Block]:
    """Blocks of files; of rows that name documents by id, with the texts of those that a block names."""
    layout = _layout(path)
    found = (replace(block, layout=layout) for block in _read(path))
    if layout.kind != "document ids":
        yield from found
        return
    wanted = {name for block in found for name in _ids_named(block)}
    texts: dict[str, str] = {}
    for corpus in _corpus_files(path):
        texts.update((key, text) for _, key, text in read_texts(corpus, document_text, wanted, "docid"))
    for block in _read(path):
        block = replace(block, layout=layout)
        yield replace(block, documents={key: texts[key] for key in _ids_named(block) & texts.keys()})


def _ids_named(block: Block) -> set[str]:
    """The ids of documents that the rows of a block name; what is wrong with a row is found when it is parsed."""
    found = rows(block, lambda line, column, reason: None)
    return {name for _, row, _ in found for name in block.layout.document_ids(row)}


def _corpus_files(path: Path) -> list[Path]:
    folder = path if path.is_dir() else path.parent
    found = [one for one in sorted(folder.glob("corpus.*")) if _is_data(one)]
    if not found:
        raise DataError(f"{path} names documents by id, and there is no corpus.jsonl (or .parquet, ...) in {folder}")
    return found


def _loaded_blocks(path: str | Path) -> Iterator[Block]:
    """Blocks of what the `datasets` library loads; a row's line is its number from 1."""
    source = _load(path)
    columns, first = tuple(source.column_names), 1
    try:
        layout = find_layout(columns)
    except Fault as fault:
        raise DataError(f"{path}: {fault.reason}") from fault
    if layout.kind == "document ids":
        raise DataError(f"{path} names documents by id: save it as a file beside a corpus.jsonl (or .parquet, ...)")
    rows_of_records = source.select_columns(layout.columns(columns)).with_format("arrow")
    for table in rows_of_records.iter(batch_size=files.BLOCK_ROWS):
        for batch in table.combine_chunks().to_batches():
            for block in arrow_blocks(str(path), first, columns, batch):
                yield replace(block, layout=layout)
            first += batch.num_rows


def _load(path: str | Path) -> datasets.Dataset:
    """One split of what the `datasets` library loads."""
    import datasets
    import pyarrow

    name, config, split, *more = [*str(path).removeprefix(_HUB).split(":"), "", ""]
    if any(more[:-2]) or not name:
        raise DataError(f"{path}: not hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    try:
        if str(path).startswith(_HUB):
            loaded = datasets.load_dataset(name, config or None, keep_in_memory=False)
        else:
            _check_saved(Path(path))
            loaded = datasets.load_from_disk(str(path), keep_in_memory=False)
    # It says with a RuntimeError that it runs no scripts.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot load {path} with datasets: {error}") from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    wanted = split or (next(iter(loaded)) if len(loaded) == 1 else "train")
    if wanted not in loaded:
        raise DataError(f"{path} has no split {wanted!r} but {', '.join(loaded)}: name one as hf:NAME:CONFIG:SPLIT")
    return loaded[wanted]


def _check_saved(folder: Path) -> None:
    """Raise a `DataError` where what `datasets` saved names files or folders outside of it."""
    file, folders = folder / _SAVED_SPLITS, [folder]
    if file.is_file():
        folders = [paths.member(folder, name, file, DataError) for name in _listed(file, "splits")]
    for one in folders:
        state = one / _SAVED
        for entry in _listed(state, "_data_files"):
            name = entry.get("filename") if isinstance(entry, dict) else entry
            paths.member(one, name, state, DataError)


def _listed(file: Path, key: str) -> list[Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read {file}: {error!r}") from error
    if not isinstance(found, list):
        raise DataError(f"{file}: {key} must be a list, got {found!r}")
    return found


def _hash_of_all(named: Sequence[tuple[str, Path]]) -> str:
    text = "".join(f"{name}\0{hash_of_file(path)}\n" for name, path in named)
    return hashlib.sha256(text.encode()).hexdigest()
