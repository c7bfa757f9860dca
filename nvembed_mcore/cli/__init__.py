"""The command line: parses arguments and calls one function for each subcommand. Nothing else parses arguments.

A module here is one family of subcommands; its `add(commands)` declares them.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nvembed_mcore import __version__
from nvembed_mcore.cli import completion, data, doctor, encode, mine, plan, preflight, report, status, use, weights
from nvembed_mcore.cli.errors import guarded
from nvembed_mcore.cli.parser import FLAGS, Parser, take_flags
from nvembed_mcore.cli.train import train
from nvembed_mcore.progress import is_quiet
from nvembed_mcore.stop import StopRequests

log = logging.getLogger(__name__)

LEAVING_SECONDS = 30.0
"""A process that has not left its groups by then ends without."""


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status: one of `exits.Exit`, or what its help says."""
    is_program = arguments is None
    os.umask(os.umask(0o077) | 0o027)  # others on a shared file system must not plant what is read back
    flags, arguments = take_flags(sys.argv[1:] if is_program else arguments)
    with _as_asked(flags):
        if arguments[:1] == ["train"]:
            return _train(arguments[1:], is_program)
        _quiet_libraries()
        return _guarded(lambda: _run(arguments))


def _run(arguments: list[str]) -> int | None:
    parsed, fields = parser().parse_known_args(arguments)
    return parsed.run(parsed, fields) if fields else parsed.run(parsed)


def _train(arguments: list[str], is_program: bool) -> int:
    # First: imports take seconds, and a signal that comes meanwhile is to stop the run and not to end the process.
    with StopRequests() as stops:
        _quiet_libraries()
        status = _guarded(lambda: train(arguments, stops), "; the same command goes on from the newest checkpoint")
        if is_program:
            stops.ignore_signals()
    return status


@contextmanager
def _as_asked(flags: list[str]) -> Iterator[None]:
    """Flags as variables of the environment, which processes that are started here see too."""
    before = {FLAGS[flag]: os.environ.get(FLAGS[flag]) for flag in flags}
    os.environ.update(dict.fromkeys(before, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _quiet_libraries() -> None:
    """Deprecations between torch, Megatron-Core and transformers are ours to read in the test suite, not a user's."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(megatron|torch|transformers)\.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if is_quiet() or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of downloads and of loading, in a file


def _guarded(work: Callable[[], int | None], if_interrupted: str = "") -> int:
    with _without_warnings():
        status = guarded(work, if_interrupted)
    _leave_groups(status)
    return status


@contextmanager
def _without_warnings() -> Iterator[None]:
    """With --quiet: no warnings either, of Python or of a logger that has no handler."""
    if not is_quiet():
        yield
        return
    nowhere, package = logging.NullHandler(), logging.getLogger("nvembed_mcore")
    package.addHandler(nowhere)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        package.removeHandler(nowhere)


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


def parser() -> Parser:
    """The whole command line but the fields of a configuration, which jsonargparse knows."""
    whole = Parser(prog="nvembed", description="Text embedding models on Megatron-Core.")
    whole.add_argument("--version", action="version", version=__version__)
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("train", help="train one stage: nvembed train CONFIG.yaml [--field value ...]", add_help=False)
    status.add(commands)
    preflight.add(commands)
    plan.add(commands)
    doctor.add(commands)
    weights.add(commands)
    report.add(commands)
    use.add(commands)
    encode.add(commands)
    mine.add(commands)
    data.add(commands)
    completion.add(commands)
    return whole
