"""Takes training texts out of a set that are, or nearly are, texts of an evaluation set.

Two texts are the same when their words are: letters and digits in Unicode's compatibility form, without case,
punctuation and spaces. They are nearly the same when their BM25 similarity (`MostSimilar`) reaches a threshold, as
NV-Embed did it for Emotion and AmazonCounterfactual (with a threshold that it does not state); its
clustering sets were cleaned by equality.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from nvembed_mcore.data.beir import read_queries
from nvembed_mcore.data.convert.intake import Intake, check_output, clean
from nvembed_mcore.data.faults import DataError, Fault
from nvembed_mcore.data.records import Record, read_records, write_records

THRESHOLD = 0.7
"""Of 2,000 docstrings copied with every tenth word deleted or replaced, 95 % are this similar to their origin or more
(98 % with every twentieth). Texts that differ by design in one word of ten (`turn on the light in the kitchen`) may be
too: for sets of short commands equality is the better rule."""
FIELDS = ("text", "query", "question", "sentences", "sentence1", "sentence2")
"""Where the texts of an evaluation file are looked for."""

_WORD = re.compile(r"[^\W_]+")
_REMEMBERED = 1 << 17  # texts: sets by label or by example have the same documents in many records


@dataclass(frozen=True, slots=True)
class Match:
    """Why a text goes: the evaluation text that it matches, the file of that, and their similarity (1 when equal)."""

    reason: str
    matched: str
    file: str
    score: float


@dataclass(slots=True)
class Counts:
    """What was read, kept and dropped; `positives` and `negatives` were taken out of records that stay."""

    evaluation_texts: int = 0
    records: int = 0
    kept: int = 0
    dropped_exact: int = 0
    dropped_bm25: int = 0
    positives: int = 0
    negatives: int = 0

    def by_name(self) -> dict[str, int]:
        """All of them, under the names that a user reads."""
        return {
            "evaluation texts": self.evaluation_texts,
            "records read": self.records,
            "records kept": self.kept,
            "dropped: equal to an evaluation text": self.dropped_exact,
            "dropped: similar to an evaluation text": self.dropped_bm25,
            "positives taken out of records that stay": self.positives,
            "negatives taken out of records that stay": self.negatives,
        }


def decontaminate(
    records: str | Path,
    output: str | Path,
    *,
    against: Sequence[str | Path],
    threshold: float | None = THRESHOLD,
    documents: bool = False,
    fields: Sequence[str] = FIELDS,
    split: str = "test",
    max_bad_records: int = 0,
) -> Counts:
    """Write the records that match no evaluation text to `output`, and what went to `dropped_path(output)`.

    A record is dropped when its query matches. With `documents` a positive or negative that matches is taken out of
    its record, and a record without positives is dropped.

    Args:
        records: training records of any layout.
        output: JSONL file to write.
        against: evaluation sets: BEIR folders, of which the queries of a split count (a corpus that training and
            evaluation share, as Wikipedia, is no leak), or files of rows.
        threshold: BM25 similarity from which texts match; None: only equal texts do.
        documents: look at positives and negatives too, as for sets by example, whose documents are texts of the set.
        fields: of the rows of an evaluation file, those that hold texts or lists of texts.
        split: of a BEIR folder.
        max_bad_records: so many bad training records are left out.

    Raises:
        DataError: a file cannot be read or holds no text, no record is left, or `output` is not named `.jsonl`.
        ValueError: the threshold is not above 0 and at most 1.
    """
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"the threshold of BM25 similarity must be above 0 and at most 1, got {threshold:g}")
    check_output(output)
    matcher = _Matcher(_evaluation_texts(against, fields, split), threshold)
    counts = Counts(evaluation_texts=len(matcher.texts))
    gone: list[dict[str, Any]] = []

    def kept() -> Iterator[dict[str, Any]]:
        for record in read_records(records, max_bad_records=max_bad_records):
            counts.records += 1
            row = _cleaned(record, matcher, documents, counts, gone)
            if row is not None:
                counts.kept += 1
                yield row
        if not counts.kept:
            raise DataError(f"each of the {counts.records} records of {records} matches an evaluation text")
        write_records(dropped_path(output), gone)  # before the output appears, which says that all is done

    write_records(output, kept())
    return counts


def dropped_path(output: str | Path) -> Path:
    """Where the texts go that were taken out: `a.dropped.jsonl` beside `a.jsonl`."""
    return Path(output).with_suffix(".dropped.jsonl")


def words_of(text: str) -> str:
    """A text as it is compared for equality: its words, with a space between.

    A text of signs only stays what it is, without spaces around it.
    """
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(_WORD.findall(plain)) or plain.strip()


class _Matcher:
    """Evaluation texts, and which of them a text matches."""

    def __init__(self, texts: dict[str, str], threshold: float | None) -> None:
        """
        Args:
            texts: evaluation text -> its file.
            threshold: as in `decontaminate`.
        """
        from nvembed_mcore.evaluation.lexical import MostSimilar

        self.texts = list(texts)
        self._files = list(texts.values())
        self._equal = {words_of(text): number for number, text in reversed(list(enumerate(self.texts)))}
        self._similar = (
            None if threshold is None else MostSimilar(self.texts, tokenize=lambda text: words_of(text).split())
        )
        self._threshold = threshold
        self.match = lru_cache(_REMEMBERED)(self._match)

    def _match(self, text: str) -> Match | None:
        number = self._equal.get(words_of(text))
        if number is not None:
            return Match("exact", self.texts[number], self._files[number], 1.0)
        if self._similar is None:
            return None
        number, score = self._similar.best(text)
        if score < self._threshold:
            return None
        return Match("bm25", self.texts[number], self._files[number], round(score, 4))


def _cleaned(
    record: Record, matcher: _Matcher, documents: bool, counts: Counts, gone: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """The record as a row, without the documents that match; nothing when it goes. What goes is added to `gone`."""
    if found := matcher.match(record.query):
        counts.dropped_exact += found.reason == "exact"
        counts.dropped_bm25 += found.reason == "bm25"
        gone.append(_gone(record, "query", record.query, found))
        return None
    row: dict[str, Any] = {"query": record.query, "query_id": record.query_id}
    first: Match | None = None
    for name, ids_name in (("pos", "pos_ids"), ("neg", "neg_ids")):
        row[name], row[ids_name] = [], []
        scores = record.scores.get(f"{name}_scores")
        row |= {} if scores is None else {f"{name}_scores": []}
        named = zip(getattr(record, name), getattr(record, ids_name), strict=True)
        for number, (text, document_id) in enumerate(named):
            found = matcher.match(text) if documents else None
            if found:
                first = first or found
                gone.append(_gone(record, name, text, found))
            else:
                row[name].append(text)
                row[ids_name].append(document_id)
                if scores is not None:
                    row[f"{name}_scores"].append(scores[number])
    if not row["pos"]:
        counts.dropped_exact += first.reason == "exact"
        counts.dropped_bm25 += first.reason == "bm25"
        return None
    counts.positives += len(record.pos) - len(row["pos"])
    counts.negatives += len(record.neg) - len(row["neg"])
    if record.instruction is not None:
        row["instruction"] = record.instruction
    return row


def _gone(record: Record, field: str, text: str, found: Match) -> dict[str, Any]:
    return {
        "query_id": record.query_id,
        "field": field,
        "text": text,
        "reason": found.reason,
        "score": found.score,
        "matched": found.matched,
        "file": found.file,
    }


def _evaluation_texts(against: Sequence[str | Path], fields: Sequence[str], split: str) -> dict[str, str]:
    """Text -> the file or folder that it comes from."""
    texts: dict[str, str] = {}
    for path in map(Path, against):
        found = list(read_queries(path, split).values()) if path.is_dir() else _file_texts(path, fields)
        if not found:
            raise DataError(f"{path} holds no text")
        for text in found:
            texts.setdefault(text, str(path))
    return texts


def _file_texts(path: Path, fields: Sequence[str]) -> list[str]:
    """The texts of a file of rows, without blank ones."""

    def parse(row: dict[str, Any]) -> list[str]:
        present = [name for name in fields if row.get(name) is not None]
        if not present:
            raise Fault(f"none of the fields {', '.join(fields)} (--fields names others) is there")
        values = [(name, row[name] if isinstance(row[name], list) else [row[name]]) for name in present]
        return [clean(text, name, name) for name, several in values for text in several]

    intake = Intake([path])
    texts = [text for several in intake.rows(parse) for text in several if text]
    intake.stop_if_bad()
    return texts
