"""Documented functions, methods and classes of Python source files, found by parsing and never by importing."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import io
import os
import platform
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nvembed_mcore.data.faults import DataError

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

_SKIPPED_FOLDERS = {
    "tests",
    "test",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "_bundled",
    "_vendor",
}
_SKIPPED_PREFIXES = (("torch", "testing", "_internal"),)  # torch's own tests, in a folder of another name
_TEST_FILE = re.compile(r"^(test_.*|.*_test|conftest|testing_utils)\.py$")

HIDDEN_NAME = {"function": "some_function", "class": "SomeClass"}


@dataclass(frozen=True)
class SourceFile:
    """One file of a package: its dotted module name (`numpy.linalg._linalg`; `stdlib.` in front of the standard
    library's) and where it lies."""

    package: str
    module: str
    path: Path


@dataclass(frozen=True)
class DocumentedItem:
    """A function, method or class and what its docstring says."""

    package: str
    module: str
    qualified_name: str
    """Dotted name inside the module, `Class.method`."""
    kind: str
    """`function` (also methods) or `class`."""
    query: str
    """First paragraph of the docstring in plain words."""
    code: str
    """The definition without any docstring, its own or an inner one's; dedented, with its signature."""

    @property
    def code_without_name(self) -> str:
        """The code with the item's own name replaced by a neutral one wherever it stands as a whole word."""
        name = re.escape(self.qualified_name.rpartition(".")[2])
        return re.sub(rf"(?<!\w){name}(?!\w)", HIDDEN_NAME[self.kind], self.code)


# ---------------------------------------------------------------------------------------------------------- files


def package_roots(packages: Sequence[str] | Mapping[str, str | Path]) -> dict[str, Path]:
    """Folder of each package's source, by name. `stdlib` is the standard library; a mapping gives folders itself.

    Raises:
        DataError: a package is not installed, or its source is no folder.
    """
    if isinstance(packages, Mapping):
        roots = {name: Path(path) for name, path in packages.items()}
    else:
        roots = {name: _installed_root(name) for name in packages}
    for name, root in roots.items():
        if not root.is_dir():
            raise DataError(f"package {name!r}: no source folder at {root}")
    return roots


def _installed_root(name: str) -> Path:
    if name == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(name.partition(".")[0])  # of a top-level name: finds, does not import
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"package {name!r} is not installed as a folder of Python source")
    return Path(next(iter(spec.submodule_search_locations))).joinpath(*name.split(".")[1:])


def package_version(name: str) -> str:
    """Version of an installed package (Python's own for `stdlib`); empty when it has none."""
    if name == "stdlib":
        return platform.python_version()
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def source_files(package: str, root: Path) -> list[SourceFile]:
    """Python files under `root` in a fixed order, without tests, bundled copies and other packages inside it."""
    paths: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]  # never entered
        paths += [Path(folder, name) for name in names if name.endswith(".py") and not _TEST_FILE.match(name)]
    files = []
    for path in sorted(paths, key=lambda path: path.relative_to(root).parts):
        parts = path.relative_to(root).parts
        dotted = (package, *parts[:-1], *([] if path.stem == "__init__" else [path.stem]))
        if not any(dotted[: len(prefix)] == prefix for prefix in _SKIPPED_PREFIXES):
            files.append(SourceFile(package, ".".join(dotted), path))
    return files


# ---------------------------------------------------------------------------------------------------------- items


