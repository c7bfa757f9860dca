"""Layouts of training data: where the rows of a data set hold query, positives and negatives.

A layout is found from the fields of the first row that has one, and turns each row into one with the fields of a
record (`query`, `pos`, `neg`, `query_id`, `pos_ids`, `neg_ids`, `instruction`, `pos_scores`, `neg_scores`), which
`records` checks:

    records              query, pos [, neg, query_id, pos_ids, neg_ids, instruction, pos_scores, neg_scores];
                         FlagEmbedding's rows too, whose prompt and type are not used (FlagEmbedding,
                         examples/finetune/embedder)
    passages             Tevatron's query, positive_passages [, negative_passages, query_id] of objects docid, title
                         and text (Tevatron, retriever/dataset.py)
    document ids         Tevatron's query_text, positive_document_ids [, negative_document_ids, query_id] beside a
                         corpus of docid, title and text
    columns              sentence-transformers: anchor, query or question; positive, answer, passage, document or
                         response [, negative, negative_1, ...]; or sentence1 and sentence2; or a list of two or three
                         strings. A list of numbers in label, labels, score or scores beside `positive` is what a
                         teacher scores the positive and the negatives (its DistillKLDivLoss)
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from nvembed_mcore.data.faults import Fault, check_string, document_text, kind_of

_RECORD_FIELDS = ("query", "pos", "neg", "query_id", "pos_ids", "neg_ids", "instruction", "pos_scores", "neg_scores")
_QUERIES = ("anchor", "query", "question")
_POSITIVES = ("answer", "passage", "document", "response")
_SENTENCES = (("sentence1", "sentence2"), ("premise", "hypothesis"))
_TEACHER = ("label", "labels", "score", "scores")
_SCORE_LISTS = ("pos_scores", "neg_scores")
_SCORES = ("score", "scores", "label", "labels", "similarity", "similarity_score")
_NEGATIVE = re.compile(r"negatives?|negative_?(\d+)|\[([2-9]|\d\d+)\]")
_LISTS = frozenset(
    {"pos", "neg", "pos_ids", "neg_ids", "positive_passages", "negative_passages"}
    | {"positive_document_ids", "negative_document_ids"}
)

KNOWN = """  query, pos [, neg]: records, FlagEmbedding
  query, positive_passages [, negative_passages]: Tevatron
  query_text, positive_document_ids [, negative_document_ids]: Tevatron, beside a corpus
  anchor|query|question, positive|answer|passage|document|response [, negative, negative_1, ...], \
