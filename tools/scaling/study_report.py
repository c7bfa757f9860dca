"""The report of a study: one HTML page with its pictures inside, and these as PNG files."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from study_plots import PICTURES, layout_of, of_a_process, processes
from study_runs import Run, end_of_log
from study_spec import KINDS, Study
from study_table import COLUMNS, Row

from nvembed_mcore import report

_ABOUT = {
    "scaling": "Both axes are logarithmic. Dashed: the smallest run times the number; it is what no waiting, no "
    "communication and no uneven split would give.",
    "efficiency": "Tokens a second and {unit}, over those of the smallest run of the same series, precision and "
    "lengths.",
    "batch": "A larger batch shares what a step costs once (the optimizer, the reduction of gradients) among more "
    "tokens, and fills packs better.",
    "phases": "What a phase waits for counts for the phase. `score` stands apart where the layout has one stage; "
    "`other` is what no phase claims.",
    "memory": "Predictions count tensors. On a CPU what is resident counts as well what the heap keeps of freed "
    "blocks, and what libraries take when they are first used; tools/scaling/validate.py compares tensors alone.",
    "prediction": "Points on the dashed line were predicted as they were measured; above it, a step took longer.",
}
_STYLE = "max-width:100%;height:auto;background:#fff"


def write_report(study: Study, rows: Sequence[Row], runs: Sequence[Run], output: Path, command: str) -> list[Path]:
    """Write `report.html` and a PNG for each picture that the rows have something for.

    Args:
        rows: of points, not of single runs.
        runs: all of the study, complete or not.
        command: that measured them.

    Returns:
        the files.
    """
    pictures = {name: figure for name, (_, draw) in PICTURES.items() if rows and (figure := draw(rows)) is not None}
    files = [output / "report.html"]
    for name, figure in pictures.items():
        files.append(output / f"{name}.png")
        files[-1].write_bytes(_png(figure))
    sections = [("", _summary(study, rows, runs)), *_failures(runs)]
    sections += [(f"Series: {name}", _series(name, rows)) for name in dict.fromkeys(r["series"] for r in rows)]
    for name, figure in pictures.items():
        title = PICTURES[name][0]
        about = _ABOUT[name].format(unit=of_a_process(rows))
        sections.append((title, [*([about] if about else []), _image(figure, title)]))
    sections.append(("How it was measured", _method(study, command)))
    sections.append(("Environment", [_environment(rows)]))
    sections.append(("Columns of the table", [report.verbatim(COLUMNS.strip())]))
    report.save(files[0], report.page(f"Scaling study: {study.name}", sections))
    return files


def _summary(study: Study, rows: Sequence[Row], runs: Sequence[Run]) -> list[str]:
    complete = sum(run.is_complete() for run in runs)
    words = f"{len(rows)} points, {complete} of {len(runs)} runs complete"
    if study.left_out:
        words += f"; {study.left_out} combinations left out, whose layout does not divide their GPUs"
    return [f"{words}. All figures with every digit are in table.csv and table.parquet beside this page."]


def _failures(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    failed = [run for run in runs if run.was_tried() and not run.is_complete()]
    parts = []
    for run in failed:
        parts += [report.marked(f"{run.point.name}, repeat {run.repeat}", "bad"), report.verbatim(end_of_log(run))]
    return [("Runs that failed", parts)] if failed else []


def _series(name: str, rows: Sequence[Row]) -> list[str]:
    """What the points of a series are, and what they did: two tables."""
    some = [row for row in rows if row["series"] == name]
    unit = of_a_process(rows)
    kind = some[0]["kind"]
    place = [processes(rows), "layout", "queries"]
    what = [*place, "texts", "tokens of a text", "type", "way", "packs", "real tokens", "fill", "s/step", "p95"]
    did = [*place, "spread", f"tokens/s/{unit}", f"TF/s/{unit}", "MFU", "efficiency", "communication", "GB"]
    is_predicted = any("predicted_seconds" in row for row in rows)
    did += ["predicted s/step", "low to high", "predicted GB"] if is_predicted else []
    return [
        f"{kind}: {KINDS[kind]}",
        report.table(what, [_what(row) for row in some]),
        report.table(did, [_did(row)[: len(did)] for row in some]),
    ]


def _place(row: Row) -> list[Any]:
    return [row["gpus"], _unbroken(layout_of(row)), row["queries"]]


def _what(row: Row) -> list[Any]:
    limits = f"{row['query_tokens']} / {row['document_tokens']}"
    return [
        *_place(row),
        row["texts"],
        _unbroken(limits if row["synthetic"] else f"up to {limits}"),
        _unbroken(row["dtype"] if row["fp8"] == "off" else f"{row['dtype']}, FP8 {row['fp8']}"),
        _unbroken(row["way"]),
        row["microbatches"],
        row["real_tokens"],
        _percent(row["fill"]),
        row["seconds"],
        row["seconds_p95"],
    ]


def _did(row: Row) -> list[Any]:
    memory = row["memory_bytes"] if row["device"] != "cpu" else row["model_memory_bytes"]
    predicted = row.get("predicted_memory_bytes")
    ends = [row.get(f"predicted_seconds_{end}") for end in ("low", "high")]
    return [
        *_place(row),
        _percent(row["spread"]),
        round(row["tokens_per_second_per_gpu"]),
        f"{row['tflops_per_gpu']:.3g}",
        _percent(row["mfu"]),
        _percent(row["efficiency"]),
        _percent(row["communication_share"]),
        memory / 1e9,
        row.get("predicted_seconds"),
        None if ends[0] is None else _unbroken(f"{ends[0]:.3f} to {ends[1]:.3f}"),
        None if predicted is None else predicted / 1e9,
    ]


def _unbroken(text: str) -> report.Html:
    return report.Html(f'<span style="white-space:nowrap">{html.escape(text)}</span>')


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f}%"


def _method(study: Study, command: str) -> list[str]:
    every = study.communication_every
    timed = f"In every {every}th step communication is timed, and the step does not count. " if every else ""
    return [
        f"A run is `nvembed train` with {study.all_steps} steps: {study.warmup_steps} to warm up, {study.steps} "
        f"measured. {timed}Nothing is saved or evaluated. {study.repeats} run(s) a point, in turns: every point once, "
        "then again. Seconds are medians over all measured steps of all repeats; `spread` is how far apart the "
        "repeats' own medians are.",
        report.verbatim(command),
        report.verbatim(study.file.read_text(encoding="utf-8")),
    ]


def _environment(rows: Sequence[Row]) -> report.Html:
    """What the runs ran with; all values where they differ."""
    names = ("device", "cores", "host", "nvembed_mcore", "torch", "megatron_core", "transformers", "commit", "date")
    found: Mapping[str, list[str]] = {
        name: list(dict.fromkeys(str(row.get(name)) for row in rows if row.get(name) is not None)) for name in names
    }
    found = found | {"date": [f"{min(found['date'])} to {max(found['date'])} (UTC)"]} if found["date"] else found
    return report.table(["", ""], [(name, ", ".join(values)) for name, values in found.items()])


def _png(figure: Figure) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _image(figure: Figure, title: str) -> report.Html:
    data = base64.b64encode(_png(figure)).decode()
    return report.Html(f'<figure><img alt="{title}" style="{_STYLE}" src="data:image/png;base64,{data}"></figure>')