def documented_items(file: SourceFile, source: bytes) -> Iterator[DocumentedItem]:
    """The documented items of one file, in the order of its text. Functions inside functions are part of those.

    Left out: items without code of their own (`pass`, `...`, `raise NotImplementedError`) and those whose docstring
    has no first paragraph of at least three words.

    Raises:
        SyntaxError, ValueError (with UnicodeDecodeError), RecursionError: the file cannot be decoded or parsed.
    """
    text = _decode(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(text)
    lines = [line.encode("utf-8") for line in text.split("\n")]  # ast counts columns in bytes of UTF-8
    for name, node in _definitions(tree, ""):
        docstring = ast.get_docstring(node)
        if docstring is None or not _has_code(node):
            continue
        query = first_paragraph(docstring, node.name)
        if query is not None:
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            yield DocumentedItem(file.package, file.module, name, kind, query, _code_without_docstrings(node, lines))


def _decode(source: bytes) -> str:
    """Text of a source file with its declared encoding (PEP 263) and `\\n` as its only line end."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
    return source.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def _definitions(parent: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    """Functions and classes of a module or class, also those under `if`, `try` and `with`."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, Definition):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _definitions(node, prefix)


def _docstring(node: ast.AST) -> ast.Expr | None:
    """The statement that is the docstring of a definition."""
    if isinstance(node, Definition) and isinstance(node.body[0], ast.Expr):
        value = node.body[0].value
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            return node.body[0]
    return None


def _has_code(node: Definition) -> bool:
    def is_code(statement: ast.stmt) -> bool:
        if isinstance(statement, ast.Raise):
            return "NotImplementedError" not in ast.dump(statement)
        constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        return not constant and not isinstance(statement, ast.Pass)

    return any(is_code(statement) for statement in node.body)


def _code_without_docstrings(node: Definition, lines: list[bytes]) -> str:
    """Source text of a definition less the docstrings in it and the decorators that carry documentation."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    kept: list[bytes | None] = list(lines[first - 1 : node.end_lineno])
    kept[-1] = lines[node.end_lineno - 1][: node.end_col_offset]
    for inner in ast.walk(node):
        if not isinstance(inner, Definition):
            continue
        for decorator in filter(_is_documentation, inner.decorator_list):
            for row in range(decorator.lineno - first, decorator.end_lineno - first + 1):
                kept[row] = None
        docstring = _docstring(inner)
        if docstring is not None:
            _remove(docstring, kept, first, b"..." if len(inner.body) == 1 else b"")
    code = b"\n".join(line for line in kept if line is not None).decode("utf-8")
    return inspect.cleandoc("\n" + code).replace("\x0c", "")  # dedents, and drops blank lines at both ends


def _remove(docstring: ast.Expr, kept: list[bytes | None], first: int, replacement: bytes) -> None:
    """Take a docstring out of the lines of a definition; a line on which nothing is left goes too."""
    start, end = docstring.lineno - first, docstring.end_lineno - first
    before = (kept[start] or b"")[: docstring.col_offset]
    after = (kept[end] or b"")[docstring.end_col_offset :].lstrip(b" \t;")
    for row in range(start, end + 1):
        kept[row] = None
    rest = before + replacement + after
    if rest.strip():
        kept[start] = rest
    elif end + 1 < len(kept) and kept[end + 1] is not None and not kept[end + 1].strip():
        kept[end + 1] = None  # the blank line that set the docstring apart


def _is_documentation(decorator: ast.expr) -> bool:
    """Whether a decorator holds prose: `@auto_docstring(custom_intro="...")` would tell what the docstring tells."""
    texts = (node.value for node in ast.walk(decorator) if isinstance(node, ast.Constant))
    return any(isinstance(text, str) and len(text.split()) >= 4 for text in texts)


# -------------------------------------------------------------------------------------------------------- queries

_SECTION = re.compile(
    r"\s*((args|arguments|parameters|params|keyword arguments|kwargs)\s*:.*"
    r"|(args|arguments|parameters|returns?|yields?|raises|examples?|notes?|usage|inputs?|outputs?|attributes"
    r"|warnings?|see also|references|shape)\s*:*"
    r"|\w+ \(.*\)\s*:.*|[-=~*#+]{3,}"
    r"|(>>>|\.\. |```|:(param|returns?|rtype|type|raises|arg|keyword)\b|[@\\]param).*)\s*",
    re.IGNORECASE,
)
_MARKUP = [
    (re.compile(r":[\w:+-]+:`[~!]?([^`<]*?)\s*(?:<[^>`]*>)?`"), r"\1"),  # :class:`~a.B`
    (re.compile(r"`([^`<]+?)\s*<[^>`]*>`_{0,2}"), r"\1"),  # `text <link>`_
    (re.compile(r"\[([^\]]+)\]\(\s*https?:[^)]*\)"), r"\1"),  # [text](link)
    (re.compile(r"\[`~?([^`\]]+)`\]"), r"\1"),  # [`Name`]
    (re.compile(r"\(?https?://\S+"), ""),
    (re.compile(r"`+_{0,2}|\*\*|\|(?=\w)|(?<=\w)\|"), ""),
    (re.compile(r"\s+"), " "),
]
_WORD = re.compile(r"[^\W\d_]{2,}")


def first_paragraph(docstring: str, name: str) -> str | None:
    """The first paragraph of the docstring of `name` as plain text, or None when it has fewer than three words.

    A paragraph that only repeats the signature is passed over; lists of arguments, doctests and directives end the
    paragraph; reST and Markdown markup is taken off.
    """
    for paragraph in re.split(r"\n\s*\n", docstring.strip()):
        lines = []
        for line in paragraph.split("\n"):
            if _SECTION.fullmatch(line):
                break
            lines.append(line)
        if re.match(rf"\s*(\w+\.)*{re.escape(name)}\s*\(", paragraph):  # `sum(input, dim) -> Tensor`
            signature = re.match(r".*?\)\s*(->[^.\n]*|:)?$", "\n".join(lines), re.DOTALL)
            if signature is not None:
                continue
        # A docstring's escapes may give control characters, or surrogates that no file can hold.
        text = "".join(letter if letter.isprintable() else " " for letter in "\n".join(lines))
        for pattern, replacement in _MARKUP:
            text = pattern.sub(replacement, text)
        text = text.strip()
        return text if len(_WORD.findall(text)) >= 3 else None
    return None
