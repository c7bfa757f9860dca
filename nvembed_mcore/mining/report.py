"""The report of a mining run: `report.json`, `report.html`, and the lines of a short table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nvembed_mcore import report
from nvembed_mcore.mining.findings import RANKS, Findings, Suspect
from nvembed_mcore.mining.inputs import Inputs

_SHOWN_CHARACTERS = 600
"""Of each text of a suspect."""
_ABOUT_SUSPECTS = (
    "The best candidate of a query where it scores above the limit or above a positive, those farthest above the "
    "positive first. Read some: where many answer the query, they are positives that nobody labelled, and the limit "
    "keeps them out; where most do not, the labels or the model are at fault."
)
_ABOUT_SCORES = (
    "Best candidates are what plain top-k would take: the best documents that are no positive of the query and no "
    "copy of one or of each other. Chosen negatives are what the records have now."
)


def write_report(
    output: Path, findings: Findings, inputs: Inputs, settings: dict[str, Any], fingerprints: dict[str, Any]
) -> dict[str, Any]:
    """Write `report.json` and `report.html` into a folder; returns the figures."""
    figures = findings.figures()
    suspects = [_with_texts(suspect, inputs) for suspect in findings.suspects]
    content = {"figures": figures, "settings": settings, "fingerprints": fingerprints, "suspects": suspects}
    report.save(output / "report.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    report.save(output / "report.html", _page(findings, content))
    return figures


def summary(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of a short table: a name and a figure each."""
    total = figures["records"]

    def of(name: str) -> str:
        return f"{figures[name]:,} ({figures[name] / total:.1%})"

    return [
        ("records", f"{total:,}"),
        ("documents", f"{figures['documents']:,}"),
        ("negatives mined", f"{figures['negatives']:,} ({figures['negatives'] / total:.2f} a record)"),
        ("with too few negatives", of("records_with_too_few_negatives")),
        ("without any", of("records_without_negatives")),
        ("with candidates above the limit", of("records_with_candidates_above_the_limit")),
        *(
            (f"positive in the first {rank}" if rank > 1 else "positive first", of(f"positive_in_first_{rank}"))
            for rank in RANKS
        ),
        ("positive beyond all candidates", of("positive_not_found")),
    ]


def _with_texts(suspect: Suspect, inputs: Inputs) -> dict[str, Any]:
    """A suspect with the texts of its query, positive and document."""
    positive, corpus = suspect["positive"], inputs.documents
    beyond = positive - len(corpus)
    return {
        "query": inputs.queries.texts[suspect["record"]],
        "positive": corpus.texts[positive] if beyond < 0 else inputs.others.texts[beyond],
        "document": corpus.texts[suspect["document"]],
        "document_id": corpus.ids[suspect["document"]],
        "record": suspect["record"] + 1,
        "score": round(suspect["score"], 6),
        "positive_score": round(suspect["positive_score"], 6),
        "used": suspect["used"],
    }


def _page(findings: Findings, content: dict[str, Any]) -> str:
    figures = content["figures"]
    spread = {name: values for name, values in figures["scores"].items() if values}
    names = list(next(iter(spread.values())))
    suspects = [
        [
            one["score"],
            one["positive_score"],
            _cut(one["query"]),
            _cut(one["document"]),
            _cut(one["positive"]),
            report.marked("used", "bad") if one["used"] else "left out",
        ]
        for one in content["suspects"]
    ]
    return report.page(
        "Hard negatives",
        [
            ("Figures", [report.table(["", ""], summary(figures))]),
            (
                "Scores",
                [
                    _ABOUT_SCORES,
                    report.histogram(findings.scores(), "Cosine with the query", "cosine"),
                    report.table(["", *names], [[name, *values.values()] for name, values in spread.items()]),
                ],
            ),
            (
                "Suspected positives among the candidates",
                [
                    _ABOUT_SUSPECTS,
                    report.table(["score", "positive's", "query", "candidate", "positive", ""], suspects)
                    if suspects
                    else "None.",
                ],
            ),
            ("Settings", [report.table(["", ""], _flat(content["settings"]))]),
            ("Fingerprints", [report.table(["", ""], _flat(content["fingerprints"]))]),
        ],
    )


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _flat(tree: dict[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Names with dots, and values as they are written in JSON."""
    rows = []
    for name, value in tree.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{above}{name}.")
        else:
            rows.append((above + name, value if isinstance(value, str) else json.dumps(value)))
    return rows
