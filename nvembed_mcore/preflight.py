"""The check before a job: what would end a run hours later, or on one node of many, found in seconds.

Every rank of the job calls `check`. What it finds out alone (preflight_rank.py) and whether it can reduce goes over
the key-value store of the rendezvous to rank 0, which judges and tells all. So a rank that cannot talk to the others,
or is not there, is named by the rest.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nvembed_mcore import device
from nvembed_mcore.config import ConfigError, RunConfig
from nvembed_mcore.exits import Exit
from nvembed_mcore.parallel import rendezvous
from nvembed_mcore.preflight_rank import Rank, look_around, remove_probe
from nvembed_mcore.progress import progress

LARGEST_SKEW_SECONDS = 5.0
_SHARED_SECONDS = 5.0  # a network file system may show a new file late
_GRACE_SECONDS = 5.0  # for what a rank does after a limit that all have
_POLL_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        status: what the job would end with; DONE: only worth knowing.
        what: `configuration`, `code`, `storage`, `network`, `clock` or `GPU`.
        text: says where and which values.
    """

    status: Exit
    what: str
    text: str


Report = Callable[[list[Finding]], None]


def check(
    read: Callable[[], RunConfig], timeout_seconds: float = 60.0, report: Report = lambda _: None
) -> tuple[list[Finding], Exit]:
    """Look at the job's surroundings; every rank calls this and gets the same.

    Args:
        read: reads the configuration; what it raises is a finding.
        timeout_seconds: for all ranks to appear, and again for a small all-reduce.
        report: prints the findings. Rank 0 calls it before any other rank learns of them: srun ends all ranks as soon
            as one ends badly. So does a rank that cannot reach rank 0.

    Returns:
        What is wrong or worth knowing, and the exit status: 78 where configuration or code cannot work, 76 where
        ranks cannot talk to each other or a GPU is broken, 74 where the disk cannot be used, 0 otherwise. Where rank 0
        cannot be reached, what this rank alone knows.
    """
    place = rendezvous.place()
    here = look_around(read, place.rank if place else 0)
    try:
        if place is None or place.world_size == 1:
            findings = judge([here], [time.time()])
            report(findings)
        else:
            findings = _Exchange(here, place, timeout_seconds, report).findings()
    finally:
        remove_probe(here)
    return findings, worst(findings)


def worst(findings: Iterable[Finding]) -> Exit:
    """The status for all: what cannot be helped by another node or another try comes first."""
    found = {one.status for one in findings}
    return next((one for one in (Exit.CONFIGURATION, Exit.HANG, Exit.STORAGE) if one in found), Exit.DONE)


