"""One tidy table of a study: a row for each run, and one for each point over all its repeats."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet
from study_runs import Run
from study_slurm import shape
from study_spec import LENGTHS, Study

from nvembed_mcore.run_record import RUN_FILE

COLUMNS = """
row                       `run`: one repeat; `point`: all repeats of a point together
series, kind, point       kind: weak (the batch grows with the GPUs), strong (it stays), batch (it varies)
repeat                    number of the run; empty for a point
nodes, gpus               gpus: processes, each with a GPU of its own where there are GPUs
tp, pp, cp, dp, chunks    sizes of tensor, pipeline, context and data parallelism; model chunks of a stage
way                       what a step keeps between its phases (docs/design.md, The step)
dtype, fp8                precision.dtype, `auto` as the device decides it, and precision.fp8
query_tokens, document_tokens, synthetic
                          limits of texts; synthetic: every text is as long as its limit
queries, texts            of the global batch; texts: queries and documents (GBS)
microbatches              packs of the rank with the most
real_tokens, padded_tokens, fill
                          of a step, of all ranks: those of texts, those that went through the model, their ratio
steps                     measured: behind the warm-up, and without those in which communication was timed
seconds, seconds_p95      of a step: median, 95th percentile
seconds_PHASE             median of a phase (data, embed, score, backward, optimizer), as rank 0 had it
spread                    of the repeats' medians: (largest - smallest) / median; of points with several
tokens_per_second, tokens_per_second_per_gpu
                          real tokens: median over steps
tflops_per_gpu            model FLOPs a second (nvembed_mcore/metrics.py: real tokens, nothing that is computed twice;
                          with adapters 4 a frozen weight and token, not 6), 10^12
mfu                       of the device's peak for the data type; empty where it is not known
efficiency                tokens_per_second_per_gpu over that of the fastest of the points with the fewest GPUs in the
                          same series at the same precision and lengths (`batch`: and the same batch)
communication_seconds, communication_share
                          seconds in which a rank (mean of all) communicated or waited to, when each collective is
                          waited for as soon as it begins; share: of the same steps. What overlaps in the other steps
                          counts, so it is the most that communication can cost
communication_seconds_GROUP, bytes_GROUP
                          by group of ranks; bytes: those that the first rank hands in, a step, as its log has them
memory_bytes              most that a rank held at any time: of tensors on a GPU; without one, what is resident
model_memory_bytes        less what the same process held before it built the model
others_cpu                share of this machine's cores that went to other processes meanwhile, those of low priority
                          (nice) left out; empty under SLURM
predicted_seconds, predicted_seconds_low, predicted_seconds_high, predicted_memory_bytes
                          by nvembed_mcore/scaling for the study's cluster
