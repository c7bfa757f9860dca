"""Search in files by meaning: files -> chunks -> embeddings -> the best hits.

Python files are cut into functions and classes by parsing (nothing of them is run), other text into paragraphs.
"""

from __future__ import annotations

import ast
import os
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from torch import Tensor

from nvembed_mcore.evaluation.retrieval import search

# A chunk of plain text has at most so many characters (about 400 tokens), unless one line alone is longer.
_CHUNK_CHARACTERS = 1500
_SNIFFED_BYTES = 8192


@dataclass(frozen=True)
class Chunk:
    """A piece of a file that is found as a whole."""

    path: Path
    line: int
    """Where it begins, from 1; of a decorated function, the line with `def`."""
    first_line: str
    """That line, without indentation."""
    text: str
    """What is encoded."""


@dataclass(frozen=True)
class Hit:
    """A chunk and how well it fits; as a string, the line to print."""

    path: Path
    line: int
    score: float
    """Cosine with the query."""
    first_line: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}  {self.score:.3f}  {self.first_line}"


@dataclass(frozen=True)
class SearchResult:
    """The best hits, best first, and what was searched. Iterating gives the hits."""

    hits: list[Hit]
    num_chunks: int
    num_files: int
    """Files with text."""
    num_skipped: int
    """Files that are not UTF-8 text."""

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)


def search_files(
    encode: Callable[[list[str], bool], Tensor],
    paths: Sequence[str | Path],
    query: str,
    *,
    top_k: int = 10,
    pattern: str | None = None,
) -> SearchResult:
    """The chunks of files whose embeddings are nearest to the query's.

    Args:
        encode: `encode(texts, is_query)` -> [len(texts), D], L2-normalised; called once with all chunks and once
            with the query.
        paths: files, and folders that are walked.
        query: what to look for.
        top_k: hits that are returned at most.
        pattern: names of files to take from folders, for example `*.md`; None takes `*.py`, or all text files of a
            folder that has no Python file. Files that are named in `paths` are always taken.

    Raises:
        ValueError: the query or `paths` is empty, `top_k` is below 1, a path does not exist, or no file has text.
    """
    if not query.strip():
        raise ValueError("the query is empty")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if not paths:
        raise ValueError("name at least one file or folder to search")
    files = find_files(paths, pattern)
    chunks: list[Chunk] = []
    num_skipped = num_files = 0
    for path in files:
        text = read_text(path)
        if text is None:
            num_skipped += 1
            continue
        pieces = split_file(path, text)
        num_files += bool(pieces)
        chunks += pieces
    if not chunks:
        where = ", ".join(map(str, paths))
        raise ValueError(f"no text found in {where}: {len(files)} files, {num_skipped} of them binary")
    embeddings = encode([chunk.text for chunk in chunks], False)
    scores, indices = search(encode([query], True), embeddings, top_k)
    best = [(chunks[index], score) for index, score in zip(indices[0].tolist(), scores[0].tolist(), strict=True)]
    hits = [Hit(chunk.path, chunk.line, score, chunk.first_line) for chunk, score in best]
    return SearchResult(hits, len(chunks), num_files, num_skipped)


def find_files(paths: Sequence[str | Path], pattern: str | None = None) -> list[Path]:
    """The files that `paths` name, each once, in order; see `search_files` for `pattern`.

    Raises:
        ValueError: a path does not exist.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            found.update(dict.fromkeys(_files_of(path, pattern)))
        elif path.is_file():
            found[path] = None
        else:
            raise ValueError(f"no such file or folder: {path}")
    return list(found)


def _files_of(folder: Path, pattern: str | None) -> list[Path]:
    """Files below a folder, sorted; hidden ones, links to folders and Python's caches are left out."""
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        files += [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
    files = [path for path in files if path.is_file()]
    if pattern is not None:
        return [path for path in files if fnmatch(path.name, pattern)]
    return [path for path in files if path.suffix == ".py"] or files


def read_text(path: Path) -> str | None:
    """The text of a UTF-8 file, or None when it is binary or in another encoding.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_SNIFFED_BYTES)
            if b"\0" in content:
                return None
            content += file.read()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    # Python counts all three kinds of line ends, so line numbers fit only when there is one kind.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def split_file(path: Path, text: str) -> list[Chunk]:
    """Chunks of one file: functions and classes of a Python file that has any, paragraphs of anything else."""
    if path.suffix == ".py":
        chunks = _split_python(path, text)
        if chunks:
            return chunks
    return _split_paragraphs(path, text)


def _split_python(path: Path, text: str) -> list[Chunk]:
    """One chunk a function, method or class; none when the text is not Python of this version.

    A class is a chunk of its own with all its methods; a function inside a function belongs to the outer one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in the strings of other people's files
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    lines = text.split("\n")
    chunks = []
    for node in _definitions(tree):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        source = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno]))
        chunks.append(Chunk(path, node.lineno, lines[node.lineno - 1].strip(), source))
    return chunks


def _definitions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Functions and classes in order of appearance, also those under `if` and `try`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield child
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.expr)):
            yield from _definitions(child)


def _split_paragraphs(path: Path, text: str) -> list[Chunk]:
    """Chunks of whole paragraphs as long as they fit; a paragraph that is too long is cut between lines."""
    chunks: list[Chunk] = []
    taken: list[tuple[int, str]] = []

    def close() -> None:
        while taken and not taken[-1][1].strip():
            taken.pop()
        if taken:
            body = "\n".join(line for _, line in taken)
            chunks.append(Chunk(path, taken[0][0], taken[0][1].strip(), body))
        taken.clear()

    for paragraph in _paragraphs(text):
        if _size(taken) + _size(paragraph) > _CHUNK_CHARACTERS:
            close()
        for numbered in paragraph:
            if _size(taken) + _size([numbered]) > _CHUNK_CHARACTERS:
                close()
            if taken or numbered[1].strip():
                taken.append(numbered)
    close()
    return chunks


def _paragraphs(text: str) -> Iterator[list[tuple[int, str]]]:
    """Numbered lines up to and including the blank line behind them."""
    paragraph: list[tuple[int, str]] = []
    for number, line in enumerate(text.split("\n"), 1):
        paragraph.append((number, line))
        if not line.strip():
            yield paragraph
            paragraph = []
    if paragraph:
        yield paragraph


def _size(lines: list[tuple[int, str]]) -> int:
    return sum(len(line) + 1 for _, line in lines)
