"""What a run says and keeps: log messages by rank, `metrics.jsonl`, progress; trackers get the same numbers."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.logging import RichHandler

from nvembed_mcore import progress, redact
from nvembed_mcore.config import LogConfig
from nvembed_mcore.exits import Exit, exit_of
from nvembed_mcore.trackers import Tracker, open_trackers

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TO_FILE_ONLY = {"to_file_only": True}
"""As `extra` of a message: it goes to the rank's file and not to stderr."""


def setup_logging(rank: int, log_dir: str | Path | None = None) -> logging.Logger:
    """Send the messages of `nvembed_mcore` where this rank's messages go; calling it again replaces the handlers.

    Rank 0 writes from INFO on to stderr (through rich on a terminal, plain lines elsewhere), with --quiet only errors.
    Every rank writes from INFO on to `log_dir/rank-{rank}.log`, appending.

    Args:
        rank: of this process in the whole job.
        log_dir: made when it is missing; None writes no file.

    Returns:
        The root logger of the package.
    """
    root = logging.getLogger("nvembed_mcore")
    close_logging()
    root.setLevel(logging.INFO)
    # Libraries that configure the interpreter's root logger would print each message a second time.
    root.propagate = False
    if rank == 0:
        root.addHandler(_stderr_handler())
        root.handlers[-1].addFilter(lambda record: not hasattr(record, "to_file_only"))
        root.handlers[-1].setLevel(logging.ERROR if progress.is_quiet() else logging.INFO)
    if log_dir is not None:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(Path(log_dir) / f"rank-{rank}.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s rank {rank} %(name)s: %(message)s"))
        root.addHandler(handler)
    for handler in root.handlers:
        handler.addFilter(redact.Filter())
    return root


def close_logging() -> None:
    """Undo `setup_logging`: close the handlers and hand messages to the interpreter's root logger again."""
    root = logging.getLogger("nvembed_mcore")
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.propagate = True
    root.setLevel(logging.NOTSET)


def _stderr_handler() -> logging.Handler:
    """Rich breaks lines at the width of the terminal; where there is none, a message stays one line."""
    console = progress.console
    if console.is_terminal:
        return RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S", rich_tracebacks=False)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    return handler


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`, in order.

    A last line without its newline is what a killed run leaves; it is not returned.

    Raises:
        ValueError: a line is not a JSON object with a `step`; the message names file and line.
    """
    lines = []
    try:
        whole = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    for number, text in enumerate(whole.split("\n")[:-1], 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}): {text[:80]!r}") from error
        if not isinstance(line, dict) or "step" not in line:
            raise ValueError(f"{path}, line {number}: not an object with a `step`: {text[:80]!r}")
        lines.append(line)
    return lines


def _is_evaluation(line: Mapping[str, float]) -> bool:
    """Training lines have a loss; the lines of `log_eval` do not."""
    return "loss" not in line


class MetricLog:
    """The numbers of one run: `metrics.jsonl`, trackers (trackers.py), and progress on the screen.

        with MetricLog(run_dir, config.log, is_writer=rank == 0, total_steps=500, start_step=0,
                       description="stage 1") as metrics:
            metrics.log_eval(0, {"ndcg_at_10": 0.006})
            metrics.log(1, {"loss": 3.2, "tokens_per_second": 17000.0})

    `metrics.jsonl` has one JSON object a line, `step` first, floats with every digit, each line flushed. A run that
    starts over (`start_step` 0) replaces the file; one that resumes drops the lines after `start_step`, so there is
    one training line a step however often a run was cut off.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: LogConfig,
        *,
        is_writer: bool,
        total_steps: int,
        start_step: int,
        description: str,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Nothing is opened or shown before the `with` block is entered.

        Args:
            run_dir: where `metrics.jsonl` and what trackers write live.
            config: which trackers to open, and whether to show a bar.
            is_writer: whether this rank writes; all others do nothing.
            total_steps: steps of the whole run, the length of the bar.
            start_step: steps already done, 0 for a fresh run.
            description: what the progress calls this run.
            facts: the whole configuration without secrets, as JSON values, for trackers.
        """
        self._path = Path(run_dir) / METRICS_FILE
        self._config = config
        self._is_writer = is_writer
        self._total_steps, self._start_step = total_steps, start_step
        self._description, self._facts = description, facts or {}
        self._file: TextIO | None = None
        self._trackers: list[Tracker] = []
        self._showing = ExitStack()
        self._progress: progress.Progress | None = None
        self._evaluated: set[int] = set()
        self._shown: dict[str, float] = {}

    def __enter__(self) -> MetricLog:
        if not self._is_writer:
            return self
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._rewrite(lambda line: 0 < self._start_step and line["step"] <= self._start_step)
        self._trackers = open_trackers(self._path.parent, self._config, self._facts, self._start_step)
        what, how = (self._description, self._total_steps, "steps"), {"bar": self._config.progress, "eager": True}
        self._progress = self._showing.enter_context(progress.progress(*what, start=self._start_step, **how))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        self._showing.close()
        for tracker in self._trackers:
            tracker.close(Exit.DONE if error is None else exit_of(error))
        self._file, self._progress, self._trackers = None, None, []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """A training step's numbers, `loss` among them: one line of the file, and the progress."""
        assert "loss" in values, f"a training line needs a loss, got {sorted(values)}"
        if not self._is_writer:
            return
        self._write(step, values, "train")
        self._show(step, values)

    def log_eval(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of an evaluation after `step` steps (0: before the first); a second one replaces the first."""
        assert "loss" not in values, "a line with a loss is a training line"
        if not self._is_writer:
            return
        if step in self._evaluated:
            self._rewrite(lambda line: not (_is_evaluation(line) and line["step"] == step))
        self._evaluated.add(step)
        self._write(step, values, "eval")
        self._show(step, values)

    def has_evaluation(self, step: int) -> bool:
        """Whether the file has the numbers of an evaluation after `step` steps; asked of the writer."""
        return step in self._evaluated

    def _write(self, step: int, values: Mapping[str, float], group: str) -> None:
        assert self._file is not None, "MetricLog is used inside its `with` block"
        line = {"step": step} | {name: _plain_number(value) for name, value in values.items() if name != "step"}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(step, {f"{group}/{name}": value for name, value in line.items() if name != "step"})

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        self._shown.update({name: float(values[name]) for name in _SHOWN if name in values})
        if self._progress is not None:
            self._progress.update(step, _status(self._shown))

    def _rewrite(self, keep: Callable[[dict[str, float]], bool]) -> None:
        """Open the file with only the lines to keep. The old file stays until the new one is complete."""
        if self._file is not None:
            self._file.close()
        lines = [line for line in read_metrics(self._path) if keep(line)] if self._path.exists() else []
        self._evaluated = {int(line["step"]) for line in lines if _is_evaluation(line)}
        new = self._path.with_name(self._path.name + ".new")
        new.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        os.replace(new, self._path)
        self._file = self._path.open("a", encoding="utf-8")


def _plain_number(value: float) -> float:
    """Numbers of numpy and torch become Python's, which JSON writes with every digit."""
    return value if isinstance(value, int) else float(value)


# What the screen shows, in this order: name of the value -> how it looks.
_SHOWN: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:.4f}",
    "ndcg_at_10": lambda value: f"nDCG@10 {value:.3f}",
    "tokens_per_second": lambda value: f"{value:,.0f} tokens/s",
}


def _status(shown: Mapping[str, float]) -> str:
    return "  ".join(text(shown[name]) for name, text in _SHOWN.items() if name in shown)
