"""A code-search set from the Python packages that are installed: docstring -> code (the task of CodeSearchNet).

Nothing is downloaded and nothing imported: the sources of the packages are parsed. The same packages, tokenizer and
arguments give the same bytes.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nvembed_mcore.data import near_duplicates, python_docs_records, python_docs_statistics, python_source
from nvembed_mcore.data.faults import DataError
from nvembed_mcore.data.near_duplicates import first_of_kind, word_parts
from nvembed_mcore.data.python_docs_records import beir_folder, topic_records, topics, training_records
from nvembed_mcore.data.python_docs_statistics import PythonDocsStatistics, Selection, statistics_table
from nvembed_mcore.data.python_source import DocumentedItem, SourceFile, documented_items
from nvembed_mcore.data.tokenizer import tokenizer_fingerprint
from nvembed_mcore.progress import progress, show_each

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["PACKAGES", "PythonDocsStatistics", "build_python_docs", "statistics_table"]

PACKAGES = ("stdlib", "numpy", "torch", "transformers")
TEST_FILES = ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")
TEST_SETS = ("heldout", "heldout_hidden_names")
FILES = ("train.jsonl", "stage2_topics.jsonl", *(f"{folder}/{name}" for folder in TEST_SETS for name in TEST_FILES))
STATISTICS = "statistics.json"


def build_python_docs(
    output_dir: str | Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    packages: Sequence[str] | Mapping[str, str | Path] = PACKAGES,
    held_out: int = 3000,
    seed: int = 0,
    negatives: int = 7,
    max_query_tokens: int = 256,
    max_document_tokens: int = 2048,
    min_topic_members: int = 20,
) -> PythonDocsStatistics:
    """Build the set in `output_dir`, or return the statistics of the same set when it is there already.

    A query is the first paragraph of a docstring, its document the code without any docstring. Near-duplicates are
    dropped by document and by query, over everything and so across training and test. Whole modules are held out.

    Writes `train.jsonl`, `stage2_topics.jsonl` (docstring -> docstring of the same topic, from the training modules),
    `heldout/` and `heldout_hidden_names/` (BEIR format) and `statistics.json`. All of it is written beside the folder
    and renamed when complete; a folder that holds anything else is left as it is.

    Args:
        output_dir: folder to write.
        tokenizer: counts tokens for the two limits and the statistics.
        packages: names of installed packages (`stdlib` is the standard library), or folders of source by name.
        held_out: test queries; whole modules are held out until there are at least so many.
        seed: decides the held-out modules and the negatives.
        negatives: other code of the same module (else folder, else package) that a training record carries.
        max_query_tokens, max_document_tokens: items with a longer query or document are dropped.
        min_topic_members: docstrings a topic needs.

    Raises:
        DataError: a package is not installed, `output_dir` holds another set or something else, or there are too few
            items to hold `held_out` of them out.
    """
    output_dir = Path(output_dir)
    roots = python_source.package_roots(packages)
    arguments = {
        "held_out": held_out,
        "seed": seed,
        "negatives": negatives,
        "max_query_tokens": max_query_tokens,
        "max_document_tokens": max_document_tokens,
        "min_topic_members": min_topic_members,
    }
    # A folder of source has no version, even where a package of its name is installed.
    versions = {n: "" if isinstance(packages, Mapping) else python_source.package_version(n) for n in roots}
    sources = _read_sources(roots)
    fingerprint = _fingerprint(sources, tokenizer, {**arguments, "versions": versions})
    stored = _stored_statistics(output_dir)
    if stored is not None and stored.fingerprint == fingerprint:
        return stored
    _refuse_folder(output_dir, stored, {**arguments, **versions})
    selection = _select(sources, tokenizer, arguments)
    return _write_set(output_dir, selection, fingerprint, arguments, versions)


# ---------------------------------------------------------------------------------------------- items and their split


def _select(
    sources: Sequence[tuple[SourceFile, bytes]],
    tokenizer: PreTrainedTokenizerFast,
    arguments: Mapping[str, int],
) -> Selection:
    """The items that are used, split by module."""
    items, skipped = _extract(sources)
    distinct, dropped = _without_duplicates(items)
    lengths = _token_lengths(distinct, tokenizer)
    fits = (lengths <= [arguments["max_query_tokens"], arguments["max_document_tokens"]]).all(axis=1)
    dropped["too long"] = int((~fits).sum())
    pairs = [(item, length) for item, length, fit in zip(distinct, lengths, fits, strict=True) if fit]
    test_modules = _held_out_modules([item for item, _ in pairs], arguments["held_out"], arguments["seed"])
    counted = Counter(item.package for item in items)
    return Selection(
        documented={package: counted[package] for package in dict.fromkeys(file.package for file, _ in sources)},
        files={"parsed": len(sources) - skipped, "skipped": skipped},
        dropped=dropped,
        train=[(item, length) for item, length in pairs if item.module not in test_modules],
        test=[(item, length) for item, length in pairs if item.module in test_modules],
    )


def _read_sources(roots: Mapping[str, Path]) -> list[tuple[SourceFile, bytes]]:
    files = [file for name, root in roots.items() for file in python_source.source_files(name, root)]
    return [(file, file.path.read_bytes()) for file in files]


def _fingerprint(
    sources: Sequence[tuple[SourceFile, bytes]], tokenizer: PreTrainedTokenizerFast, arguments: dict[str, Any]
) -> str:
    """SHA-256 over all that the set follows from; the program itself is part of it."""
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode())
    digest.update(tokenizer_fingerprint(tokenizer).encode())
    for module in (python_source, near_duplicates, python_docs_records, python_docs_statistics):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    for file, source in sources:
        digest.update(f"{file.module}\0".encode() + hashlib.sha256(source).digest())
    return digest.hexdigest()


def _extract(sources: Sequence[tuple[SourceFile, bytes]]) -> tuple[list[DocumentedItem], int]:
    """All documented items, and the number of files that cannot be decoded or parsed."""
    items: list[DocumentedItem] = []
    skipped = 0
    with _no_garbage_collection(), progress("parse", len(sources), "files") as shown:
        for done, (file, source) in enumerate(sources, 1):
            try:
                items.extend(documented_items(file, source))
            except (SyntaxError, ValueError, RecursionError):
                skipped += 1
            shown.update(done)
    return items, skipped


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Syntax trees are millions of small objects without cycles: looking for cycles among them halves the speed."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _without_duplicates(items: Sequence[DocumentedItem]) -> tuple[list[DocumentedItem], dict[str, int]]:
    """The first of every family of equal or similar items, and how many went for which reason."""
    dropped: dict[str, int] = {}
    seen: set[tuple[str, ...]] = set()
    kept, documents, queries = [], [], []
    for item in show_each(items, "compare", "items"):
        document, query = _words(item.code, item.module), _words(item.query, item.module)
        # The texts too: without the words of their modules equal texts may differ.
        keys = {("document", item.code), ("query", item.query), ("document", *document), ("query", *query)}
        if seen.isdisjoint(keys):
            kept.append(item)
            documents.append(document)
            queries.append(query)
            seen |= keys
    dropped["same document or query"] = len(items) - len(kept)
    keep = first_of_kind(documents, ngram=2, threshold=0.7)
    dropped["similar document"] = int((~keep).sum())
    rows = np.flatnonzero(keep)
    keep = first_of_kind([queries[row] for row in rows], ngram=1, threshold=0.8)
    dropped["similar query"] = int((~keep).sum())
    return [kept[row] for row in rows[keep]], dropped


def _words(text: str, module: str) -> tuple[str, ...]:
    """Words of a text less those in its module's dotted name, unless next to nothing is left.

    So `BertSelfAttention` of `models.bert` and its copy `RobertaSelfAttention` of `models.roberta` compare as equal.
    """
    words = word_parts(text)
    own = set(word_parts(module))
    rest = tuple(word for word in words if word not in own)
    return rest if len(rest) >= 3 else tuple(words)


def _token_lengths(items: Sequence[DocumentedItem], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Tokens of query and document, int64 `[len(items), 2]`, without special tokens."""
    lengths = np.zeros((len(items), 2), dtype=np.int64)
    for start in show_each(range(0, len(items), 1000), "count tokens", "blocks"):
        chunk = items[start : start + 1000]
        for column, texts in enumerate(([item.query for item in chunk], [item.code for item in chunk])):
            ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
            lengths[start : start + len(chunk), column] = [len(row) for row in ids]
    return lengths


