"""Checkpoint folders that a test changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nvembed_mcore.checkpoint.manifest import MANIFEST, hash_of, write_manifest


def rewrite(file: Path, facts: Any) -> None:
    """Give a checkpoint folder another `run.json`."""
    file.write_text(json.dumps(facts))
    seal(file.parent)


def seal(folder: Path, step: int | None = None) -> None:
    """Write the manifest of what a folder has now, as if it had been written so."""
    if step is None:
        step = json.loads((folder / MANIFEST).read_text())["step"]
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    write_manifest(
        folder, step, {path.relative_to(folder).as_posix(): (path.stat().st_size, hash_of(path)) for path in files}
    )
