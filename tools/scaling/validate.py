"""How far the cost model is from what was measured: by others on their clusters, and by this trainer here.

    PYTHONPATH=. python tools/scaling/validate.py --json validate.json
    PYTHONPATH=. python tools/scaling/validate.py --only published
    PYTHONPATH=. python tools/scaling/validate.py --fit       fits the constants anew, and stores them

from the root of the repository.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

FIGURES = """
figures:
  median_error_published   median of |predicted / published - 1| over step times of all model families but the one that
                           the constants were fitted on; bar 0.07. max_error_published: the largest of them
  median_error_fitted      the same over the family of the fit
  rows_published, rows_fitted
                           how many step times each is over
  median_error_fitted_on_FAMILY
                           with --each-family: the first figure, with constants fitted on that family instead
  max_error_memory         largest |model / allocated - 1| over layouts of a small model on 1, 2 and 4 processes on
                           CPUs in float32: all that torch's allocator had given out at the fullest moment of a step,
                           on the fullest rank of each pipeline stage; bar 0.10. rows_memory: so many
  max_error_memory_gpu     the same on a GPU in bfloat16 and FP8, where there is one
  max_error_bytes          largest error of the bytes that a rank hands to collectives and sends, over the same
                           layouts, all ranks, and each kind and group with a thousandth of them; bar 0.01.
                           rows_bytes: ranks
  median_error_seconds, max_error_seconds
                           |predicted / measured - 1| of steps over two gloo processes (docs/scaling/cpu.csv), with the
                           host's constants fitted on one process; rows_seconds: so many, ..._fitted: those of the fit
  median_spread_seconds    of the measured points: (slowest - fastest repeat) / median
"""


def _published() -> dict[str, float]:
    from validate_published import report

    return report()


def _memory() -> dict[str, float]:
    from validate_memory import report

    return report()


def _bytes() -> dict[str, float]:
    from validate_bytes import report

    return report()


def _seconds() -> dict[str, float]:
    from validate_seconds import report

    return report()


PARTS: dict[str, Callable[[], dict[str, float]]] = {
    "published": _published,
    "memory": _memory,
    "bytes": _bytes,
    "seconds": _seconds,
}
"""Each prints its rows and returns its figures."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=FIGURES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts; default: all")
    parser.add_argument("--fit", action="store_true", help="fit the constants of GPUs and of a CPU, and store them")
    parser.add_argument("--each-family", action="store_true", help="fit on each family in turn too; stores nothing")
    parser.add_argument("--json", metavar="PATH", help="write the figures here as well")
    options = parser.parse_args()
    if options.fit:
        from validate_fit import fit_published
        from validate_published import read_rows
        from validate_seconds import fit_and_store

        fit_published(read_rows())
        fit_and_store()
    figures: dict[str, float] = {}
    for part in options.only:
        figures |= PARTS[part]()
    if options.each_family:
        from validate_fit import each_family
        from validate_published import read_rows

        figures |= each_family(read_rows())
    for name, value in figures.items():
        print(f"{name} {value:.4g}")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
