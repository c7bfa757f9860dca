"""Run the golden run and store its numbers in tests/golden/train.json; the reason for it goes into CHANGELOG.md.

Run from the root of the repository: OMP_NUM_THREADS=1 PYTHONPATH=. python tools/golden.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

from tests.helpers.golden import FILE, read_golden, run_golden
from tests.helpers.world import World


def main() -> None:
    world = World(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            (found,) = world.run(run_golden, Path(folder) / "golden")
    finally:
        world.stop()
    if FILE.is_file():
        for name, values in read_golden().items():
            print(f"{name}: largest relative change {np.abs(np.divide(found[name], values) - 1).max():.1e}")
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written: {FILE}")


if __name__ == "__main__":
    main()
