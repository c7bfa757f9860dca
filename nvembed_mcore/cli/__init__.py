"""The command line: parses arguments and calls one function for each subcommand. Nothing else parses arguments.

A module here is one family of subcommands; its `add(commands)` declares them.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable

from nvembed_mcore import __version__, redact
from nvembed_mcore.cli import data, encode, mine, status, use, weights
from nvembed_mcore.cli.doctor import doctor
from nvembed_mcore.cli.plan import plan
from nvembed_mcore.cli.preflight import preflight
from nvembed_mcore.cli.train import train
from nvembed_mcore.exits import Exit, exit_of
from nvembed_mcore.stop import StopRequests

log = logging.getLogger(__name__)

LEAVING_SECONDS = 30.0
"""A process that has not left its groups by then ends without."""


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status: one of `exits.Exit`, or what its help says."""
    is_program = arguments is None
    arguments = sys.argv[1:] if is_program else arguments
    os.umask(os.umask(0o077) | 0o027)  # others on a shared file system must not plant what is read back
    if arguments[:1] == ["train"]:
        return _train(arguments[1:], is_program)
    _quiet_libraries()
    if arguments[:1] == ["preflight"]:
        return _guarded(lambda: preflight(arguments[1:]))
    if arguments[:1] == ["doctor"]:
        return _guarded(lambda: doctor(arguments[1:]))
    if arguments[:1] == ["plan"]:
        return _guarded(lambda: plan(arguments[1:]))
    parsed = _parser().parse_args(arguments)
    return _guarded(lambda: parsed.run(parsed))


def _train(arguments: list[str], is_program: bool) -> int:
    # First: imports take seconds, and a signal that comes meanwhile is to stop the run and not to end the process.
    with StopRequests() as stops:
        _quiet_libraries()
        status = _guarded(lambda: train(arguments, stops), "; the same command goes on from the newest checkpoint")
        if is_program:
            stops.ignore_signals()
    return status


def _quiet_libraries() -> None:
    """Deprecations between torch, Megatron-Core and transformers are ours to read in the test suite, not a user's."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(megatron|torch|transformers)\.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _guarded(work: Callable[[], int | None], if_interrupted: str = "") -> int:
    """The status that `work` returns, or that its error means; what somebody foresaw becomes one message on rank 0."""
    try:
        status = work() or Exit.DONE
    except KeyboardInterrupt:
        if _is_first():
            print(f"nvembed: interrupted{if_interrupted}", file=sys.stderr)
        status = Exit.INTERRUPTED
    except Exception as error:
        status = exit_of(error)
        _tell(error, status)
    _leave_groups(status)
    return status


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _tell(error: Exception, status: int) -> None:
    """Say on stderr what ended the run: rank 0 what was foreseen, or who failed first; a rank that crashed its trace.

    What ends another rank stands in that rank's log.
    """
    first = getattr(error, "follows", None)
    if first is None and status == Exit.CRASHED:
        trace = traceback.format_exception(type(error), error, error.__traceback__)
        sys.stderr.write(redact.text("".join(trace)))
    elif _is_first():
        message = redact.text(str(first or error))
        print(f"nvembed: {'' if status == Exit.PREEMPTED else 'error: '}{message}", file=sys.stderr)
    sys.stderr.flush()


def _leave_groups(status: int) -> None:
    """Leave the process groups, if there are any; with dead ranks in them that may neither hide nor delay the end."""
    groups = sys.modules.get("nvembed_mcore.parallel.groups")
    if groups is None:
        return
    at_last = threading.Timer(LEAVING_SECONDS, end_now, [status])
    at_last.daemon = True
    at_last.start()
    # Where torch waits with Python's lock held, no thread of Python can end it: with 1, and the stacks on stderr.
    faulthandler.dump_traceback_later(LEAVING_SECONDS + 5, exit=True, file=sys.__stderr__)
    try:
        groups.shutdown()
    except Exception:
        log.info("could not leave the process groups", exc_info=True)
    finally:
        at_last.cancel()
        faulthandler.cancel_dump_traceback_later()


def end_now(status: int) -> None:
    """End the process whatever its other threads wait for, and without the interpreter's own way out."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nvembed", description="Text embedding models on Megatron-Core.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("train", help="train one stage: nvembed train CONFIG.yaml [--field value ...]", add_help=False)
    status.add(commands)
    commands.add_parser("preflight", help="check the surroundings of `train` before a job", add_help=False)
    commands.add_parser("plan", help="say which layouts of a cluster fit, and what a run costs", add_help=False)
    commands.add_parser("doctor", help="say what a run is computed with on this machine, and why", add_help=False)
    weights.add(commands)
    use.add(commands)
    encode.add(commands)
    mine.add(commands)
    data.add(commands)
    return parser
