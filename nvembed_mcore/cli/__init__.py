"""The command line: parses arguments and calls one function for each subcommand. Nothing else parses arguments.

A module here is one family of subcommands; its `add(commands)` declares them.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable

from nvembed_mcore import __version__
from nvembed_mcore.cli import data, encode, mine, use, weights
from nvembed_mcore.cli.train import train
from nvembed_mcore.exits import Exit, exit_of

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; returns the exit status: one of `exits.Exit`, or what its help says."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _quiet_libraries()
    if arguments[:1] == ["train"]:
        return _guarded(lambda: train(arguments[1:]), "; the same command goes on from the newest checkpoint")
    parsed = _parser().parse_args(arguments)
    return _guarded(lambda: parsed.run(parsed))


def _quiet_libraries() -> None:
    """Deprecations between torch, Megatron-Core and transformers are ours to read in the test suite, not a user's."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(megatron|torch|transformers)\.")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _guarded(work: Callable[[], int | None], if_interrupted: str = "") -> int:
    """The status that `work` returns; what somebody foresaw becomes one message on rank 0 instead of a traceback.

    What ends another rank stands in that rank's log.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        return work() or Exit.DONE
    except KeyboardInterrupt:
        if is_first:
            print(f"nvembed: interrupted{if_interrupted}", file=sys.stderr)
        return Exit.INTERRUPTED
    except Exception as error:
        status = exit_of(error)
        if status == Exit.CRASHED:
            raise
        if is_first:
            print(f"nvembed: {'' if status == Exit.PREEMPTED else 'error: '}{error}", file=sys.stderr)
        else:
            log.info("this rank ends with status %d", status, exc_info=True)
        return status
    finally:
        if "nvembed_mcore.parallel.groups" in sys.modules:
            sys.modules["nvembed_mcore.parallel.groups"].shutdown()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nvembed", description="Text embedding models on Megatron-Core.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("train", help="train one stage: nvembed train CONFIG.yaml [--field value ...]", add_help=False)
    weights.add(commands)
    use.add(commands)
    encode.add(commands)
    mine.add(commands)
    data.add(commands)
    return parser