or sentence1, sentence2: sentence-transformers
  [query, positive] or [query, positive, negative]: a list of strings a line"""
"""The layouts and their fields, for messages."""


class UnknownLayout(Fault):
    """A row has the fields of no layout."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where rows hold a record.

    Attributes:
        kind: which of the layouts.
        query, positive, negative: the fields of the row; of `columns`, `negative` is the first of several.
    """

    kind: Literal["records", "passages", "document ids", "columns"]
    query: str
    positive: str
    negative: str

    def record_row(self, row: Mapping[str, Any], documents: Mapping[str, str] | None = None) -> Mapping[str, Any]:
        """The record in a row, not yet checked. Pure.

        Args:
            row: the fields of the row.
            documents: texts by id, for `document ids`.

        Raises:
            Fault: the row holds none.
        """
        if self.kind == "records":
            return row
        for name in (self.query, self.positive):
            if name not in row:
                raise Fault(f"{name} is missing", name)
        record = {"query": row[self.query], "query_id": _id(row.get("query_id"))}
        if self.kind == "columns":
            record["pos"] = _texts(row[self.positive])
            negatives = [row[name] for name in negative_columns(tuple(row)) if row[name] is not None]
            record["neg"] = [text for value in negatives for text in _texts(value)]
            return record | self._scores(row, len(record["pos"]), len(record["neg"]))
        for name, field in (("pos", self.positive), ("neg", self.negative)):
            if self.kind == "passages":
                texts, ids = _passages(row, field)
            else:
                texts, ids = _looked_up(row, field, documents or {})
            record |= {name: texts, f"{name}_ids": ids}
        return record

    def _scores(self, row: Mapping[str, Any], positives: int, negatives: int) -> dict[str, list[float]]:
        """What a teacher scores a row's documents, in one list."""
        name = self._score_column(row)
        if name is None:
            return {}
        scores = row[name]
        if len(scores) != positives + negatives:
            texts = f"{positives} positives and {negatives} negatives"
            raise Fault(f"{name} has {len(scores)} scores for {texts}", name)
        return {"pos_scores": scores[:positives], "neg_scores": scores[positives:]}

    def _score_column(self, row: Mapping[str, Any]) -> str | None:
        """The field of `columns` that holds a list of scores: of numbers, one at least."""
        if self.kind != "columns" or self.positive != "positive":
            return None
        for name in _TEACHER:
            values = row.get(name)
            if isinstance(values, list) and values and all(isinstance(one, (int, float)) for one in values):
                return name
        return None

    def document_ids(self, row: Mapping[str, Any]) -> list[str]:
        """The ids of documents in a row of `document ids`."""
        fields = [row.get(name) for name in (self.positive, self.negative)]
        values = [_id(value) for field in fields if isinstance(field, list) for value in field]
        return [value for value in values if isinstance(value, str)]

    def columns(self, names: Sequence[str]) -> list[str]:
        """Of the columns of a table those that hold records."""
        if self.kind == "records":
            return [name for name in names if name in _RECORD_FIELDS]
        negatives = negative_columns(tuple(names)) if self.kind == "columns" else [self.negative]
        scores = _TEACHER if self.positive == "positive" else ()
        return [name for name in names if name in (self.query, self.positive, "query_id", *negatives, *scores)]

    def fault_of(self, fault: Fault, row: Mapping[str, Any]) -> Fault:
        """A fault of a record as one of the row that it was made from: it names and points at the row's field."""
        if self.query not in row or self.positive not in row:
            other = _layout_or_none(row)
            if other and (other.query, other.positive) != (self.query, self.positive):
                first = f"that of the first row ({self.query}, {self.positive})"
                return Fault(f"another layout than {first}: the fields are {', '.join(row)}")
        if self.kind == "records":
            return fault
        of_record = {"query": self.query, "pos": self.positive, "neg": self.negative}
        scores = self._score_column(row)
        of_record |= dict.fromkeys(_SCORE_LISTS, scores) if scores else {}
        field = of_record.get(fault.field.removesuffix("_ids"), fault.field)
        named = field in fault.reason or fault.field not in of_record
        return Fault(fault.reason if named else f"{fault.reason} (of {field})", field)


def find_layout(fields: Collection[str]) -> Layout:
    """The layout of rows with these fields.

    Raises:
        UnknownLayout: there is none.
        Fault: they do not say which texts belong together.
    """
    names = tuple(fields)
    if "query" in names and "pos" in names:
        return Layout("records", "query", "pos", "neg")
    if "query" in names and "positive_passages" in names:
        return Layout("passages", "query", "positive_passages", "negative_passages")
    if "query_text" in names and "positive_document_ids" in names:
        return Layout("document ids", "query_text", "positive_document_ids", "negative_document_ids")
    pair = _pair(names)
    if pair is None:
        found = ", ".join(names) or "none"
        raise UnknownLayout(f"the fields are {found}; a layout is known of\n{KNOWN}")
    return Layout("columns", *pair, next(iter(negative_columns(names)), "negative"))


