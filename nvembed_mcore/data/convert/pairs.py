"""Sets of text pairs as records: semantic similarity, entailment, and sentence-transformers' pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from nvembed_mcore.data.convert.intake import Document, Draft, Intake, LeftOut, clean, list_of, text_of
from nvembed_mcore.data.convert.rows import json_lines
from nvembed_mcore.data.faults import DataError, Fault, kind_of
from nvembed_mcore.data.records import scores_of

_RELATED = 2.5  # of 5: a text whose pair with the query is scored above this is no negative (NV-Embed v1)


def sts(
    intake: Intake,
    *,
    min_score: float = 4.0,
    scale: tuple[float, float] = (0.0, 5.0),
    negatives: int = 7,
    first_field: str = "sentence1",
    second_field: str = "sentence2",
    score_field: str = "score",
) -> Iterator[Draft]:
    """Scored sentence pairs: a pair from `min_score` on is two records, one in each direction (section 4.2).

    Hard negatives are the texts of the set that BM25 ranks second and below for the query, without those whose pair
    with the query has a score above 2.5 (NV-Embed v1). The text of rank 1 may well be a paraphrase that no pair names.

    Args:
        intake: the rows.
        min_score: least score of a positive, on the scale 0 to 5.
        scale: least and greatest score of the set; scores are mapped to 0 to 5.
        negatives: most negatives of a record; 0 for none.
        first_field, second_field, score_field: fields of a row.

    Raises:
        DataError: the scale is empty.
    """
    if not scale[0] < scale[1]:
        raise DataError(f"--scale must rise from the least to the greatest score, got {scale[0]:g} {scale[1]:g}")

    def parse(row: dict[str, Any]) -> tuple[str, str, float]:
        first, second, score = text_of(row, first_field), text_of(row, second_field), _number(row, score_field)
        if not scale[0] <= score <= scale[1]:
            bounds = f"{scale[0]:g} to {scale[1]:g}"
            raise Fault(f"{score_field} must be in {bounds} (--scale), got {score:g}", score_field)
        if not first or not second:
            raise LeftOut("a text of the pair is blank")
        return first, second, 5 * (score - scale[0]) / (scale[1] - scale[0])

    pairs = list(intake.rows(parse))
    intake.stop_if_bad()
    related: dict[str, set[str]] = {}
    for first, second, score in pairs:
        for one, other in ((first, second), (second, first)):
            related.setdefault(one, {one})
            if score > _RELATED or score >= min_score:
                related[one].add(other)
    positives: dict[str, list[str]] = {}
    for first, second, score in pairs:
        if score < min_score:
            intake.counts.left_out[f"the score is below {min_score:g}"] += 1
            continue
        for one, other in ((first, second), (second, first)):
            positives.setdefault(one, []).append(other)
    hard = _second_and_below(list(related), positives, related, negatives)
    for query, texts in positives.items():
        for text in dict.fromkeys(texts):
            yield Draft(query, [Document(text)], [Document(one) for one in hard.get(query, ())])


def _second_and_below(
    texts: list[str], queries: dict[str, Any], related: dict[str, set[str]], count: int
) -> dict[str, list[str]]:
    """For each query the `count` best texts by BM25 from rank 2 on, without itself and what is related to it."""
    from nvembed_mcore.evaluation.lexical import bm25_rank, plain_words

    if not count or not queries:
        return {}
    depth = count + 1 + max(len(related[query]) for query in queries)
    rankings = bm25_rank(texts, list(queries), depth, tokenize=plain_words)
    chosen = {}
    for query, ranking in zip(queries, rankings, strict=True):
        others = [texts[number] for number in ranking if texts[number] != query]
        chosen[query] = [text for text in others[1:] if text not in related[query]][:count]
    return chosen


_ENTAILMENT, _NEUTRAL, _CONTRADICTION = "entailment", "neutral", "contradiction"
_NLI = {"0": _ENTAILMENT, "1": _NEUTRAL, "2": _CONTRADICTION} | {x: x for x in (_ENTAILMENT, _NEUTRAL, _CONTRADICTION)}


def nli(
    intake: Intake,
    *,
    negatives: int = 7,
    both_directions: bool = False,
    premise_field: str = "premise",
    hypothesis_field: str = "hypothesis",
    label_field: str = "label",
) -> Iterator[Draft]:
    """Natural language inference: of a premise, entailed hypotheses are positives and contradicting ones negatives.

    Labels are 0, 1, 2 or `entailment`, `neutral`, `contradiction`; pairs without one (-1, `-`) are left out, and so
    are hypotheses that were labelled both ways.

    Args:
        intake: the rows.
        negatives: most negatives of a record.
        both_directions: also make each hypothesis a query for the premises that entail it, as sentence-transformers'
            training scripts do: it suits the instruction about similar texts. An entailment does not hold backwards,
            so it is off.
        premise_field, hypothesis_field, label_field: fields of a row.
    """

    def parse(row: dict[str, Any]) -> tuple[str, str, str]:
        premise, hypothesis = text_of(row, premise_field), text_of(row, hypothesis_field)
        label = row.get(label_field)
        if label in (-1, "-1", "-"):
            raise LeftOut("annotators did not agree on a label")
        kind = None if isinstance(label, bool) else _NLI.get(str(label))
        if kind is None:
            allowed = "0, 1, 2, entailment, neutral or contradiction"
            raise Fault(f"{label_field} must be {allowed}, got {label!r}", label_field)
        if kind == _NEUTRAL:
            raise LeftOut("neutral")
        if not premise or not hypothesis:
            raise LeftOut("a text of the pair is blank")
        return premise, hypothesis, kind

    groups: dict[str, dict[str, set[str]]] = {}
    for premise, hypothesis, kind in intake.rows(parse):
        for query, text in ((premise, hypothesis), (hypothesis, premise))[: 1 + both_directions]:
            groups.setdefault(query, {}).setdefault(text, set()).add(kind)
    for query, labels in groups.items():
        entailed = [text for text, kinds in labels.items() if kinds == {_ENTAILMENT}]
        contradicting = [text for text, kinds in labels.items() if kinds == {_CONTRADICTION}]
        disputed = len(labels) - len(entailed) - len(contradicting)
        if disputed:
            intake.counts.notes["hypotheses labelled both ways, left out"] += disputed
        if entailed:
            yield Draft(query, _documents(entailed), _documents(contradicting[:negatives]))
        else:
            intake.counts.left_out["a premise that entails nothing"] += 1


def pairs(intake: Intake, *, negatives: int = 7) -> Iterator[Draft]:
    """Lines in the layouts of sentence-transformers' embedding-training-data.

    A list of two texts is a query and its positive; further texts of a list are negatives. An object has such a list
    in `texts` (the Stack Exchange files), or `query`, `pos` and perhaps `neg` (a text or a list) with a teacher's
    `pos_scores` and `neg_scores`, or `set`: texts of the same meaning, of which the first is the query.

    Args:
        intake: the lines.
        negatives: most negatives of a record.
    """

    def parse(value: Any) -> Draft:
        if isinstance(value, dict) and "texts" in value:
            value = list_of(value, "texts")
        if isinstance(value, list):
            value = {"query": value[0] if value else None, "pos": value[1:2], "neg": value[2:]}
        elif not isinstance(value, dict):
            raise Fault(f"neither a list of texts nor an object but {kind_of(value)}")
        elif "set" in value:
            texts = list_of(value, "set")
            value = {"query": texts[0] if texts else None, "pos": texts[1:]}
        documents = {name: _several(value, name) for name in ("pos", "neg")}
        scores = scores_of(value, {name: len(some) for name, some in documents.items()})
        for name, some in documents.items() if scores else ():
            scored = zip(some, scores[f"{name}_scores"], strict=True)
            documents[name] = [replace(document, score=score) for document, score in scored]
        return Draft(text_of(value, "query"), documents["pos"], documents["neg"][:negatives])

    for path in intake.sources:
        yield from intake.each(json_lines(path, intake.bad), parse)


def _several(row: dict[str, Any], name: str) -> list[Document]:
    """A text or a list of texts; none where the field is missing."""
    value = row.get(name)
    values = [] if value is None else [value] if isinstance(value, str) else list_of(row, name)
    return _documents([clean(one, f"{name}[{number}]", name) for number, one in enumerate(values)])


def _documents(texts: Sequence[str]) -> list[Document]:
    return [Document(text) for text in texts]


def _number(row: dict[str, Any], name: str) -> float:
    """A field that holds a number, as such or in words of a text file."""
    value = row.get(name)
    if value is None:
        raise Fault(f"{name} is null" if name in row else f"{name} is missing", name)
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise Fault(f"{name} must be a number, got {value!r}", name) from None
