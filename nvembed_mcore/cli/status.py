"""`nvembed status RUN`: what the newest attempt of a run is at or came to."""

from __future__ import annotations

import argparse
import dataclasses

from nvembed_mcore.cli.results import add_json, give
from nvembed_mcore.config import ConfigError
from nvembed_mcore.exits import Exit
from nvembed_mcore.status import FIRST_FAILURE, Status, read_status


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("status", help="say how a run stands, from its status.json")
    command.add_argument("folder", metavar="RUN", help="run folder")
    names = [field.name for field in dataclasses.fields(Status)]
    command.add_argument("--field", choices=names, help="print this value alone, for scripts; nothing for null")
    add_json(command)
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    status = read_status(arguments.folder)
    if status is None:
        raise ConfigError(f"{arguments.folder} holds no run that has begun: no status.json")
    if arguments.field:
        value = getattr(status, arguments.field)
        print("" if value is None else value)
    else:
        give(dataclasses.asdict(status), arguments.json, lambda: print(describe(status)))


def describe(status: Status) -> str:
    """In words, a few lines."""
    lines = [
        f"{status.state}{f': {status.reason}' if status.reason else ''}",
        f"step {status.step} of {status.steps}, {status.samples_seen:,} queries seen; "
        + ("no checkpoint" if status.checkpoint_step is None else f"newest checkpoint: step {status.checkpoint_step}")
        + ("" if status.best_step is None else f", best: step {status.best_step} ({status.best_value:.4f})"),
        f"attempt {status.attempt}, told by {status.host} at {status.time}",
    ]
    if status.exit_status is not None:
        lines[0] += f" (exit status {status.exit_status})"
    if status.exit_status not in (None, Exit.DONE, Exit.PREEMPTED):
        lines.append(f"the first failure: logs/{status.attempt:04d}/{FIRST_FAILURE}")
    return "\n".join(lines)
