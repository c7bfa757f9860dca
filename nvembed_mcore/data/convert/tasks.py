"""Classification and clustering sets as records (NV-Embed, section 4.2): by label texts or by example documents.

By label, a text's positive is the text of its label and its negatives are the texts of other labels: NV-Embed's form
for two-class sets, and in v1 for all. By example, its positive is another text of its class and its negatives are
texts of other classes, drawn at random: v2's form for clustering and for most sets of several classes.

A text is one record however often it stands in a set. One that stands under several classes belongs to all of them:
what shares one of its classes is never its negative.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from nvembed_mcore.data.convert.intake import Document, Draft, Intake, clean, list_of, text_of
from nvembed_mcore.data.convert.rows import json_document
from nvembed_mcore.data.faults import DataError, Fault, check_string, kind_of
from nvembed_mcore.data.records import content_id

Form = Literal["label", "example"]
_Labelled = Iterable[tuple[str, tuple[str, ...]]]
"""Texts with the names of their classes."""


def classification(
    intake: Intake,
    *,
    by: Form,
    negatives: int = 7,
    text_field: str = "text",
    label_field: str = "label",
    label_text_field: str = "label_text",
    labels: str | Path | None = None,
) -> Iterator[Draft]:
    """A set in MTEB's layout for classification: a row has `text`, `label` and, for most sets, `label_text`.

    Args:
        intake: the rows.
        by: `label` or `example`.
        negatives: most negatives of a record.
        text_field, label_field, label_text_field: fields of a row.
        labels: JSON file with one object, label -> its text; takes the place of `label_text_field`.

    Raises:
        DataError: there is one class only, or a label has no text.
    """
    label_texts = {} if labels is None else _label_texts(Path(labels))

    def parse(row: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        text, classes = text_of(row, text_field), _classes(row, label_field, None)
        if labels is None and by == "label" and row.get(label_text_field) is not None:
            label, found = ", ".join(classes), text_of(row, label_text_field)
            if label_texts.setdefault(label, found) != found:
                before = label_texts[label]
                raise Fault(
                    f"{label_text_field} of label {label} is {found!r}, before it was {before!r}", label_text_field
                )
        return text, classes

    yield from _drafts(intake, intake.rows(parse), by, negatives, label_texts, labels)


def clustering(
    intake: Intake,
    *,
    by: Form,
    negatives: int = 7,
    fields: Sequence[str] = ("sentences",),
    label_field: str = "labels",
    label_separator: str | None = None,
    labels: str | Path | None = None,
) -> Iterator[Draft]:
    """A set in one of MTEB's layouts for clustering: a row has lists `sentences` and `labels`, or one text.

    Args:
        intake: the rows.
        by: `label` or `example`.
        negatives: most negatives of a record.
        fields: fields of a row that make a text, a space between (`title` and `abstract` for P2P, `title` for S2S), or
            one that holds a list of texts.
        label_field: the label; beside a list of texts, a list of labels.
        label_separator: stands between the labels of a text that has several.
        labels: JSON file with one object, label -> its text; without it a label is its own text.

    Raises:
        DataError: there is one class only, or a label has no text.
    """

    def parse(row: dict[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
        if not isinstance(row.get(fields[0]), list):
            text = " ".join(part for part in (text_of(row, name) for name in fields) if part)
            return [(text, _classes(row, label_field, label_separator))]
        texts, classes = list_of(row, fields[0]), list_of(row, label_field)
        if len(texts) != len(classes):
            raise Fault(
                f"{label_field} has {len(classes)} labels for the {len(texts)} texts of {fields[0]}", label_field
            )
        return [
            (
                clean(text, f"{fields[0]}[{number}]", fields[0]),
                _classes({label_field: one}, label_field, label_separator),
            )
            for number, (text, one) in enumerate(zip(texts, classes, strict=True))
        ]

    label_texts = {} if labels is None else _label_texts(Path(labels))
    labelled = (one for several in intake.rows(parse) for one in several)
    yield from _drafts(intake, labelled, by, negatives, label_texts, labels)


def _drafts(
    intake: Intake,
    labelled: _Labelled,
    by: Form,
    negatives: int,
    label_texts: dict[str, str],
    labels: str | Path | None,
) -> Iterator[Draft]:
    texts = _TextsByClass(intake, labelled)
    intake.stop_if_bad()
    if len(texts.members) == 1:
        raise DataError(
            f"{intake.names()}: all texts have the label {next(iter(texts.members))!r}, so none has a negative"
        )
    if by == "example":
        yield from _by_example(intake, texts, negatives)
        return
    missing = [label for label in texts.members if label not in label_texts]
    if labels is not None and missing:
        raise DataError(
            f"{labels} has no text for {len(missing)} of {len(texts.members)} labels, the first is {missing[0]!r}"
        )
    label_texts |= {label: label for label in missing}
    for label, text in label_texts.items():
        if labels is None and text.lstrip("-").isdigit():
            raise DataError(
                f"{intake.names()}: the text of label {label} is {text!r}; --labels FILE gives labels better texts"
            )
    yield from _by_label(intake, texts, negatives, label_texts)


class _TextsByClass:
    """The texts of a set.

    Attributes:
        classes: text -> class -> number of the text among those of the class.
        members: class -> its texts.
    """

    def __init__(self, intake: Intake, labelled: _Labelled) -> None:
        self.classes: dict[str, dict[str, int]] = {}
        self.members: dict[str, list[str]] = {}
        for text, classes in labelled:
            if not text or not classes:
                intake.counts.left_out[f"the {'label' if text else 'text'} is blank"] += 1
                continue
            known = self.classes.setdefault(text, {})
            if known:
                intake.counts.left_out["the text stands earlier in the set"] += 1
            for name in classes:
                members = self.members.setdefault(name, [])
                if name not in known:
                    known[name] = len(members)
                    members.append(text)
        if several := sum(len(known) > 1 for known in self.classes.values()):
            intake.counts.notes["texts of several classes"] += several


def _by_label(intake: Intake, texts: _TextsByClass, negatives: int, label_texts: Mapping[str, str]) -> Iterator[Draft]:
    for text, classes in texts.classes.items():
        others = [label_texts[name] for name in texts.members if name not in classes]
        rng = random.Random(f"{intake.seed}/labels/{content_id(text)}")
        chosen = others if len(others) <= negatives else rng.sample(others, negatives)
        yield Draft(text, [Document(label_texts[name]) for name in classes], [Document(one) for one in chosen])


def _by_example(intake: Intake, texts: _TextsByClass, negatives: int) -> Iterator[Draft]:
    outside = _Outside(texts)
    for text, classes in texts.classes.items():
        rng = random.Random(f"{intake.seed}/examples/{content_id(text)}")
        shared = [name for name in classes if len(texts.members[name]) > 1]
        if not shared:
            intake.counts.left_out["no other text of its class"] += 1
            continue
        name = shared[rng.randrange(len(shared))]
        members = texts.members[name]
        example = members[(classes[name] + rng.randrange(1, len(members))) % len(members)]
        yield Draft(
            text, [Document(example)], [Document(one) for one in outside.draw(frozenset(classes), negatives, rng)]
        )


class _Outside:
    """Draws texts that share no class with a text, all with the same chance, without a list of them for each class.

    Texts stand in blocks, one for each set of classes; a draw is a number that skips the blocks which may not be used.
    """

    def __init__(self, texts: _TextsByClass) -> None:
        blocks: dict[frozenset[str], list[str]] = {}
        for text, classes in texts.classes.items():
            blocks.setdefault(frozenset(classes), []).append(text)
        self._texts = [text for block in blocks.values() for text in block]
        self._bounds: dict[frozenset[str], tuple[int, int]] = {}
        first = 0
        for classes, block in blocks.items():
            self._bounds[classes] = (first, first + len(block))
            first += len(block)
        self._closed: dict[frozenset[str], list[tuple[int, int]]] = {}

    def draw(self, classes: frozenset[str], count: int, rng: random.Random) -> list[str]:
        """`count` different texts, or all there are."""
        if classes not in self._closed:
            self._closed[classes] = [bounds for other, bounds in self._bounds.items() if other & classes]
        closed = self._closed[classes]
        free = len(self._texts) - sum(stop - first for first, stop in closed)
        chosen = []
        for place in rng.sample(range(free), min(count, free)):
            for first, stop in closed:  # in the order of the blocks
                place += stop - first if place >= first else 0
            chosen.append(self._texts[place])
        return chosen


def _classes(row: dict[str, Any], name: str, separator: str | None) -> tuple[str, ...]:
    """The classes that a label names: a string, a whole number, or a list of these; none for a blank one."""
    value = row.get(name)
    if value is None:
        raise Fault(f"{name} is null" if name in row else f"{name} is missing", name)
    values = value if isinstance(value, list) else [value]
    if separator is not None and isinstance(value, str):
        values = value.split(separator)
    classes = []
    for one in values:
        if isinstance(one, bool) or not isinstance(one, (int, str)):
            raise Fault(f"{name} must be a string or a whole number, got {kind_of(one)}", name)
        check_string(str(one), name, name)
        if str(one).strip():
            classes.append(str(one).strip())
    return tuple(dict.fromkeys(classes))


def _label_texts(path: Path) -> dict[str, str]:
    """Label -> text of a JSON file."""
    texts = json_document(path)
    for label, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"{path}: the text of label {label!r} must be a string that is not blank, got {json.dumps(text)}"
            )
        try:
            check_string(text, f"the text of label {label!r}", label)
        except Fault as fault:
            raise DataError(f"{path}: {fault.reason}") from fault
    return {label: text.strip() for label, text in texts.items()}
