"""`RUN/checkpoints/best`: which checkpoint had the best evaluation. One small JSON file, replaced as a whole.

It is written before `latest` names the same checkpoint, so a run that is killed in between goes on from an older one,
evaluates again, and finds what the file says.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from nvembed_mcore.status import write_json

log = logging.getLogger(__name__)

BEST = "best"


@dataclass(frozen=True)
class Best:
    """What the file says."""

    step: int
    metric: str
    """`eval.metric`; larger is better."""
    value: float
    test_sets: str
    """Fingerprint of what it was measured on (`evaluation.encode.RetrievalEvaluation`)."""

    def beats(self, other: Best | None) -> bool:
        """Whether this is better than what was the best so far; anything is that cannot be compared with it."""
        if other is None or (self.metric, self.test_sets) != (other.metric, other.test_sets):
            return True
        return self.value > other.value


def read_best(root: Path) -> Best | None:
    """The best checkpoint of a run's `checkpoints/`; None where there is none.

    Raises:
        ValueError: the file does not say what it should.
    """
    file = root / BEST
    if not file.is_file():
        return None
    try:
        found = Best(**json.loads(file.read_text(encoding="utf-8")))
        if type(found.step) is not int or type(found.value) not in (int, float):
            raise ValueError(f"step {found.step!r}, value {found.value!r}")
        return found
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} does not name the best checkpoint: {error}; remove it") from error


def write_best(root: Path, best: Best) -> None:
    """Let the file say this from now on; there is no moment without one."""
    write_json(root / BEST, dataclasses.asdict(best))
