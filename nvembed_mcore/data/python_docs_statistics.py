"""What a code-search set holds, as numbers and as a table for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nvembed_mcore.data.python_source import DocumentedItem

if TYPE_CHECKING:
    from rich.table import Table

Pairs = Sequence[tuple[DocumentedItem, np.ndarray]]
"""Items with the tokens of query and document, int64 `[2]`."""


@dataclass(frozen=True, kw_only=True)
class PythonDocsStatistics:
    """What was built. Tokens are counted without special tokens and without an instruction."""

    fingerprint: str
    """SHA-256 of everything the set follows from: sources, tokenizer, arguments and this program."""
    arguments: dict[str, int]
    """Numbers the set was built with."""
    versions: dict[str, str]
    """Version of each package."""
    files: dict[str, int]
    """`parsed`: source files read; `skipped`: those that are not Python of this version or cannot be decoded."""
    documented: int
    """Items with a docstring and code, before anything is dropped."""
    dropped: dict[str, int]
    """Items left out, by reason."""
    train_pairs: int
    heldout_queries: int
    heldout_documents: int
    topics: int
    """Classes of the second set."""
    topic_records: int
    packages: dict[str, dict[str, int]]
    """For each package: `documented`, `train` and `heldout`."""
    modules: dict[str, int]
    """Modules in `train` and in `heldout`; none is in both."""
    tokens: dict[str, dict[str, int]]
    """`train query`, `train document`, `heldout query`, `heldout document`: p50, p90, p99, max and sum."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The items of a set and what was left out on the way."""

    documented: Mapping[str, int]
    """Items with a docstring and code, by package."""
    files: dict[str, int]
    dropped: dict[str, int]
    train: Pairs
    test: Pairs

    def counts(self) -> dict[str, Any]:
        """The fields of `PythonDocsStatistics` that follow from the items."""
        trained = Counter(item.package for item, _ in self.train)
        tested = Counter(item.package for item, _ in self.test)
        return {
            "files": self.files,
            "documented": sum(self.documented.values()),
            "dropped": self.dropped,
            "train_pairs": len(self.train),
            "heldout_queries": len(self.test),
            "packages": {
                name: {"documented": count, "train": trained[name], "heldout": tested[name]}
                for name, count in self.documented.items()
            },
            "modules": {
                "train": len({item.module for item, _ in self.train}),
                "heldout": len({item.module for item, _ in self.test}),
            },
            "tokens": {**_token_statistics("train", self.train), **_token_statistics("heldout", self.test)},
        }


def statistics_table(statistics: PythonDocsStatistics) -> Table:
    """The statistics as a table for the terminal."""
    from rich.table import Table

    table = Table(title="Python docs: docstring -> code", title_justify="left")
    table.add_column("")
    for column in ("training", "held out"):
        table.add_column(column, justify="right")
    table.add_row("pairs", f"{statistics.train_pairs:,}", f"{statistics.heldout_queries:,}")
    table.add_row("modules", f"{statistics.modules['train']:,}", f"{statistics.modules['heldout']:,}")
    topic_text = f"{statistics.topic_records:,} of {statistics.topics} topics"
    table.add_row("topic records", topic_text, "", end_section=True)
    for name, counts in statistics.packages.items():
        label = f"{name} {statistics.versions.get(name, '')}".strip()
        table.add_row(label, f"{counts['train']:,}", f"{counts['heldout']:,}")
    table.add_section()
    for side in ("query", "document"):
        train, test = statistics.tokens[f"train {side}"], statistics.tokens[f"heldout {side}"]
        for key in ("p50", "p90", "p99", "max"):
            table.add_row(f"{side} tokens {key}", f"{train[key]:,}", f"{test[key]:,}")
    table.add_section()
    table.add_row("documented items", f"{statistics.documented:,}", "")
    for reason, count in statistics.dropped.items():
        table.add_row(f"dropped: {reason}", f"{count:,}", "")
    files = f"{statistics.files['parsed']:,} parsed, {statistics.files['skipped']} skipped"
    table.add_row("source files", files, "")
    return table


def _token_statistics(part: str, pairs: Pairs) -> dict[str, dict[str, int]]:
    result = {}
    lengths = np.array([length for _, length in pairs]).reshape(-1, 2)
    for side, column in zip(("query", "document"), lengths.T, strict=True):
        p50, p90, p99, top = (int(np.percentile(column, q)) if len(column) else 0 for q in (50, 90, 99, 100))
        result[f"{part} {side}"] = {"p50": p50, "p90": p90, "p99": p99, "max": top, "sum": int(column.sum())}
    return result
