"""Examples of what was found: places from record numbers, texts by reading a few blocks again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from nvembed_mcore.data.check.findings import Finding, Shown
from nvembed_mcore.data.check.repeats import Example
from nvembed_mcore.data.check.scan import Facts, hashes_of
from nvembed_mcore.data.records import Record, parse_block
from nvembed_mcore.data.sources import blocks

LONGEST = 160
"""Characters of a text that are shown."""
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(slots=True)
class Unshown:
    """A finding whose examples are numbers still.

    Attributes:
        kind, count, of, what: as in `Finding`.
        dataset: number of the set whose record an example names first.
        examples: of them.
        other: number of the set of an example's other record; None: the same.
        more: a place that stands behind those of each example.
    """

    kind: str
    count: int
    of: int | None
    what: str
    dataset: int
    examples: list[Example]
    other: int | None = None
    more: list[str] = field(default_factory=list)

    def records(self, example: Example) -> list[tuple[int, int]]:
        """(data set, record) of each of an example's records, no one twice."""
        other = self.dataset if self.other is None else self.other
        return list(dict.fromkeys(zip((self.dataset, other), example.records, strict=False)))


@dataclass(slots=True)
class RecordIndex:
    """Where the records of a set stand: for each block its file, number of its first record, and lines, uint32."""

    path: str
    files: list[str]
    starts: np.ndarray
    lines: list[np.ndarray]

    @classmethod
    def of(cls, path: str, chunks: Sequence[Facts]) -> RecordIndex:
        sizes = [len(chunk.lines) for chunk in chunks]
        starts = np.cumsum([0, *sizes])[:-1]
        return cls(path, [chunk.path for chunk in chunks], starts, [chunk.lines for chunk in chunks])

    def locate(self, record: int) -> tuple[int, int]:
        """Number of its block, and of the record in it."""
        block = int(np.searchsorted(self.starts, record, "right")) - 1
        return block, record - int(self.starts[block])

    def place(self, record: int) -> str:
        block, row = self.locate(record)
        return f"{self.files[block]}:{self.lines[block][row]}"

    def read(self, wanted: set[int]) -> Iterator[tuple[int, Record]]:
        """Some records, by reading their blocks again."""
        rows: dict[int, list[tuple[int, int]]] = {}
        for record in wanted:
            block, row = self.locate(record)
            rows.setdefault(block, []).append((record, row))
        if not rows:
            return
        for number, block in enumerate(blocks(self.path)):
            if number in rows:
                parsed = parse_block(block)
                records = dict(zip(parsed.lines, parsed.records, strict=True))
                lines = self.lines[number].tolist()
                yield from ((record, records[lines[row]]) for record, row in rows[number] if lines[row] in records)
            if number == max(rows):
                return


def show(indexes: Sequence[RecordIndex], findings: Sequence[Unshown]) -> list[Finding]:
    """Findings with the places and texts of their examples."""
    wanted = {one for finding in findings for example in finding.examples for one in finding.records(example)}
    records = {
        (number, record): found
        for number, index in enumerate(indexes)
        for record, found in index.read({record for dataset, record in wanted if dataset == number})
    }
    return [
        Finding(
            finding.kind,
            finding.count,
            finding.of,
            finding.what,
            [_shown(indexes, records, finding, number) for number in range(len(finding.examples))],
        )
        for finding in findings
    ]


def _shown(
    indexes: Sequence[RecordIndex], records: dict[tuple[int, int], Record], finding: Unshown, number: int
) -> Shown:
    example = finding.examples[number]
    owners = finding.records(example)
    places = [indexes[dataset].place(record) for dataset, record in owners]
    texts: dict[int, str] = {}
    ids: list[str] = []
    for record in (records[owner] for owner in owners if owner in records):
        documents = list(zip((*record.pos, *record.neg), (*record.pos_ids, *record.neg_ids), strict=True))
        hashes = hashes_of([record.query, *(text for text, _ in documents)]).tolist()
        for text_hash, (text, name) in zip(hashes, [(record.query, ""), *documents], strict=True):
            if text_hash in example.texts:
                texts[text_hash] = shortened(text)
                ids += [name] if name else []
    return Shown(
        places + finding.more[number : number + 1],
        [texts[text_hash] for text_hash in dict.fromkeys(example.texts) if text_hash in texts],
        list(dict.fromkeys(ids)) if finding.kind in ("several_ids", "several_texts", "clashing_ids") else [],
    )


def shortened(text: str) -> str:
    """A text on one line, its beginning if it is long; without what a terminal would take for commands."""
    line = _CONTROLS.sub("\ufffd", " ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"
