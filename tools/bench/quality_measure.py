"""What a model is worth on modules that it never saw: code search, and telling their topics apart.

Retrieval is the quick start's: held-out docstrings search their own code. Classification and clustering are MTEB's,
on the same docstrings: their topic is the module's, by its first two or three names, as `nvembed data python-docs`
forms topics (`stage2_topics.jsonl`). Documentation of the figures: `FIGURES` of quality.py.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from examples.quickstart.measure import Held
from nvembed_mcore.data.python_source import documented_items, package_roots, source_files
from nvembed_mcore.evaluation.retrieval import search

RETRIEVE = "Given a description, retrieve the Python code that implements it"
IDENTIFY = "Identify the package or topic that the description belongs to"
MEASURES = ("ndcg_at_10", "recall_at_10", "mrr_at_10", "accuracy", "v_measure")
FEWEST_HELD_OUT, MOST_EXAMPLES = 20, 32
"""A class has so many held-out docstrings at least; of training docstrings the classifier sees so many at most."""

Embed = Callable[[list[str], str], np.ndarray]
"""Texts and the instruction in front of them (none for documents) -> unit vectors, float32 [texts, D]."""


class Tasks:
    """The held-out set and its topics.

    Args:
        data: folder that `nvembed data python-docs` wrote.
        topics: held-out docstring -> topic, as `held_out_topics` finds them; empty: retrieval only.
    """

    def __init__(self, data: Path, topics: dict[str, str]) -> None:
        self.held = Held(data / "heldout")
        counted = Counter(topics.values())
        self.tested = [(text, topic) for text, topic in topics.items() if counted[topic] >= FEWEST_HELD_OUT]
        self.classes = sorted({topic for _, topic in self.tested})
        by_topic = defaultdict(list)
        for record in _records(data / "stage2_topics.jsonl") if topics else ():
            if record["topic"] in self.classes:
                by_topic[record["topic"]].append((record["query"], record["topic"]))
        # Evenly over the topic's modules, whose docstrings stand behind each other.
        self.examples = [one for found in by_topic.values() for one in found[:: -(-len(found) // MOST_EXAMPLES)]]

    def measure(self, embed: Embed) -> dict[str, float]:
        """All of `MEASURES`, each between 0 and 1."""
        queries, documents = embed(self.held.queries, RETRIEVE), embed(self.held.documents, "")
        _, ranked = search(torch.from_numpy(queries), torch.from_numpy(documents), 100)
        scores = self.held.score(ranked.numpy())
        found = {name: scores[name] for name in ("ndcg_at_10", "recall_at_10", "mrr_at_10")}
        return found | (self._of_topics(embed) if self.tested else {})

    def _of_topics(self, embed: Embed) -> dict[str, float]:
        """Accuracy of logistic regression, and the V-measure of k-means (as MTEB classifies and clusters)."""
        from sklearn.cluster import KMeans
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import v_measure_score

        (texts, topics), (held_texts, held_topics) = (zip(*rows, strict=True) for rows in (self.examples, self.tested))
        known, held = embed(list(texts), IDENTIFY), embed(list(held_texts), IDENTIFY)
        model = LogisticRegression(max_iter=100, C=100.0).fit(known, topics)
        clusters = KMeans(len(self.classes), n_init=3, random_state=0).fit_predict(held)
        accuracy = float(np.mean(model.predict(held) == np.array(held_topics)))
        return {"accuracy": accuracy, "v_measure": float(v_measure_score(held_topics, clusters))}


def held_out_topics(data: Path) -> dict[str, str]:
    """Topic of each held-out docstring, as far as its module belongs to a topic of the training modules.

    The set says which packages it is made of; their sources are parsed again, because it does not say modules.
    """
    statistics = json.loads((data / "statistics.json").read_text(encoding="utf-8"))
    topics = {record["topic"] for record in _records(data / "stage2_topics.jsonl")}
    modules: dict[str, str] = {}
    for package, root in package_roots([*statistics["versions"]]).items():
        for file in source_files(package, root):
            try:
                found = [item.query for item in documented_items(file, file.path.read_bytes())]
            except (SyntaxError, ValueError, RecursionError):
                continue
            modules.update({query: file.module for query in found if query not in modules})
    return topics_of(Held(data / "heldout").queries, modules, topics)


def topics_of(texts: Iterable[str], modules: dict[str, str], topics: set[str]) -> dict[str, str]:
    """Text -> the topic of its module: its first three names where they are one, else its first two."""
    found = {}
    for text in texts:
        names = modules.get(text, "").split(".")
        topic = next((".".join(names[:n]) for n in (3, 2) if ".".join(names[:n]) in topics), None)
        if topic is not None:
            found[text] = topic
    return found


def _records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