device, cores, host, date, commit, VERSION of each package
"""
PHASES = ("data", "embed", "score", "backward", "optimizer")
_TRAFFIC = re.compile(r"^ {2}(\w+) over ([\w ]+) ranks: \d+ x, ([\d.]+) MB$", re.MULTILINE)
_WAY = re.compile(r"collectives of step 1 on this rank \(way (\w+)\)")

Row = dict[str, Any]


def rows_of(study: Study, runs: Sequence[Run]) -> list[Row]:
    """The table without predictions; runs that are not complete have no row."""
    complete: dict[str, list[Run]] = {}
    for run in runs:
        if run.is_complete():
            complete.setdefault(run.point.name, []).append(run)
    rows = []
    for repeats in complete.values():
        each = [_row(study, [run]) | {"row": "run", "repeat": run.repeat} for run in repeats]
        medians = [row["seconds"] for row in each]
        spread = (max(medians) - min(medians)) / statistics.median(medians) if len(medians) > 1 else None
        both = _row(study, repeats) | {"spread": spread}
        both |= {"memory_bytes": _middle(each, "memory_bytes")}
        both |= {"model_memory_bytes": _middle(each, "model_memory_bytes")}
        loads = [row["others_cpu"] for row in each if row["others_cpu"] is not None]
        both |= {"others_cpu": statistics.median(loads) if loads else None}
        rows += [both | {"row": "point"}, *each]
    _add_efficiency(rows)
    return rows


def points_of(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["row"] == "point"]


def _row(study: Study, repeats: Sequence[Run]) -> Row:
    """What the runs of one point measured, their steps taken together."""
    run = repeats[0]
    lines = [line for one in repeats for line in one.lines() if line["step"] > study.warmup_steps]
    plain = [line for line in lines if not study.times_communication(line["step"])]
    timed = [line for line in lines if study.times_communication(line["step"])]
    row = _place(study, run) | _measured(plain, run.point.gpus) | _communication(timed) | _facts(run)
    if row["dtype"] == "auto":
        row["dtype"] = "float32" if row["device"] == "cpu" else "bfloat16"
    return row


def _place(study: Study, run: Run) -> Row:
    """Where in the study it stands."""
    point = run.point
    layout = point.layout
    queries, documents = LENGTHS.values()
    limits = study.base.get("data", {})
    return {
        "row": None,
        "series": point.series,
        "kind": point.kind,
        "point": point.name,
        "repeat": None,
        "nodes": shape(run, study.gpus_per_node)[0],
        "gpus": point.gpus,
        **layout,
        "dp": point.gpus // (layout["tp"] * layout["pp"] * layout["cp"]),
        "way": None,
        "dtype": _field(study, point.fields, "precision.dtype", "auto"),
        "fp8": _field(study, point.fields, "precision.fp8", "off"),
        "query_tokens": point.fields.get(queries, limits.get("max_query_tokens", 512)),
        "document_tokens": point.fields.get(documents, limits.get("max_document_tokens", 512)),
        "synthetic": point.synthetic,
        "queries": point.queries,
    }


def _field(study: Study, fields: Mapping[str, Any], dotted: str, default: str) -> str:
    part, name = dotted.split(".")
    return fields.get(dotted, study.base.get(part, {}).get(name, default))


def _measured(lines: Sequence[dict[str, float]], gpus: int) -> Row:
    def middle(name: str) -> float:
        return statistics.median(line[name] for line in lines)

    real, padded = middle("real_tokens"), middle("padded_tokens")
    row = {
        "texts": round(middle("texts")),
        "microbatches": round(middle("microbatches")),
        "real_tokens": round(real),
        "padded_tokens": round(padded),
        "fill": sum(line["real_tokens"] for line in lines) / sum(line["padded_tokens"] for line in lines),
        "steps": len(lines),
        "seconds": middle("seconds"),
        "seconds_p95": float(np.percentile([line["seconds"] for line in lines], 95)),
        # A first stage has no scores.
        **{
            f"seconds_{phase}": statistics.median(line.get(f"seconds_{phase}", 0.0) for line in lines)
            for phase in PHASES
        },
        "spread": None,
        "tokens_per_second": middle("tokens_per_second"),
    }
    row["tokens_per_second_per_gpu"] = row["tokens_per_second"] / gpus
    row["tflops_per_gpu"] = statistics.median(line["flops"] / line["seconds"] for line in lines) / gpus / 1e12
    row["mfu"] = middle("mfu") if "mfu" in lines[0] else None
    return row | {"efficiency": None}


def _communication(timed: Sequence[dict[str, float]]) -> Row:
    """Of the steps in which it was timed; a single process does not communicate."""
    if not timed:
        return {"communication_seconds": None, "communication_share": None}
    names = sorted({name for line in timed for name in line if name.startswith("communication_seconds_")})
    seconds = {
        name: statistics.median(line.get(name, 0.0) for line in timed) for name in ["communication_seconds", *names]
    }
    share = statistics.median(line.get("communication_seconds", 0.0) / line["seconds"] for line in timed)
    return {**seconds, "communication_share": share}


def _facts(run: Run) -> Row:
    """What the run's record and its log say."""
    record = json.loads((run.folder / RUN_FILE).read_text(encoding="utf-8"))
    attempt = record["attempts"][-1]
    log = (run.folder / "logs" / f"{attempt['number']:04d}" / "rank-0.log").read_text(encoding="utf-8")
    found = _WAY.findall(log)
    sizes: dict[str, float] = {}
    for _, group, megabytes in _TRAFFIC.findall(log):
        name = f"bytes_{group.replace(' ', '_')}"
        sizes[name] = sizes.get(name, 0.0) + float(megabytes) * 1e6
    memory = attempt["peak_memory"]
    load = json.loads(run.load.read_text(encoding="utf-8")) if run.load.exists() else {"others_cpu": None}
    return {
        "way": found[-1] if found else None,
        **sizes,
        "memory_bytes": memory["bytes"],
        "model_memory_bytes": memory["bytes"] - memory["bytes_before_model"],
        **load,
        "device": attempt["hardware"]["device"],
        "cores": attempt["hardware"]["cores"],
        "host": attempt["host"],
        "date": attempt["end"][:19],
        "commit": record["commit"],
        **{name.replace("-", "_"): version for name, version in record["versions"].items()},
    }


def _middle(rows: Sequence[Row], name: str) -> int:
    return round(statistics.median(row[name] for row in rows))


def _add_efficiency(rows: Sequence[Row]) -> None:
    def group(row: Row) -> tuple:
        names = ("series", "dtype", "fp8", "query_tokens", "document_tokens", "synthetic")
        return tuple(row[name] for name in names) + ((row["queries"],) if row["kind"] == "batch" else ())

    for row in rows:
        alike = [one for one in points_of(rows) if group(one) == group(row)]
        fewest = min(one["gpus"] for one in alike)
        base = max(one["tokens_per_second_per_gpu"] for one in alike if one["gpus"] == fewest)
        row["efficiency"] = row["tokens_per_second_per_gpu"] / base


def write_table(rows: Sequence[Row], output: Path) -> None:
    """`table.parquet` and `table.csv`."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    pa_parquet.write_table(table, output / "table.parquet")
    pa_csv.write_csv(table, output / "table.csv")
