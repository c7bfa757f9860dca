"""`nvembed preflight CONFIG.yaml [--field.of.the.tree value ...]`: the check before a job, by the ranks of the job."""

from __future__ import annotations

import argparse
import operator
from typing import TYPE_CHECKING

from nvembed_mcore.cli.run_config import read_run_config
from nvembed_mcore.exits import Exit

if TYPE_CHECKING:
    from nvembed_mcore.preflight import Finding

_DESCRIPTION = """\
Check what would end a job, before it: configuration, paths, disk, network, the same code on all nodes. Started as
`train` is, with the same arguments. Ends with 0, or 78 (configuration or code), 76 (a node or the network) or 74 (the
disk); what is wrong stands in the output of rank 0, with rank and host."""


def preflight(arguments: list[str]) -> int:
    """`nvembed preflight CONFIG.yaml [--field value ...] [--show FIELD] [--timeout SECONDS]`."""
    parser = argparse.ArgumentParser(
        prog="nvembed preflight",
        usage="nvembed preflight CONFIG.yaml [--field value ...] [--show FIELD] [--timeout SECONDS]",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("--show", metavar="FIELD", help="only print a field of the configuration, such as run_dir")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="for all ranks (default 60)")
    options, rest = parser.parse_known_args(arguments)
    if options.show:
        print(operator.attrgetter(options.show)(read_run_config(rest)))
        return Exit.DONE
    # Not before: torch takes a second to import.
    from nvembed_mcore.preflight import check

    return check(lambda: read_run_config(rest), options.timeout, _print)[1]


def _print(findings: list[Finding]) -> None:
    from nvembed_mcore.preflight import worst

    for one in findings:
        print(f"preflight: {'FAILED' if one.status else 'note'}: {one.what}: {one.text}")
    status = worst(findings)
    print(f"preflight: {'all is well' if status == Exit.DONE else f'ends with {status:d}'}", flush=True)
