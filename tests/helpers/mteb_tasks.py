"""Small tasks of mteb of every kind on texts made here. Nothing is downloaded."""

from __future__ import annotations

import random

from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTaskClassification,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
    AbsTaskSummarization,
)
from mteb.abstasks.aggregate_task_metadata import AggregateTaskMetadata
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.clustering_legacy import AbsTaskClusteringLegacy
from mteb.abstasks.task_metadata import TaskMetadata

TOPICS = {
    "sea": "boat wave sail harbour fish tide captain anchor".split(),
    "kitchen": "bread oven flour butter knife soup pepper plate".split(),
    "music": "violin drum chorus melody rhythm piano singer tune".split(),
}
LABELS = list(TOPICS)


def sentences(count, seed, words=7):
    """(topic, sentence) pairs, topics in turn."""
    draw = random.Random(seed)
    filler = "the a of with some under near every old".split()
    found = []
    for number in range(count):
        topic = LABELS[number % len(LABELS)]
        parts = [draw.choice(TOPICS[topic] if draw.random() < 0.5 else filler) for _ in range(draw.randint(3, words))]
        found.append((topic, " ".join(parts)))
    return found


def _metadata(name, kind, main_score):
    return TaskMetadata(
        name=name,
        type=kind,
        main_score=main_score,
        description="Made in a test.",
        reference=None,
        dataset={"path": "none", "revision": "1"},
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation="",
    )


class _Made:
    """Makes its data instead of loading it, and counts how often."""

    loads = 0

    def load_data(self, num_proc=None, **kwargs):
        type(self).loads += 1
        self.dataset = self.make()
        self.data_loaded = True


class SmallRetrieval(_Made, AbsTaskRetrieval):
    metadata = _metadata("SmallRetrieval", "Retrieval", "ndcg_at_10")
    top_ranked = None
    empty = ""  # benchmarks have some documents without text

    def make(self):
        documents = [
            {"id": f"d{number}", "text": text, "title": topic if number % 4 == 0 else ""}
            for number, (topic, text) in enumerate(sentences(40, seed=1, words=30))
        ]
        documents.append({"id": "empty", "text": self.empty, "title": ""})
        queries = [{"id": f"q{number}", "text": text} for number, (_, text) in enumerate(sentences(12, seed=2))]
        relevant = {f"q{number}": {f"d{number + 12 * step}": 1 + step for step in range(3)} for number in range(12)}
        split = dict(
            queries=Dataset.from_list(queries),
            corpus=Dataset.from_list(documents),
            relevant_docs=relevant,
            top_ranked=self.top_ranked,
        )
        return {"default": {"test": split}}


class SmallReranking(SmallRetrieval):
    metadata = _metadata("SmallReranking", "Reranking", "map_at_1000")
    top_ranked = {f"q{query}": [f"d{query + 4 * step}" for step in range(7)] for query in range(12)}


class _Part(SmallRetrieval):
    metadata = _metadata("SmallFirstPart", "Retrieval", "ndcg_at_10")


class _OtherPart(SmallRetrieval):
    metadata = _metadata("SmallOtherPart", "Retrieval", "ndcg_at_10")
    empty = "bread and wave"


class SmallParts(AbsTaskAggregate):
    """Its score is the mean of those of its parts."""

    metadata = AggregateTaskMetadata(
        name="SmallParts",
        description="Made in a test.",
        tasks=[_Part(), _OtherPart()],
        type="Retrieval",
        main_score="ndcg_at_10",
        eval_splits=["test"],
    )


class SmallClassification(_Made, AbsTaskClassification):
    metadata = _metadata("SmallClassification", "Classification", "accuracy")

    def make(self):
        def split(count, seed):
            rows = sentences(count, seed)
            return Dataset.from_dict({"text": [text for _, text in rows], "label": [LABELS.index(t) for t, _ in rows]})

        return DatasetDict(train=split(60, 3), test=split(45, 4))


class SmallClustering(_Made, AbsTaskClusteringLegacy):
    metadata = _metadata("SmallClustering", "Clustering", "v_measure")

    def make(self):
        parts = [sentences(30, seed) for seed in (5, 6)]
        columns = {
            "sentences": [[text for _, text in part] for part in parts],
            "labels": [[topic for topic, _ in part] for part in parts],
        }
        return DatasetDict(test=Dataset.from_dict(columns))


class SmallPairs(_Made, AbsTaskPairClassification):
    metadata = _metadata("SmallPairs", "PairClassification", "max_ap")

    def make(self):
        first, second = sentences(40, 7), sentences(40, 8)
        second = second[1:] + second[:1]  # topics differ but where the next line makes them equal
        second = [first[number] if number % 3 == 0 else one for number, one in enumerate(second)]
        columns = {
            "sentence1": [text for _, text in first],
            "sentence2": [f"{text} again" for _, text in second],
            "labels": [int(one[0] == other[0]) for one, other in zip(first, second, strict=True)],
        }
        return DatasetDict(test=Dataset.from_dict(columns))


class SmallSts(_Made, AbsTaskSTS):
    metadata = _metadata("SmallSts", "STS", "cosine_spearman")
    min_score, max_score = 0, 5

    def make(self):
        draw = random.Random(9)
        first, second = sentences(30, 10), sentences(30, 11)
        columns = {
            "sentence1": [text for _, text in first],
            "sentence2": [text for _, text in second],
            "score": [5 * draw.random() for _ in first],
        }
        return DatasetDict(test=Dataset.from_dict(columns))


class SmallSummaries(_Made, AbsTaskSummarization):
    metadata = _metadata("SmallSummaries", "Summarization", "cosine_spearman")
    min_score, max_score = 0, 5

    def make(self):
        draw = random.Random(12)
        texts = [text for _, text in sentences(48, 13, words=12)]
        rows = [texts[begin : begin + 8] for begin in range(0, 48, 8)]
        columns = {
            "text": [row[0] for row in rows],
            "human_summaries": [row[1:4] for row in rows],
            "machine_summaries": [row[4:8] for row in rows],
            "relevance": [[5 * draw.random() for _ in range(4)] for _ in rows],
        }
        return DatasetDict(test=Dataset.from_dict(columns))


INSTRUCTIONS = """
base: published
tasks:
  SmallRetrieval: {query: Find the same topic, document: A text of a topic}
  SmallReranking: Find the topic
types:
  Retrieval: Find it
  Classification: "Classify the topic: sea, kitchen or music"
  Clustering: Find the topic
  PairClassification: Find the same topic
"""
"""A user's own table for these."""

KINDS = [
    SmallRetrieval,
    SmallReranking,
    SmallClassification,
    SmallClustering,
    SmallPairs,
    SmallSts,
    SmallSummaries,
]
