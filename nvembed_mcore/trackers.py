"""Where a run's numbers go besides `metrics.jsonl`: TensorBoard, and Weights & Biases.

Rank 0 opens them. `metrics.jsonl` is the record; a tracker that fails costs the run nothing but that tracker.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from nvembed_mcore import redact
from nvembed_mcore.config import ConfigError, LogConfig, WandbConfig
from nvembed_mcore.exits import Exit
from nvembed_mcore.stop import STOP_FILE

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

STARTING_SECONDS = 30.0
"""W&B's server has so long to answer before a run is kept on disk instead."""
CLOSING_SECONDS = 60.0
"""The end of a run waits so long for W&B at most."""
_MOST_WAITING = 10_000
_ID = re.compile("[a-z0-9]{8}")


class Tracker(Protocol):
    """A place that gets a run's numbers."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step by name, such as `train/loss` and `eval/ndcg_at_10`."""

    def close(self, status: Exit) -> None:
        """The attempt is over; `status` says how it ended."""


def check_installed(config: LogConfig) -> None:
    """Refuse a tracker that the configuration asks for and this machine lacks; imports nothing.

    Raises:
        ConfigError: Weights & Biases is wanted and not installed. TensorBoard is on by default, so it may be missing.
    """
    if config.wandb.mode != "off" and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"log.wandb.mode is {config.wandb.mode!r}, but wandb is not installed: pip install 'nvembed_mcore[track]'"
        )


def open_trackers(run_dir: Path, config: LogConfig, facts: Mapping[str, Any], start_step: int) -> list[Tracker]:
    """Those that the configuration asks for; rank 0 alone calls this.

    Args:
        facts: the whole configuration as JSON values, without secrets.
        start_step: steps done before this attempt; 0 for a run that starts, or starts over.
    """
    trackers: list[Tracker] = []
    if config.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # the extra `track` is not installed
            log.info("TensorBoard is not installed; %s has the metrics", run_dir)
        else:
            # Purging hides what an earlier, cut-off attempt wrote after the step that this one resumes from.
            writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1 if start_step else 0)
            trackers.append(TensorBoard(writer, facts, start_step))
    if config.wandb.mode != "off":
        trackers.append(WeightsAndBiases(run_dir, config.wandb, facts, start_step))
    return trackers


class TensorBoard:
    """Events in `RUN/tensorboard`; the configuration is there as text."""

    def __init__(self, writer: SummaryWriter, facts: Mapping[str, Any], start_step: int) -> None:
        self._writer = writer
        # Markdown keeps what is indented as it is. Not hparams, which make a run of their own for each attempt.
        text = yaml.safe_dump(dict(facts), sort_keys=False)
        writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), start_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, status: Exit) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of W&B in `RUN/wandb`, which a thread of its own feeds, so that no step waits for a server.

    Its id stays in `RUN/wandb/id`, so a resumed run goes on with it; one that starts over gets a new one. Where the
    server does not answer or nobody is logged in, the attempt is written offline, for `wandb sync`. Numbers are
    plotted over `step`: those of steps that are taken again stand beside the first, because W&B does not go back.
    """

    def __init__(self, run_dir: Path, config: WandbConfig, facts: Mapping[str, Any], start_step: int) -> None:
        self._lines: queue.Queue[dict[str, float] | None] = queue.Queue(_MOST_WAITING)
        self._status = Exit.DONE
        self._is_full = False
        arguments = (run_dir, config, dict(facts), start_step)
        self._thread = threading.Thread(target=self._work, args=arguments, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if not self._thread.is_alive():
            return
        try:
            self._lines.put_nowait({"step": step, **values})
        except queue.Full:
            if not self._is_full:
                log.warning("Weights & Biases takes no more numbers since step %d; metrics.jsonl has them", step)
            self._is_full = True

    def close(self, status: Exit) -> None:
        if not self._thread.is_alive():
            return
        self._status = status
        until = time.monotonic() + CLOSING_SECONDS
        with suppress(queue.Full):
            self._lines.put(None, timeout=CLOSING_SECONDS)
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            log.warning("Weights & Biases is not done within %.0f s: wandb sync RUN/wandb uploads", CLOSING_SECONDS)

    def _work(self, run_dir: Path, config: WandbConfig, facts: dict[str, Any], start_step: int) -> None:
        """All that has to do with wandb, from its import on."""
        try:
            run = _start(run_dir, config, facts, start_step)
            run.define_metric("step", hidden=True)
            run.define_metric("*", step_metric="step")
            for line in iter(self._lines.get, None):
                run.log(line)
            if self._status == Exit.PREEMPTED:
                run.mark_preempting()
            run.finish(exit_code=int(self._status))
        except Exception as error:
            log.warning("no more numbers go to Weights & Biases; metrics.jsonl has them: %r", error)


def _start(run_dir: Path, config: WandbConfig, facts: dict[str, Any], start_step: int) -> Any:
    """A run of wandb, online if it can be."""
    # Its reports about itself, which it would send of offline runs too.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    wandb.setup(wandb.Settings(silent=True))
    known = _read_id(run_dir / "wandb" / "id") if start_step else None
    how = {
        "project": config.project,
        "entity": config.entity,
        "name": redact.text(config.name or run_dir.resolve().name),
        "dir": str(run_dir),
        "id": known or _new_id(run_dir / "wandb" / "id"),
        "resume": "allow" if known else None,
        "config": facts,
        "settings": _settings(run_dir),
    }
    mode = "offline" if config.mode == "offline" else os.environ.get("WANDB_MODE", "online")
    try:
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise wandb.errors.AuthenticationError("nobody is logged in (`wandb login`, or WANDB_API_KEY)")
        run = wandb.init(mode=mode, **how)
    except wandb.errors.Error as error:
        if mode == "offline":
            raise
        why = str(error).partition("\n")[0]
        log.warning("Weights & Biases goes on offline, `wandb sync %s/wandb` uploads: %s", run_dir, why)
        wandb.teardown()  # it keeps the id for itself
        run = wandb.init(mode="offline", **how)
    where = f"offline, in {run_dir}/wandb" if run.offline else run.url
    log.info("Weights & Biases: run %s of project %s, %s", run.id, config.project, where)
    return run


def _settings(run_dir: Path) -> Any:
    """Numbers and the load of the machine: no source code, no output, no command line, and nothing on the screen."""
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        x_disable_meta=True,
        x_save_requirements=False,
        # A run of somebody else in this process stays alone.
        reinit="create_new",
        init_timeout=STARTING_SECONDS,
        finish_timeout=STARTING_SECONDS,
        # Its button to stop a run would interrupt it without a checkpoint.
        stop_fn=(run_dir / STOP_FILE).touch,
    )


def _read_id(file: Path) -> str | None:
    """Of the run of W&B that an earlier attempt began; None where there is none."""
    if not file.is_file():
        return None
    found = file.read_text(encoding="utf-8", errors="replace").strip()
    if _ID.fullmatch(found):
        return found
    log.warning("%s holds no id of Weights & Biases (%r): a new run begins there", file, found[:40])
    return None


def _new_id(file: Path) -> str:
    new = secrets.token_hex(4)
    file.parent.mkdir(exist_ok=True)
    file.write_text(new + "\n", encoding="utf-8")
    return new
