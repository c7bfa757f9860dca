"""`nvembed preflight CONFIG.yaml [--field.of.the.tree value ...]`: the check before a job, by the ranks of the job."""

from __future__ import annotations

import argparse
import dataclasses
import operator
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nvembed_mcore.cli.results import add_json, give
from nvembed_mcore.cli.run_config import read_run_config
from nvembed_mcore.exits import Exit

if TYPE_CHECKING:
    from nvembed_mcore.preflight import Finding

_DESCRIPTION = """\
Check what would end a job, before it: configuration, paths, disk, network, the same code on all nodes. Started as
`train` is, with the same arguments. Ends with 0, or 78 (configuration or code), 76 (a node or the network) or 74 (the
disk); what is wrong stands in the output of rank 0, with rank and host."""


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "preflight",
        help="check the surroundings of `train` before a job",
        usage="nvembed preflight CONFIG.yaml [--field value ...] [--show FIELD] [--timeout SECONDS] "
        "[--json [FILE.json]]",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    command.add_argument("--show", metavar="FIELD", help="only print a field of the configuration, such as run_dir")
    command.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="for all ranks (default 60)")
    add_json(command, "what was found")
    command.set_defaults(run=_run, takes_fields=True)


def _run(arguments: argparse.Namespace, fields: Sequence[str] = ()) -> int:
    if arguments.show:
        print(operator.attrgetter(arguments.show)(read_run_config([*fields])))
        return Exit.DONE
    # Not before: torch takes a second to import.
    from nvembed_mcore.preflight import check

    def report(findings: list[Finding]) -> None:
        give(_as_json(findings), arguments.json, lambda: _print(findings))
        sys.stdout.flush()  # the next rank's end may be that of all

    return check(lambda: read_run_config([*fields]), arguments.timeout, report)[1]


def _as_json(findings: list[Finding]) -> dict[str, Any]:
    from nvembed_mcore.preflight import worst

    return {"status": worst(findings), "findings": [dataclasses.asdict(one) for one in findings]}


def _print(findings: list[Finding]) -> None:
    from nvembed_mcore.preflight import worst

    for one in findings:
        print(f"preflight: {'FAILED' if one.status else 'note'}: {one.what}: {one.text}")
    status = worst(findings)
    print(f"preflight: {'all is well' if status == Exit.DONE else f'ends with {status:d}'}")