def _held_out_modules(items: Sequence[DocumentedItem], held_out: int, seed: int) -> set[str]:
    """Modules in the order of a seeded hash of their names, until they hold at least `held_out` items."""
    sizes = Counter(item.module for item in items)
    chosen: set[str] = set()
    left = held_out
    for module in sorted(sizes, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest()):
        if left <= 0:
            break
        chosen.add(module)
        left -= sizes[module]
    if left > 0 or len(chosen) in (0, len(sizes)):
        raise DataError(
            f"cannot hold out {held_out} queries (at least 1) and keep some to train on: "
            f"there are {len(items)} distinct pairs in {len(sizes)} modules"
        )
    return chosen


# -------------------------------------------------------------------------------------------------------------- files


def _write_set(
    output_dir: Path, selection: Selection, fingerprint: str, arguments: dict[str, int], versions: dict[str, str]
) -> PythonDocsStatistics:
    """Write all files and return the statistics that are one of them."""
    train, test = [item for item, _ in selection.train], [item for item, _ in selection.test]
    by_topic = topics(train, min_members=arguments["min_topic_members"])
    seed = arguments["seed"]
    contents: dict[str, Iterable[dict[str, Any]] | str] = {
        "train.jsonl": training_records(train, negatives=arguments["negatives"], seed=seed),
        "stage2_topics.jsonl": topic_records(by_topic, seed=seed),
    }
    for folder in TEST_SETS:
        files = beir_folder(test, hide_names=folder == "heldout_hidden_names")
        contents.update({f"{folder}/{name}": content for name, content in files.items()})
    with _written_aside(output_dir) as aside:
        rows = {name: _write(aside / name, content) for name, content in contents.items()}
        statistics = PythonDocsStatistics(
            fingerprint=fingerprint,
            arguments=arguments,
            versions=versions,
            heldout_documents=rows["heldout/corpus.jsonl"],
            topics=len(by_topic),
            topic_records=rows["stage2_topics.jsonl"],
            **selection.counts(),
        )
        (aside / STATISTICS).write_text(json.dumps(asdict(statistics), indent=2) + "\n", encoding="utf-8")
    return statistics


