"""Process groups, made once and handed on. The only room that reads Megatron's `parallel_state`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from nvembed_mcore import device
from nvembed_mcore.config import ConfigError, ParallelConfig
from nvembed_mcore.parallel import rendezvous

_MARGIN = timedelta(seconds=30)
_SHORTEST_MEETING = timedelta(minutes=1)
_store: dist.Store | None = None
_patient: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Groups:
    """The layout of the processes as this rank sees it.

    `collection` is what Megatron's modules take. Sizes and ranks are those of the tensor (`tp`), pipeline (`pp`),
    context (`cp`) and data (`dp`) dimension. The context-parallel ranks of a data-parallel rank share its texts, so
    the group `dp` holds ranks with different texts only; the parameters are the same on all ranks of `dp_cp`.
    """

    collection: ProcessGroupCollection
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def dp(self) -> dist.ProcessGroup:
        return self.collection.dp

    @property
    def tp(self) -> dist.ProcessGroup:
        return self.collection.tp

    @property
    def pp(self) -> dist.ProcessGroup:
        return self.collection.pp

    @property
    def cp(self) -> dist.ProcessGroup:
        return self.collection.cp

    @property
    def dp_cp(self) -> dist.ProcessGroup:
        return self.collection.dp_cp

    @property
    def tp_cp(self) -> dist.ProcessGroup:
        return self.collection.tp_cp

    def members(self) -> dict[str, list[int]]:
        """Ranks of the groups that this rank is in."""
        groups = {"tp": self.tp, "pp": self.pp, "cp": self.cp, "dp": self.dp, "dp_cp": self.dp_cp}
        return {name: dist.get_process_group_ranks(group) for name, group in groups.items()}


def initialize(config: ParallelConfig) -> Groups:
    """Join the other processes (those of `torchrun`, or none) and lay out the groups.

    Raises:
        ConfigError: TP x PP x CP does not divide the number of processes, or the launcher's variables are wrong.
        RendezvousError: the processes could not meet.
    """
    device.prepare()
    here = rendezvous.place()
    _check_size(config, here.world_size if here else 1)
    # Later than the watchdog, which knows who is late: this is for what it cannot see.
    timeout = timedelta(minutes=config.timeout_minutes) + min(timedelta(minutes=config.timeout_minutes / 2), _MARGIN)
    if not dist.is_initialized():
        _join(here, timeout)
    return _lay_out(config, timeout, has_gloo=True)


def pretend(config: ParallelConfig, rank: int, world_size: int) -> Groups:
    """Be one of many processes of which no other is there: groups have their members, and nothing is sent.

    For a dry run. Groups of before are left; `shutdown` ends these.

    Raises:
        ConfigError: as `initialize`.
    """
    # Registers the back end.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    device.prepare()
    _check_size(config, world_size)
    shutdown()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    return _lay_out(config, timedelta(minutes=config.timeout_minutes), has_gloo=False)


def _check_size(config: ParallelConfig, world_size: int) -> None:
    replica = config.tp * config.pp * config.cp
    if world_size % replica:
        raise ConfigError(
            f"parallel.tp x parallel.pp x parallel.cp = {config.tp} x {config.pp} x {config.cp} = {replica} does not "
            f"divide the {world_size} process(es) of this run; start a multiple of it with torchrun --nproc-per-node"
        )


def _lay_out(config: ParallelConfig, timeout: timedelta, *, has_gloo: bool) -> Groups:
    """Megatron's groups among the processes that have joined."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        config.tp,
        config.pp,
        virtual_pipeline_model_parallel_size=config.chunks_per_stage if config.chunks_per_stage > 1 else None,
        context_parallel_size=config.cp,
        distributed_timeout_minutes=timeout.total_seconds() / 60,
        create_gloo_process_groups=has_gloo,
    )
    groups = Groups(
        collection=ProcessGroupCollection.use_mpu_process_groups(),
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=config.tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=config.pp,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=config.cp,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
    )
    # Megatron's layers fork its random tracker even where nothing is drawn, so it must know its states.
    seed_everything(0)
    return groups


def _join(here: rendezvous.Place | None, timeout: timedelta) -> None:
    global _store, _patient
    _patient = None
    if here is None or here.is_single_node:
        rendezvous.listen_on_loopback_only()
    # Processes start seconds apart, however short the timeout of a collective is.
    _store = rendezvous.open_store(here, max(timeout, _SHORTEST_MEETING)) if here else dist.HashStore()
    rank, world_size = (here.rank, here.world_size) if here else (0, 1)
    dist.init_process_group(device.backend(), store=_store, rank=rank, world_size=world_size, timeout=timeout)


def own_connection() -> dist.Store:
    """The store of the run over a connection of its own, which another thread may use."""
    return _store.clone()