def parse_cell(name: str, cell: str) -> Any:
    """The value of a cell of CSV or TSV: a text, or for a field that holds a list the JSON list, or one text alone.

    An empty cell is null where a field need not be there.

    Raises:
        Fault: the cell begins like a list and is none.
    """
    if not cell:
        may_lack = name in (*_LISTS, *_SCORE_LISTS, "query_id", "instruction") or _NEGATIVE.fullmatch(name)
        return None if may_lack else cell
    if name in _SCORE_LISTS and not cell.lstrip().startswith("["):
        return [_number(name, cell)]
    if name not in _LISTS and name not in _SCORE_LISTS:
        return cell
    if not cell.lstrip().startswith("["):
        return [cell]
    try:
        return json.loads(cell)
    except (RecursionError, ValueError) as error:
        reason = f"begins with [ but is no JSON list ({getattr(error, 'msg', error)})"
        raise Fault(f"{reason}; a text that begins so must stand in a list", name) from error


def _number(name: str, cell: str) -> float:
    try:
        return float(cell)
    except ValueError as error:
        raise Fault(f"neither a number nor a JSON list of numbers: {cell!r}", name) from error


@lru_cache
def negative_columns(names: tuple[str, ...]) -> list[str]:
    """Of the columns of pairs those that hold negatives, by their numbers."""
    found = [(match, name) for name in names if (match := _NEGATIVE.fullmatch(name))]
    return [name for _, name in sorted(found, key=lambda one: int(one[0][1] or one[0][2] or 0))]


def _pair(names: tuple[str, ...]) -> tuple[str, str] | None:
    """The columns of query and positive; nothing if there are none."""
    if "[0]" in names:
        if len(names) > 3:
            raise Fault(f"a list of {len(names)} strings: of two it is query, positive, of three negative too")
        return "[0]", "[1]"
    for pair in _SENTENCES:
        if set(pair) <= set(names):
            _refuse_scores(names, pair)
            return pair if pair == _SENTENCES[0] else None
    queries = [name for name in _QUERIES if name in names]
    positives = ["positive"] if "positive" in names else [name for name in _POSITIVES if name in names]
    if not queries or not positives:
        return None
    for role, found in (("query", queries), ("positive", positives)):
        if len(found) > 1:
            raise Fault(f"more than one field may be the {role}: {', '.join(found)}; keep one of them")
    if positives != ["positive"]:
        _refuse_scores(names, (queries[0], positives[0]))
    return queries[0], positives[0]


def _refuse_scores(names: tuple[str, ...], pair: tuple[str, str]) -> None:
    scores = [name for name in names if name in _SCORES]
    if scores:
        raise Fault(
            f"{pair[0]} and {pair[1]} have a field {scores[0]}, so they may not belong together: "
            "make records of them with `nvembed data convert sts` or `nvembed data convert nli`",
            scores[0],
        )


def _layout_or_none(fields: Collection[str]) -> Layout | None:
    try:
        return find_layout(fields)
    except Fault:
        return None


def _id(value: Any) -> Any:
    """An id as a string where it is a number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _texts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _list(row: Mapping[str, Any], field: str) -> list[Any]:
    values = row.get(field)
    if values is None:
        return []
    if not isinstance(values, list):
        raise Fault(f"{field} must be a list, got {kind_of(values)}", field)
    return values


def _passages(row: Mapping[str, Any], field: str) -> tuple[list[str], list[str | None]]:
    """Texts and ids of a list of Tevatron's passages."""
    texts, ids = [], []
    for index, passage in enumerate(_list(row, field)):
        if not isinstance(passage, dict):
            raise Fault(f"{field}[{index}] must be an object, got {kind_of(passage)}", field)
        try:
            texts.append(document_text(passage))
        except Fault as fault:
            raise Fault(f"{field}[{index}]: {fault.reason}", field) from fault
        ids.append(_id(passage.get("docid")))
    return texts, ids


def _looked_up(row: Mapping[str, Any], field: str, documents: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Texts and ids of a list of document ids."""
    ids = [_id(value) for value in _list(row, field)]
    for index, value in enumerate(ids):
        check_string(value, f"{field}[{index}]", field)
        if value not in documents:
            raise Fault(f"{field}[{index}] = {value!r} is not in the corpus", field)
    return [documents[value] for value in ids], ids
