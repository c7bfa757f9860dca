"""The part of the configuration that says how a run is evaluated while it trains."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from nvembed_mcore.config_data import require

METRICS = ("ndcg_at_10", "recall_at_10", "recall_at_100", "mrr_at_10")
"""Of a retrieval test set (`evaluation.retrieval.RetrievalMetrics`); all are better when they are larger."""


@dataclass(frozen=True, kw_only=True)
class EvalSetConfig:
    """One of several test sets."""

    name: str
    """Stands before its metrics in the log: `NAME/ndcg_at_10`. Letters, digits, `.`, `_` and `-`."""
    path: str
    """Folder of a BEIR-format test set (`corpus.jsonl`, `queries.jsonl`, `qrels/test.tsv`)."""
    instruction: str = ""
    """Instruction of its queries."""

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[\w.-]+", self.name, re.ASCII) is not None,
            f"eval.sets.name must have letters, digits, '.', '_' and '-' only, got {self.name!r}",
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Retrieval evaluation while training, by all ranks."""

    path: str | None = None
    """Folder of the one test set, in BEIR's format (`corpus.jsonl`, `queries.jsonl`, `qrels/test.tsv`); null: none, or
    those of `sets`."""
    instruction: str = ""
    """Instruction of its queries."""
    sets: list[EvalSetConfig] = field(default_factory=list)
    """Several test sets. Logged are the metrics of each, and under their plain names the means over the sets."""
    every_steps: int = 0
    """Steps between evaluations; 0 means before the first and after the last step only."""
    metric: str = "ndcg_at_10"
    """What decides which checkpoint is the best: `ndcg_at_10`, `recall_at_10`, `recall_at_100` or `mrr_at_10`, of
    several sets the mean; or that of one of them, as `NAME/ndcg_at_10`."""

    @property
    def test_sets(self) -> list[EvalSetConfig]:
        """All test sets; that of `path` is called like its folder."""
        if self.path is None:
            return self.sets
        name = re.sub(r"[^\w.-]", "_", Path(self.path).name, flags=re.ASCII)
        return [EvalSetConfig(name=name or "test", path=self.path, instruction=self.instruction)]

    def __post_init__(self) -> None:
        require(self.every_steps >= 0, f"eval.every_steps must not be negative, got {self.every_steps}")
        names = [one.name for one in self.sets]
        require(
            self.path is None or not self.sets,
            f"eval.path {self.path!r} and eval.sets {names} both name test sets: put it among eval.sets",
        )
        require(len({*names}) == len(names), f"eval.sets must have different names, got {names}")
        known = [*METRICS, *(f"{name}/{metric}" for name in names for metric in METRICS)]
        require(self.metric in known, f"eval.metric must be one of {', '.join(known)}, got {self.metric!r}")
