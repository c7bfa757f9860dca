"""The check of data sets before a run: everything is read once by all cores, and only hashes are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from nvembed_mcore.config import DatasetConfig
from nvembed_mcore.data.bare_tokenizer import BareTokenizer
from nvembed_mcore.data.check import repeats
from nvembed_mcore.data.check.examples import RecordIndex, Unshown, show
from nvembed_mcore.data.check.findings import COUNTS, CheckReport, Finding, Lengths, SetReport
from nvembed_mcore.data.check.leakage import EvaluationSet, Leak, read_evaluation
from nvembed_mcore.data.check.scan import FIELDS, KINDS, SHOWN_PROBLEMS, Facts, scan, start
from nvembed_mcore.data.check.scores import Scores
from nvembed_mcore.data.faults import DataError, Problems
from nvembed_mcore.data.files import Block
from nvembed_mcore.data.prompts import check_room
from nvembed_mcore.data.sources import blocks
from nvembed_mcore.data.tokenizer import load_tokenizer
from nvembed_mcore.data.workers import ordered_map


@dataclass(slots=True)
class _Gathered:
    """What the blocks of one set said so far."""

    config: DatasetConfig
    problems: Problems
    leaks: list[dict[str, Leak]]
    chunks: list[Facts] = field(default_factory=list)
    lengths: dict[str, Counter[int]] = field(default_factory=lambda: {name: Counter() for name in FIELDS})
    records: int = 0
    blank_negatives: int = 0
    error: str = ""
    scores: Scores = field(default_factory=Scores)

    def add(self, facts: Facts) -> None:
        self.problems.count += facts.num_problems
        room = SHOWN_PROBLEMS - len(self.problems.shown)
        self.problems.shown += [f"  {problem}" for problem in facts.problems[:room]]
        self.blank_negatives += facts.blank_negatives
        self.scores.add(facts.scores)
        self.error = self.error or facts.error
        for name, (lengths, counts) in facts.lengths.items():
            self.lengths[name].update(dict(zip(lengths.tolist(), counts.tolist(), strict=True)))
        for leaks, hits in zip(self.leaks, facts.hits, strict=False):  # a block without records has no hits
            for kind in KINDS:
                leaks[kind].add(hits[kind], self.records)
        self.records += len(facts.lines)
        facts.lengths, facts.hits, facts.problems = {}, [], []
        self.chunks.append(facts)


@dataclass(slots=True)
class _Checked:
    """A set whose blocks are all read: its report, without examples, and what is compared with other sets."""

    report: SetReport
    index: RecordIndex
    unshown: list[Unshown]
    queries: repeats.Queries | None = None
    documents: repeats.Documents | None = None


def check_sets(
    datasets: Sequence[DatasetConfig],
    *,
    tokenizer: str | None,
    max_query_tokens: int,
    max_document_tokens: int,
    max_bad_records: int = 0,
    against: Sequence[str] = (),
    needs_scores: bool = False,
    processes: int | None = None,
) -> CheckReport:
    """Read data sets as a run would, and say what is in them and what is wrong.

    Args:
        datasets: paths and instructions.
        tokenizer: folder of the tokenizer; None: lengths are in characters, and nothing is said of limits.
        max_query_tokens, max_document_tokens: limits with prompt and special tokens.
        max_bad_records: so many bad lines of a set are skipped.
        against: BEIR folders or files of records whose texts must not be in the data sets.
        needs_scores: whether the run distils, so that a record without a teacher's scores is a bad line.
        processes: workers; None: one a core, 32 at most. The report does not depend on it.

    Raises:
        DataError: an evaluation set cannot be read, or a worker was ended from outside.
        TokenizerError: the tokenizer cannot be loaded.
    """
    limits = {"query": max_query_tokens, "pos": max_document_tokens, "neg": max_document_tokens}
    evaluation = [read_evaluation(path, processes) for path in against]
    gathered = [
        _Gathered(
            config,
            Problems(config.path, allowed=max_bad_records),
            [{kind: Leak(np.zeros(len(getattr(one.known, kind)), bool)) for kind in KINDS} for one in evaluation],
        )
        for config in datasets
    ]
    bare = None if tokenizer is None else BareTokenizer.of(load_tokenizer(tokenizer))
    if bare is not None:
        _check_rooms(gathered, bare, max_query_tokens, max_document_tokens)
    checked: list[_Checked] = []
    scanner = (datasets, bare, max_query_tokens, [one.known for one in evaluation], needs_scores)
    for facts in ordered_map(scan, _blocks(gathered), processes=processes, start=start, start_arguments=scanner):
        while len(checked) < facts.dataset:
            checked.append(_checked(gathered, len(checked), evaluation, limits if tokenizer else {}))
        gathered[facts.dataset].add(facts)
    while len(checked) < len(datasets):
        checked.append(_checked(gathered, len(checked), evaluation, limits if tokenizer else {}))
    return _report("tokens" if tokenizer else "characters", checked)


def _blocks(gathered: Sequence[_Gathered]) -> Iterator[tuple[int, Block]]:
    """Number of the set and block, of all sets; a set that cannot be read on does not keep the others from it."""
    for number, one in enumerate(gathered):
        try:
            yield from ((number, block) for block in blocks(one.config.path))
        except (DataError, OSError) as error:
            one.error = one.error or str(error)


def _check_rooms(
    gathered: Sequence[_Gathered], tokenizer: BareTokenizer, query_limit: int, document_limit: int
) -> None:
    """Whether each instruction leaves room for a text, as the token store asks."""
    for one in gathered:
        instruction = one.config.instruction if one.config.instructs_documents else ""
        try:
            check_room(tokenizer, one.config.instruction, query_limit)
            check_room(tokenizer, instruction, document_limit)
        except ValueError as error:
            one.error = f"{one.config.path}: {error}"


def _checked(
    gathered: Sequence[_Gathered], number: int, evaluation: Sequence[EvaluationSet], limits: dict[str, int]
) -> _Checked:
    """Analyse a set whose blocks are all there, and forget its documents."""
    one = gathered[number]
    counts = dict.fromkeys(COUNTS, 0) | {"bad_lines": one.problems.count}
    lengths = {name: Lengths(one.lengths[name], limits.get(name)) for name in FIELDS}
    report = SetReport(one.config.path, counts, lengths, one.problems, [], one.error, one.scores)
    checked = _Checked(report, RecordIndex.of(one.config.path, one.chunks), [])
    if one.records:
        checked.queries = repeats.find_queries(one.chunks)
        documents = checked.documents = repeats.find_documents(one.chunks)
        negatives = [chunk.counts["neg"] for chunk in one.chunks]
        counts |= {
            "records": one.records,
            "distinct_queries": len(checked.queries.distinct),
            "positives": sum(len(chunk.texts["pos"]) for chunk in one.chunks),
            "negatives": sum(len(chunk.texts["neg"]) for chunk in one.chunks),
            "distinct_documents": len(documents.distinct),
            "records_without_negatives": sum(int((some == 0).sum()) for some in negatives),
        }
        checked.unshown = [
            *_repeats(one.chunks, number, counts, checked.queries, documents),
            *_leaks(one, number, evaluation),
        ]
    if 0 < one.scores.records < one.records:
        lacking = one.records - one.scores.records
        what = "records without a teacher's scores, which others have"
        checked.unshown.append(Unshown("missing_scores", lacking, one.records, what, number, []))
    if one.blank_negatives:
        of = counts["negatives"] + one.blank_negatives
        checked.unshown.append(
            Unshown("blank_negatives", one.blank_negatives, of, "blank negatives, left out", number, [])
        )
    if one.problems.count and not one.problems.too_many:
        what = f"bad lines, skipped ({one.problems.allowed:,} allowed)"
        checked.unshown.append(Unshown("bad_lines", one.problems.count, None, what, number, []))
    one.chunks = []
    return checked


def _repeats(
    chunks: Sequence[Facts],
    number: int,
    counts: dict[str, int],
    queries: repeats.Queries,
    documents: repeats.Documents,
) -> Iterator[Unshown]:
    repeated_pairs, false_negatives = repeats.find_pairs(chunks)
    own = repeats.own_positives(chunks)
    for kind, found, of, what in (
        ("repeated_queries", queries.repeated, "records", "records with the query of an earlier one"),
        ("repeated_pairs", repeated_pairs, "positives", "positives that stood with the same query before"),
        ("own_positives", own, "negatives", "negatives that are a positive of their own record"),
        (
            "false_negatives",
            false_negatives,
            "negatives",
            "negatives that are a positive of the same query in another record",
        ),
        (
            "several_ids",
            documents.several_ids,
            "distinct_documents",
            "documents under several ids, which can be negatives of themselves",
        ),
        (
            "several_texts",
            documents.several_texts,
            None,
            "ids of several texts, which are never negatives of each other",
        ),
    ):
        if found.count:
            yield Unshown(kind, found.count, counts[of] if of else None, what, number, found.examples)


def _leaks(one: _Gathered, number: int, evaluation: Sequence[EvaluationSet]) -> Iterator[Unshown]:
    for evaluated, leaks in zip(evaluation, one.leaks, strict=True):
        for kind in KINDS:
            leak = leaks[kind]
            if leak.records:
                what = f"{kind} of {evaluated.path}, in {leak.records:,} record{'s' if leak.records > 1 else ''}"
                examples, at = zip(*leak.examples, strict=True)
                places = [evaluated.places[kind][place] for place in at]
                count, of = int(leak.found.sum()), len(leak.found)
                yield Unshown(f"leaked_{kind}", count, of, what, number, list(examples), more=places)


def _report(unit: str, checked: Sequence[_Checked]) -> CheckReport:
    """All sets with their examples, and what they have in common."""
    across = list(_across(checked))
    shown = show([one.index for one in checked], [*(found for one in checked for found in one.unshown), *across])
    for one in checked:
        one.report.warnings = shown[: len(one.unshown)]
        del shown[: len(one.unshown)]
    return CheckReport(unit, [one.report for one in checked], _together(checked, shown))


def _across(checked: Sequence[_Checked]) -> Iterator[Unshown]:
    """What every two sets have in common that they should not."""
    read = [number for number, one in enumerate(checked) if one.report.counts["records"]]
    for one, other in combinations(read, 2):
        names = f"in {checked[one].report.path} and in {checked[other].report.path}"
        for kind, found, what in (
            ("shared_queries", repeats.shared_queries(checked[other].queries, checked[one].queries), "queries"),
            (
                "clashing_ids",
                repeats.clashing_ids(checked[other].documents, checked[one].documents),
                "ids of one text in one set and another in the other, which are never negatives of each other,",
            ),
        ):
            if found.count:
                yield Unshown(kind, found.count, None, f"{what} {names}", other, found.examples, other=one)


def _together(checked: Sequence[_Checked], across: list[Finding]) -> SetReport:
    """All sets as one."""
    reports = [one.report for one in checked]
    counts = {name: sum(report.counts[name] for report in reports) for name in COUNTS}
    counts["distinct_queries"] = repeats.count_distinct([one.queries.distinct for one in checked if one.queries])
    counts["distinct_documents"] = repeats.count_distinct([one.documents.distinct for one in checked if one.documents])
    lengths = {
        name: Lengths(sum((report.lengths[name].counts for report in reports), Counter()), limits.limit)
        for name, limits in reports[0].lengths.items()
    }
    return SetReport("all", counts, lengths, Problems("all"), across)
