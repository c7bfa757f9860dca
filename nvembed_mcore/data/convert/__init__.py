"""Published layouts of training sets as records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nvembed_mcore.data.convert import pairs, questions, synthetic, tasks
from nvembed_mcore.data.convert.intake import Counts, Draft, Intake, check_output
from nvembed_mcore.data.records import write_records

LAYOUTS: dict[str, Callable[..., Iterator[Draft]]] = {
    "classification": tasks.classification,
    "clustering": tasks.clustering,
    "sts": pairs.sts,
    "nli": pairs.nli,
    "pairs": pairs.pairs,
    "squad": questions.squad,
    "dpr": questions.dpr,
    "hotpotqa": questions.hotpotqa,
    "bioasq": questions.bioasq,
    "hover": questions.hover,
    "synthetic": synthetic.synthetic,
}


def convert(
    layout: str,
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    sample: int | None = None,
    seed: int = 0,
    max_bad_records: int = 0,
    overwrite: bool = False,
    **options: Any,
) -> Counts:
    """Turn the files of a published set into one file of records.

    The result is a pure function of the sources, their order and the options. The file is written aside and renamed.

    Args:
        layout: a key of `LAYOUTS`.
        sources: files of that layout.
        output: the JSONL file to write.
        sample: draw so many records at random instead of writing all.
        seed: decides what is drawn.
        max_bad_records: so many bad rows are left out.
        overwrite: replace `output`. Where it exists, a source may have been taken for it.
        options: keywords of the layout's function.

    Raises:
        DataError: `output` exists or is not named `.jsonl`, or a source cannot be read, has more bad rows than
            allowed, or gives no record.
    """
    check_output(output, overwrite=overwrite)
    intake = Intake(sources, max_bad_records, seed)
    write_records(output, intake.records(LAYOUTS[layout](intake, **options), sample))
    return intake.counts
