"""Which ranks are slow at their own work, so that all others wait for them in every step.

A rank's own seconds of a step are those before its first collective over the data-parallel ranks: reading the batch
and embedding its packs. The ranks of one replica (tensor, pipeline and context parallel) wait for each other while
they embed, so replicas are compared, each by its slowest rank.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from statistics import median_low

from nvembed_mcore.beats import ranks_of
from nvembed_mcore.parallel.gather import numbers_of_all
from nvembed_mcore.parallel.groups import Groups, every_rank_does

log = logging.getLogger(__name__)

FACTOR = 1.5
"""Packs are dealt to a few per cent, so what exceeds the median by half is the host and not the work."""
WINDOWS = 3
"""In a row: a page cache that fills, or a neighbour's job that starts, is over by then."""
OWN_PHASES = ("data", "embed")


class Findings:
    """Replicas that are slow `WINDOWS` windows in a row. Each is told of once, and again if it was well as long."""

    def __init__(self, replicas: int) -> None:
        self._is_slow = [False] * replicas
        self._in_a_row = [0] * replicas  # windows that say the opposite

    def add(self, seconds: Sequence[float]) -> list[tuple[int, float]]:
        """One window.

        Args:
            seconds: of each replica.

        Returns:
            (replica, times the median) of those to be told of now. Of an even number it is the lower of the two in the
            middle: the mean of only two would rise with the slow one, and 1.5 times that is three times the other.
        """
        middle = median_low(seconds)
        told = []
        for replica, own in enumerate(seconds):
            is_other = (own > FACTOR * middle) != self._is_slow[replica]
            self._in_a_row[replica] = self._in_a_row[replica] + 1 if is_other else 0
            if self._in_a_row[replica] == WINDOWS:
                self._in_a_row[replica] = 0
                self._is_slow[replica] = not self._is_slow[replica]
                if self._is_slow[replica]:
                    told.append((replica, own / middle))
        return told


class Stragglers:
    """Compares the ranks of a run every so many steps, and logs who is slow."""

    def __init__(self, window: int, groups: Groups) -> None:
        """
        Args:
            window: steps; 0: no comparison.
        """
        self._window = window if groups.dp_size > 1 else 0
        self._steps, self._seconds = 0, 0.0
        if self._window:
            replica_and_host = every_rank_does(lambda: (groups.dp_rank, host()))
            self._replica = [replica for replica, _ in replica_and_host]
            self._host = [name for _, name in replica_and_host]
            self._findings = Findings(groups.dp_size)

    def add(self, seconds: Mapping[str, float]) -> None:
        """The seconds of a step by phase; every rank calls this after every step."""
        if not self._window:
            return
        self._seconds += sum(seconds[phase] for phase in OWN_PHASES)
        self._steps += 1
        if self._steps == self._window:
            self._compare(numbers_of_all([self._seconds])[:, 0].tolist())
            self._steps, self._seconds = 0, 0.0

    def _compare(self, of_rank: list[float]) -> None:
        slowest = [0.0] * (max(self._replica) + 1)
        for rank, seconds in enumerate(of_rank):
            slowest[self._replica[rank]] = max(slowest[self._replica[rank]], seconds)
        for replica, times in self._findings.add(slowest):
            ranks = [rank for rank, number in enumerate(self._replica) if number == replica]
            hosts = sorted({self._host[rank] for rank in ranks})
            log.warning(
                "%s (%s %s) take%s %.1f x the median time for %s own work for %d steps",
                ranks_of(ranks),
                "host" if len(hosts) == 1 else "hosts",
                ", ".join(hosts),
                "s" if len(ranks) == 1 else "",
                times,
                "its" if len(ranks) == 1 else "their",
                WINDOWS * self._window,
            )


def host() -> str:
    """The name of this host; SLURM's own where it is known, since two of its nodes may share one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
