"""What a data check must find, in plain Python over texts: no hashes, no parts, no blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nvembed_mcore.data.records import content_id

Rows = list[dict[str, Any]]
Place = tuple[int, int]


def documents(row: dict[str, Any], name: str) -> Iterator[tuple[str, str]]:
    """Text and id of each."""
    texts = row.get(name) or []
    yield from zip(texts, row.get(f"{name}_ids") or map(content_id, texts), strict=True)


def counts(rows: Rows) -> dict[str, int]:
    texts = {name: [text for row in rows for text, _ in documents(row, name)] for name in ("pos", "neg")}
    return {
        "records": len(rows),
        "distinct_queries": len({row["query"] for row in rows}),
        "positives": len(texts["pos"]),
        "negatives": len(texts["neg"]),
        "distinct_documents": len({*texts["pos"], *texts["neg"]}),
        "records_without_negatives": sum(not row.get("neg") for row in rows),
    }


def faults(rows: Rows) -> dict[str, list[Place]]:
    """Kind -> (record, the other record) of each time it is there, in order; kinds that are not there are left out."""
    found = {
        "repeated_queries": _again((number, row["query"]) for number, row in enumerate(rows)),
        "repeated_pairs": _again(
            (number, (row["query"], text)) for number, row in enumerate(rows) for text, _ in documents(row, "pos")
        ),
        "own_positives": [],
        "false_negatives": [],
        "several_ids": _several(rows, by_id=False),
        "several_texts": _several(rows, by_id=True),
    }
    positives: dict[tuple[str, str], int] = {}
    for number, row in enumerate(rows):
        for text, _ in documents(row, "pos"):
            positives.setdefault((row["query"], text), number)
    for number, row in enumerate(rows):
        own = {name for document in documents(row, "pos") for name in document}
        for text, name in documents(row, "neg"):
            if text in own or name in own:
                found["own_positives"].append((number, number))
            elif (row["query"], text) in positives:
                found["false_negatives"].append((number, positives[row["query"], text]))
    return {kind: sorted(places) for kind, places in found.items() if places}


def _again(items: Iterator[tuple[int, Any]]) -> list[Place]:
    first: dict[Any, int] = {}
    found = []
    for number, key in items:
        if key in first:
            found.append((number, first[key]))
        first.setdefault(key, number)
    return found


def _several(rows: Rows, *, by_id: bool) -> list[Place]:
    values: dict[str, dict[str, int]] = {}
    for number, row in enumerate(rows):
        for name in ("pos", "neg"):
            for text, key in documents(row, name):
                one, other = (key, text) if by_id else (text, key)
                values.setdefault(one, {}).setdefault(other, number)
    firsts = [sorted(some.values()) for some in values.values() if len(some) > 1]
    return [(second, first) for first, second, *_ in firsts]