def patient_group() -> dist.ProcessGroup:
    """A group of all ranks over gloo that waits for as long as it takes, not `parallel.timeout_minutes` only."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))


def first_rank_does(work: Callable[[], Any], group: dist.ProcessGroup | None = None) -> Any:
    """Run `work` on rank 0 while the others wait; all get its (small) result.

    What it raises is raised on every rank, so that none hangs. The work may take hours (tokenising a large data set),
    so the others wait in `group`, or in one that is patient.
    """
    outcome: list[Any] = [None, None]
    group = group or _patience()
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as caught:
            outcome[1] = _portable(caught)
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def every_rank_does(work: Callable[[], Any], group: dist.ProcessGroup | None = None) -> list[Any]:
    """Run `work` on every rank; all get all (small) results, by rank.

    What it raises on one rank is raised on every rank, so that none hangs. They wait as in `first_rank_does`.
    """
    return _all_do(work, group or _patience())


Ask = Callable[[Any], list[Any]]
"""Sends a request to all ranks, this one included, and returns their answers by rank."""


def first_rank_leads(work: Callable[[Ask], Any], serve: Callable[[Any], Any]) -> Any:
    """Run `work` on rank 0, which may ask all ranks to `serve` a request, as often as it likes; all get its result.

    What it raises, or a rank that serves, is raised on every rank, so that none hangs. `serve` may communicate within
    this rank's replica. Requests, answers and the result travel as pickles, whole.
    """
    group = _patience()
    if dist.get_rank() != 0:
        return _follow(serve, group)

    def ask(request: Any) -> list[Any]:
        dist.broadcast_object_list([True, request, None], src=0, group=group)
        return _answer(serve, request, group)

    result, failure = None, None
    try:
        result = work(ask)
    except Exception as caught:
        failure = caught
    dist.broadcast_object_list([False, result, failure and _portable(failure)], src=0, group=group)
    if failure is not None:
        raise failure
    return result


def _follow(serve: Callable[[Any], Any], group: dist.ProcessGroup) -> Any:
    """Serve what rank 0 asks for until it ends, with its result or its error."""
    while True:
        message: list[Any] = [None, None, None]
        dist.broadcast_object_list(message, src=0, group=group)
        goes_on, content, failure = message
        if failure is not None:
            raise failure
        if not goes_on:
            return content
        _answer(serve, content, group)


def _answer(serve: Callable[[Any], Any], request: Any, group: dist.ProcessGroup) -> list[Any]:
    """Serve a request; rank 0 gets all answers by rank, or raises the first error among them."""
    answer: tuple[Any, Exception | None]
    try:
        answer = (serve(request), None)
    except Exception as caught:
        answer = (None, _portable(caught))
    answers: list[Any] | None = [None] * group.size() if dist.get_rank() == 0 else None
    dist.gather_object(answer, answers, dst=0, group=group)
    for _, failure in answers or []:
        if failure is not None:
            raise failure
    return [result for result, _ in answers or []]


def _patience() -> dist.ProcessGroup:
    """A patient group, made when it is first needed and kept: each connects every rank with every other one."""
    global _patient
    _patient = _patient or patient_group()
    return _patient


def replica_does(work: Callable[[], Any]) -> list[Any]:
    """As `every_rank_does`, among the processes that share one text only: tensor, pipeline and context parallel.

    They wait for each other under `parallel.timeout_minutes`.
    """
    context, model = parallel_state.get_context_parallel_group(), parallel_state.get_model_parallel_group()
    return [one for part in _all_do(lambda: _all_do(work, model), context) for one in part]


def _all_do(work: Callable[[], Any], group: dist.ProcessGroup) -> list[Any]:
    outcome: tuple[Any, Exception | None]
    try:
        outcome = (work(), None)
    except Exception as caught:
        outcome = (None, _portable(caught))
    outcomes: list[Any] = [None] * group.size()
    dist.all_gather_object(outcomes, outcome, group=group)
    for _, caught in outcomes:
        if caught is not None:
            raise caught
    return [result for result, _ in outcomes]


def _portable(error: Exception) -> Exception:
    """The error, or where it cannot travel to other ranks, which would wait for ever, one that says the same."""
    try:
        copy.deepcopy(error)  # as pickling does it
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def largest(value: int) -> int:
    """The largest of all ranks' values; every rank calls this."""
    values = torch.tensor(value, dtype=torch.int64, device=device.current())
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return int(values.item())


def seed_everything(seed: int) -> None:
    """Seed the default generator (equal on all tensor ranks) and Megatron's tracker (different on each)."""
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)


def shutdown() -> None:
    """Leave the process groups; collectives still queued elsewhere are not waited for."""
    global _store, _patient
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    _store = _patient = None
