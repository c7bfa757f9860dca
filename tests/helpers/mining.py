"""A model without weights, data that mining must see through, and mining by loops."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from nvembed_mcore.config import ParallelConfig
from nvembed_mcore.data.records import content_id
from nvembed_mcore.mining.select import Rules, limits
from nvembed_mcore.parallel.groups import initialize

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau".split()


class WordEmbedder:
    """Embeds a text as the number of each of its words. An `Embedder`; `embedded` counts texts."""

    dim = 64
    is_writer = True

    def __init__(self, name: str = "words") -> None:
        groups = initialize(ParallelConfig(timeout_minutes=2))
        self.num_replicas, self.replica = groups.world_size, groups.rank
        self.name, self.embedded, self.tokens, self.positions = name, 0, 0, 0

    def embed(self, texts: list[str], is_query: bool) -> np.ndarray:
        self.embedded += len(texts)
        self.tokens += sum(len(text.split()) for text in texts)
        return np.stack([vector(text) for text in texts])

    def facts(self, is_query: bool) -> dict[str, Any]:
        return {"weights": self.name, "prompt": "query" if is_query else ""}

    @property
    def fingerprint(self) -> str:
        return self.name


def vector(text: str) -> np.ndarray:
    """Word counts in quarters: no unit vectors, but their products are exact, so that ties are ties."""
    counts = np.zeros(WordEmbedder.dim, dtype=np.float32)
    for word in text.lower().split():
        counts[sum(map(ord, word)) % WordEmbedder.dim] += 0.25
    return counts


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_data(num_records: int = 30, num_documents: int = 200, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Records and a corpus of few words, so that scores tie, with traps.

    Copies of positives stand under other ids with other capitals and spaces; queries stand in the corpus; documents
    repeat; two records share a query and have different positives; some positives are not in the corpus.
    """
    draw = random.Random(seed)
    text = lambda: " ".join(draw.choice(WORDS) for _ in range(draw.randint(2, 9)))  # noqa: E731
    corpus = [{"id": f"d{number}", "text": text()} for number in range(num_documents)]
    records = []
    for number in range(num_records):
        positives = draw.sample(corpus, draw.choice([1, 1, 2]))
        records.append(
            {
                "query": positives[0]["text"].rsplit(" ", 1)[0] + " " + draw.choice(WORDS),
                "pos": [one["text"] for one in positives],
                "neg": [one["text"] for one in draw.sample(corpus, draw.choice([0, 2]))],
                "query_id": f"q{number}",
            }
        )
    records[1]["query"] = records[0]["query"]
    records[3]["query_id"] = records[2]["query_id"]
    records[4]["pos"] = ["a positive that no corpus holds alpha beta"]
    for number, record in enumerate(records[:12]):
        corpus.append({"id": f"copy{number}", "text": "  " + record["pos"][0].upper().replace(" ", "   ")})
        corpus.append({"id": f"query{number}", "text": record["query"]})
    corpus += [{"id": f"again{number}", "text": one["text"]} for number, one in enumerate(corpus[:20])]
    return records, corpus


def mined_by_loops(
    records: list[dict], corpus: list[dict], rules: Rules, *, keep_negatives: bool = False
) -> list[dict[str, Any]]:
    """What mining must write, one query and one document at a time."""
    normal = lambda text: " ".join(text.casefold().split())  # noqa: E731
    ids = {}
    for document in corpus:
        ids.setdefault(document["text"].strip(), document["id"])
    rows = []
    for record in records:
        query = vector(record["query"])
        score = lambda text, query=query: float(query @ vector(text))  # noqa: E731
        friends = [
            other
            for other in records
            if other["query_id"] == record["query_id"] or normal(other["query"]) == normal(record["query"])
        ]
        seen = {normal(record["query"])} | {normal(text) for other in friends for text in other["pos"]}
        seen_ids = {ids.get(text, content_id(text)) for other in friends for text in other["pos"]}
        positives = {normal(text) for text in record["pos"]}
        kept = [text for text in record["neg"] if keep_negatives and normal(text) not in positives]
        if keep_negatives:
            seen |= {normal(text) for other in friends for text in other["neg"]}
        limit = limits(np.array([min(map(score, record["pos"]))]), rules)[0]
        ranked = sorted(enumerate(corpus), key=lambda one: (-score(one[1]["text"]), one[0]))
        rank, found = 0, []
        for _, document in ranked:
            if normal(document["text"]) in seen or document["id"] in seen_ids:
                continue
            seen.add(normal(document["text"]))
            rank += 1
            if rules.skip < rank <= rules.end and score(document["text"]) < limit:
                found.append(document)
        if rules.sampling == "random" and len(found) > rules.negatives:
            places = random.Random(f"{rules.seed}/mine/{record['query_id']}").sample(
                range(len(found)), rules.negatives
            )
            found = [found[place] for place in sorted(places)]
        negatives = [*kept, *(one["text"].strip() for one in found[: rules.negatives])]
        rows.append(
            {
                "query": record["query"],
                "pos": record["pos"],
                "neg": negatives,
                "query_id": record["query_id"],
                "pos_ids": [ids.get(text, content_id(text)) for text in record["pos"]],
                "neg_ids": [ids[text] for text in kept] + [one["id"] for one in found[: rules.negatives]],
                "pos_scores": [round(score(text), 6) for text in record["pos"]],
                "neg_scores": [round(score(text), 6) for text in negatives],
            }
        )
    return rows
