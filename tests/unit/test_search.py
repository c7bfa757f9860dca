"""Files to chunks to hits, with an encoder of word counts whose answers can be told by looking."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nvembed_mcore.evaluation.lexical import code_words
from nvembed_mcore.evaluation.search import find_files, search_files, split_file

SOURCE = '''\
"""A module."""
import os

LIMIT = 3


def read_config(path):
    """Parse it."""
    def helper():
        return path
    return helper()


class Queue:
    """First in, first out."""

    @property
    def size(self):
        return len(self.items)

    async def push(self, item):
        self.items.append(item)


try:
    import fast
except ImportError:

    @decorated(
        1,
    )
    def slow_square(x):
        return x * x
'''


class WordEncoder:
    """Cosine of word counts; remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], bool]] = []

    def __call__(self, texts: list[str], is_query: bool) -> torch.Tensor:
        self.calls.append((texts, is_query))
        counts = torch.zeros(len(texts), 512)
        for row, text in enumerate(texts):
            for word in code_words(text):
                counts[row, sum(map(ord, word)) % 512] += 1
        return torch.nn.functional.normalize(counts, dim=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "package" / ".hidden").mkdir(parents=True)
    (tmp_path / "package" / "__pycache__").mkdir()
    (tmp_path / "package" / "module.py").write_text(SOURCE)
    (tmp_path / "package" / "data.bin").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "package" / "notes.md").write_text("# Notes\n\nHow to feed the cat.\n")
    (tmp_path / "package" / ".hidden" / "secret.py").write_text("def secret(): pass\n")
    (tmp_path / "package" / "__pycache__" / "module.py").write_text("def cached(): pass\n")
    return tmp_path


def test_python_is_cut_into_functions_and_classes():
    chunks = split_file(Path("module.py"), SOURCE)
    assert [(chunk.line, chunk.first_line) for chunk in chunks] == [
        (7, "def read_config(path):"),
        (14, "class Queue:"),
        (18, "def size(self):"),
        (21, "async def push(self, item):"),
        (32, "def slow_square(x):"),
    ]
    lines = SOURCE.split("\n")
    assert all(lines[chunk.line - 1].strip() == chunk.first_line for chunk in chunks)
    assert chunks[0].text.endswith("return helper()") and "class" not in chunks[0].text
    assert "async def push" in chunks[1].text
    assert chunks[2].text == "@property\ndef size(self):\n    return len(self.items)"
    assert chunks[4].text == "@decorated(\n    1,\n)\ndef slow_square(x):\n    return x * x"


@pytest.mark.parametrize("text", ["def broken(:\n  some words\n", "print 'two'\n", "x = 1\n", "'\\d'\n"])
def test_python_without_definitions_is_plain_text(text, recwarn):
    chunks = split_file(Path("script.py"), text)
    assert [(chunk.line, chunk.text) for chunk in chunks] == [(1, text.rstrip("\n"))]
    assert not recwarn.list


def test_paragraphs_are_joined_while_they_fit():
    short = ["one " * 100, "two " * 100, "three " * 150]
    text = "\n\n  \n" + "\n\n".join(part.strip() for part in short) + "\n\n"
    chunks = split_file(Path("notes.txt"), text)
    assert [(chunk.line, chunk.first_line[:4]) for chunk in chunks] == [(4, "one "), (8, "thre")]
    assert chunks[0].text == short[0].strip() + "\n\n" + short[1].strip()


def test_a_long_paragraph_is_cut_between_lines_and_nothing_is_lost():
    lines = [f"line {number} " + "x" * 90 for number in range(100)] + ["y" * 5000]
    chunks = split_file(Path("long.txt"), "\n".join(lines))
    assert "\n".join(chunk.text for chunk in chunks) == "\n".join(lines)
    assert all(len(chunk.text) <= 1500 for chunk in chunks[:-1]) and len(chunks[-1].text) == 5000
    assert all(lines[chunk.line - 1] == chunk.first_line for chunk in chunks)


@pytest.mark.parametrize("text", ["", "\n \n\t\n"])
def test_nothing_comes_of_blank_text(text):
    assert split_file(Path("empty.txt"), text) == split_file(Path("empty.py"), text) == []


def test_folders_give_python_files_and_without_any_all_files(folder):
    package = folder / "package"
    assert find_files([folder]) == [package / "module.py"]
    assert find_files([folder], "*.md") == [package / "notes.md"]
    assert find_files([package, package / "module.py", package / "notes.md"]) == [
        package / "module.py",
        package / "notes.md",
    ]
    (package / "module.py").unlink()
    assert find_files([folder]) == [package / "data.bin", package / "notes.md"]


def test_the_best_chunk_comes_first(folder):
    encode = WordEncoder()
    result = search_files(encode, [folder], "square of x that is slow", top_k=2)
    assert [is_query for _, is_query in encode.calls] == [False, True]
    assert encode.calls[1][0] == ["square of x that is slow"]
    assert (len(result.hits), result.num_chunks, result.num_files, result.num_skipped) == (2, 5, 1, 0)
    best = result.hits[0]
    assert list(result) == result.hits
    assert best.score > result.hits[1].score
    path = folder / "package" / "module.py"
    assert str(best) == f"{path}:32  {best.score:.3f}  def slow_square(x):"


def test_binary_files_are_counted(folder):
    (folder / "latin.txt").write_bytes("naïve".encode("latin-1"))
    result = search_files(WordEncoder(), [folder], "cat", pattern="*")
    assert result.num_skipped == 2 and result.num_files == 2
    assert result.hits[0].path.name == "notes.md"


def test_marks_and_line_ends_of_other_systems_are_no_part_of_the_text(tmp_path):
    (tmp_path / "windows.py").write_bytes("\ufeffdef f():\r\n    return 1\r\n\rdef g():\r    pass".encode())
    encode = WordEncoder()
    search_files(encode, [tmp_path], "one")
    assert encode.calls[0][0] == ["def f():\n    return 1", "def g():\n    pass"]


@pytest.mark.parametrize(
    ("names", "query", "options", "message"),
    [
        (["package"], " \n", {}, "query is empty"),
        (["package"], "x", {"top_k": 0}, "top_k must be at least 1, got 0"),
        (["package", "absent.py"], "x", {}, r"no such file or folder: .*absent\.py"),
        (["package/data.bin"], "x", {}, r"no text found in .*data\.bin: 1 files, 1 of them binary"),
        (["package"], "x", {"pattern": "*.rs"}, "no text found in .*package: 0 files"),
        ([], "x", {}, "name at least one file or folder"),
    ],
)
def test_bad_input(folder, names, query, options, message):
    encode = WordEncoder()
    with pytest.raises(ValueError, match=message):
        search_files(encode, [folder / name for name in names], query, **options)
    assert not encode.calls
