"""What is written of a code-search set: training records, topic records and test sets in BEIR format.

Everything is a pure function of the items and a seed; each record draws from a generator of its own, so a record does
not change when others come or go.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from nvembed_mcore.data.python_source import DocumentedItem
from nvembed_mcore.data.records import content_id

Record = dict[str, Any]

TOPIC_NEGATIVES = 7  # as many as NV-Embed has per query


def training_records(items: Sequence[DocumentedItem], *, negatives: int, seed: int) -> Iterator[Record]:
    """One record (query, pos, neg, query_id, pos_ids, neg_ids) an item, in their order.

    Negatives are other code of the same file; where that is too small, of the same folder, then of the package. A
    class is never a negative of its own methods nor they of it: its text holds theirs.
    """
    groups: dict[tuple[str, str], list[DocumentedItem]] = defaultdict(list)
    for item in items:
        for key in _neighbourhoods(item):
            groups[key].append(item)
    for item in items:
        own = content_id(item.query)
        rng = random.Random(f"{seed}/negatives/{own}")
        chosen: list[DocumentedItem] = []
        for key in _neighbourhoods(item):
            if len(chosen) < negatives:
                fresh = [other for other in groups[key] if not _overlap(item, other) and other not in chosen]
                chosen += rng.sample(fresh, min(negatives - len(chosen), len(fresh)))
        yield {
            "query": item.query,
            "pos": [item.code],
            "neg": [other.code for other in chosen],
            "query_id": own,
            "pos_ids": [content_id(item.code)],
            "neg_ids": [content_id(other.code) for other in chosen],
        }


def _neighbourhoods(item: DocumentedItem) -> list[tuple[str, str]]:
    """Groups an item belongs to, the closest first."""
    folder = item.module.rpartition(".")[0] or item.module
    return [("module", item.module), ("folder", folder), ("package", item.package)]


def _overlap(one: DocumentedItem, other: DocumentedItem) -> bool:
    """Whether one is the other or holds it."""
    if one.module != other.module:
        return False
    return _is_within(one.qualified_name, other.qualified_name) or _is_within(other.qualified_name, one.qualified_name)


def _is_within(dotted: str, outer: str) -> bool:
    return dotted == outer or dotted.startswith(outer + ".")


def topics(items: Sequence[DocumentedItem], *, min_members: int) -> dict[str, list[DocumentedItem]]:
    """Items by topic: the first three parts of the module's dotted name (`torch.nn.modules`), where that group is too
    small the first two (`torch.nn`, `stdlib.asyncio`). Items whose groups are all too small have no topic."""
    result: dict[str, list[DocumentedItem]] = {}
    left = list(items)
    for depth in (3, 2):
        groups: dict[str, list[DocumentedItem]] = defaultdict(list)
        for item in left:
            parts = item.module.split(".")
            if len(parts) >= depth:
                groups[".".join(parts[:depth])].append(item)
        found = {topic: members for topic, members in groups.items() if len(members) >= min_members}
        result.update(found)
        taken = {id(item) for members in found.values() for item in members}
        left = [item for item in left if id(item) not in taken]
    return dict(sorted(result.items()))


def topic_records(members: dict[str, list[DocumentedItem]], *, seed: int) -> Iterator[Record]:
    """One record a docstring, in NV-Embed's example-based form (paper section 4.2): `pos` is another docstring of the
    topic, `neg` are docstrings of other topics. Topics of which one is part of the other (`torch.nn` and
    `torch.nn.modules`) give each other no negatives."""
    for topic, docstrings in members.items():
        unrelated = [
            other.query
            for name, others in members.items()
            if not _is_within(name, topic) and not _is_within(topic, name)
            for other in others
        ]
        if not unrelated or len(docstrings) < 2:
            continue
        for index, item in enumerate(docstrings):
            own = content_id(item.query)
            rng = random.Random(f"{seed}/topics/{own}")
            example = docstrings[(index + rng.randrange(1, len(docstrings))) % len(docstrings)].query
            negatives = rng.sample(unrelated, min(TOPIC_NEGATIVES, len(unrelated)))
            yield {
                "query": item.query,
                "pos": [example],
                "neg": negatives,
                "query_id": own,
                "pos_ids": [content_id(example)],
                "neg_ids": [content_id(text) for text in negatives],
                "topic": topic,
            }


def beir_folder(items: Sequence[DocumentedItem], *, hide_names: bool) -> dict[str, list[Record] | str]:
    """A test set by file name: `corpus.jsonl` and `queries.jsonl` as rows, `qrels/test.tsv` as text.

    With `hide_names` a neutral name stands in the documents where their own name stood. Documents that become equal by
    that are one document of the corpus, relevant to the queries of all.
    """
    corpus: dict[str, str] = {}
    queries: list[Record] = []
    qrels = ["query-id\tcorpus-id\tscore"]
    for item in items:
        text = item.code_without_name if hide_names else item.code
        document, query = content_id(text), content_id(item.query)
        corpus[document] = text
        queries.append({"_id": query, "text": item.query})
        qrels.append(f"{query}\t{document}\t1")
    # In the order of the ids: a corpus in the order of the queries would let a broken search look right.
    rows = [{"_id": key, "title": "", "text": corpus[key]} for key in sorted(corpus)]
    return {"corpus.jsonl": rows, "queries.jsonl": queries, "qrels/test.tsv": "\n".join(qrels) + "\n"}