class _Exchange:
    """The ranks' talk over the rendezvous store. Keys: `rank/3`, `next`, `result/3`, `report`, `bye/3`."""

    def __init__(self, here: Rank, place: rendezvous.Place, timeout_seconds: float, report: Report) -> None:
        self.here, self.place, self.timeout, self.report = here, place, timeout_seconds, report
        self.world_size = place.world_size

    def findings(self) -> list[Finding]:
        try:
            if self.place.is_single_node:
                rendezvous.listen_on_loopback_only()
            # Whoever does not come is named; so rank 0 does not wait here.
            store = rendezvous.open_store(self.place, timedelta(seconds=self.timeout), wait_for_all=False)
            store = dist.PrefixStore("preflight", store)
            store.set(f"rank/{self.here.rank}", json.dumps(dataclasses.asdict(self.here)))
            return self._lead(store) if self.here.rank == 0 else self._follow(store)
        except (RuntimeError, OSError, ConfigError) as error:  # torch's DistError is a RuntimeError
            where = f"{self.place.host}:{self.place.port}"
            text = f"rank {self.here.rank} on {self.here.host} cannot talk to rank 0 at {where}: {_first_line(error)}"
            findings = [*_own(self.here), Finding(Exit.HANG, "network", text)]
            self.report(findings)
            return findings

    def _lead(self, store: dist.Store) -> list[Finding]:
        facts = self._collect(store, "rank", self.timeout)
        ranks = [Rank(**json.loads(fact)) for fact in facts.values()]
        absent = sorted(set(range(self.world_size)) - facts.keys())
        if absent:
            store.set("next", json.dumps(None))
            findings = [*judge(ranks, []), Finding(Exit.HANG, "network", self._silent(absent, "did not appear"))]
        else:
            store.set("next", json.dumps(self.here.probe))
            findings = self._results(store, ranks)
        self.report(findings)
        store.set("report", json.dumps([dataclasses.astuple(one) for one in findings]))
        # The store ends with this process, so not before the others have read.
        self._collect(store, "bye", _GRACE_SECONDS, among=facts.keys())
        return findings

    def _results(self, store: dist.Store, ranks: list[Rank]) -> list[Finding]:
        own = self._reduce(store)
        store.set("result/0", json.dumps(own))
        results = {
            r: json.loads(one) for r, one in self._collect(store, "result", self.timeout + _GRACE_SECONDS).items()
        }
        findings = judge(ranks, [result["time"] for result in results.values() if not result["network"]])
        silent = sorted(set(range(self.world_size)) - results.keys())
        if silent:
            findings.append(Finding(Exit.HANG, "network", self._silent(silent, "hung in a small all-reduce")))
        for status, what in ((Exit.HANG, "network"), (Exit.STORAGE, "storage")):
            texts = {r: result[what] for r, result in results.items() if result[what]}
            findings += [Finding(status, what, f"{_name(ranks[r])}: {text}") for r, text in texts.items()]
        return findings

    def _follow(self, store: dist.Store) -> list[Finding]:
        probe = json.loads(_get(store, "next", self.timeout + _GRACE_SECONDS))
        if probe is not None:
            result = self._reduce(store)
            if self.here.probe and probe:
                result["storage"] = _sees(*probe)
            store.set(f"result/{self.here.rank}", json.dumps(result))
        report = json.loads(_get(store, "report", self.timeout + 3 * _GRACE_SECONDS))
        store.set(f"bye/{self.here.rank}", "")
        return [Finding(Exit(status), what, text) for status, what, text in report]

    def _reduce(self, store: dist.Store) -> dict[str, Any]:
        """A sum of ones over all ranks, on the CPU and on the GPU; what went wrong, and the clock just after."""
        problem = ""
        try:
            if device.has_cuda():
                device.prepare()
            dist.init_process_group(
                device.backend(),
                store=dist.PrefixStore("reduce", store),
                rank=self.here.rank,
                world_size=self.world_size,
                timeout=timedelta(seconds=self.timeout),
            )
            # In the same order on all ranks, as a set would not be: each rank has a GPU of its own number.
            for where in dict.fromkeys((torch.device("cpu"), device.current())):
                ones = torch.ones(1, device=where)
                dist.all_reduce(ones)
                if ones.item() != self.world_size:
                    problem = f"a sum of {self.world_size} ones on {where} is {ones.item()}"
        except RuntimeError as error:
            problem = f"a small all-reduce failed: {_first_line(error)}"
        clock = time.time()
        if dist.is_initialized():
            dist.destroy_process_group()
        return {"network": problem, "storage": "", "time": clock}

    def _collect(
        self, store: dist.Store, name: str, seconds: float, among: Iterable[int] | None = None
    ) -> dict[int, str]:
        """Values of `name/RANK` for all ranks, or those that are there after so many seconds."""
        wanted = set(range(self.world_size) if among is None else among) - ({0} if name == "bye" else set())
        found: dict[int, str] = {}
        deadline = time.monotonic() + seconds
        with progress("hear from", len(wanted), "ranks") as shown:
            while wanted - found.keys() and time.monotonic() <= deadline:
                for rank in sorted(wanted - found.keys()):
                    if store.check([f"{name}/{rank}"]):
                        found[rank] = store.get(f"{name}/{rank}").decode()
                shown.update(len(found))
                time.sleep(_POLL_SECONDS if wanted - found.keys() else 0)
        return {rank: found[rank] for rank in sorted(found)}

    def _silent(self, ranks: list[int], what: str) -> str:
        """Names ranks that say nothing, by the hosts that the job script lists in NVEMBED_HOSTS."""
        hosts = os.environ.get("NVEMBED_HOSTS", "").split()
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        on = sorted({hosts[r // per_node] for r in ranks if r // per_node < len(hosts)})
        where = f" on {', '.join(on)}" if on else ""
        return f"rank {', '.join(map(str, ranks))}{where} {what} within {self.timeout:g} s"


def judge(ranks: list[Rank], clocks: list[float]) -> list[Finding]:
    """What all ranks found, and where they differ from the first.

    Args:
        clocks: of the ranks that reduced, read at one moment.
    """
    findings = [finding for one in ranks for finding in _own(one)]
    readable = [one for one in ranks if one.config]
    for status, what, attribute, group in (
        (Exit.CONFIGURATION, "configuration", "config", readable),
        (Exit.CONFIGURATION, "code", "code", ranks),
    ):
        findings += [Finding(status, what, text) for text in _differences(group, attribute)]
    if clocks and max(clocks) - min(clocks) > LARGEST_SKEW_SECONDS:
        text = f"the nodes' clocks differ by {max(clocks) - min(clocks):.1f} s: times in the logs do not compare"
        findings.append(Finding(Exit.DONE, "clock", text))
    return findings


def _differences(ranks: list[Rank], attribute: str) -> list[str]:
    """One line for each key and value in which ranks differ from the first."""
    if not ranks:
        return []
    first, lines = getattr(ranks[0], attribute), {}
    for one in ranks[1:]:
        own = getattr(one, attribute)
        for key in sorted({*first, *own}):
            if first.get(key) != own.get(key):
                lines.setdefault((key, repr(own.get(key))), []).append(_name(one))
    return [
        f"{key} is {value} on {', '.join(names)}, {first.get(key)!r} on {_name(ranks[0])}"
        for (key, value), names in lines.items()
    ]


def _own(one: Rank) -> list[Finding]:
    return [Finding(Exit(status), what, f"{_name(one)}: {text}") for status, what, text in one.findings]


def _name(one: Rank) -> str:
    return f"rank {one.rank} on {one.host}"


def _sees(path: str, content: str) -> str:
    """Why this rank does not see the file that rank 0 wrote; empty where it does."""
    deadline = time.monotonic() + _SHARED_SECONDS
    while True:
        try:
            found = Path(path).read_text(encoding="ascii")
            return "" if found == content else f"{path} is another file than the one that rank 0 wrote"
        except OSError as error:
            if time.monotonic() > deadline:
                return f"cannot read {path}, which rank 0 wrote: run_dir must be on a shared file system ({error})"
            time.sleep(_POLL_SECONDS)


def _get(store: dist.Store, key: str, seconds: float) -> bytes:
    store.wait([key], timedelta(seconds=seconds))
    return store.get(key)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