def _stored_statistics(output_dir: Path) -> PythonDocsStatistics | None:
    """Statistics of a complete set in the folder."""
    if not all((output_dir / name).is_file() for name in (*FILES, STATISTICS)):
        return None
    try:
        return PythonDocsStatistics(**json.loads((output_dir / STATISTICS).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return None  # not a file of ours


def _refuse_folder(output_dir: Path, stored: PythonDocsStatistics | None, wanted: dict[str, Any]) -> None:
    """Refuse a folder that is in use; the message says how a set in it differs from the one that is wanted."""
    if output_dir.exists() and not output_dir.is_dir():
        raise DataError(f"{output_dir} is a file: give a folder for the set")
    present = sorted(path.name for path in output_dir.iterdir()) if output_dir.is_dir() else []
    if present and stored is None:
        raise DataError(f"{output_dir} holds other files ({', '.join(present[:3])}): give another folder")
    if stored is not None:
        found: dict[str, Any] = {**stored.arguments, **stored.versions}
        names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
        changes = [f"{name} is {found.get(name)}, asked for {wanted.get(name)}" for name in names]
        why = ", ".join(changes) or "the sources, the tokenizer or this program have changed since"
        raise DataError(f"{output_dir} holds another set ({why}): remove it or give another folder")


@contextmanager
def _written_aside(output_dir: Path) -> Iterator[Path]:
    """A folder beside `output_dir` that takes its place at the end, when nothing failed."""
    output_dir = output_dir.resolve()  # a link to a folder stays one
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    aside = output_dir.parent / f".{output_dir.name}.{uuid.uuid4().hex[:8]}"
    aside.mkdir()
    try:
        yield aside
        os.rename(aside, output_dir)  # onto nothing or an empty folder
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(path: Path, content: Iterable[dict[str, Any]] | str) -> int:
    """Write rows as JSON lines, or a text as it is; returns the number of rows or lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        if isinstance(content, str):
            file.write(content)
            return content.count("\n")
        count = 0
        for row in content:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
        return count
