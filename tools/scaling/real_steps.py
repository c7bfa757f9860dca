"""Steps of the trainer in processes over gloo, with what each allocates and hands to the network.

A case is a layout, a way of stepping and a small model. Memory is what torch's allocator says that it gives out and
takes back (`[memory]` events of its profiler), from before the model is built: not the resident set, in which
libraries and freed pages count. On a GPU it is the peak of `torch.cuda`.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from nvembed_mcore.config import (
    DataConfig,
    DatasetConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PoolingConfig,
    PrecisionConfig,
    RunConfig,
    StepConfig,
)
from nvembed_mcore.data.batch import Batch, Sample, make_batch
from nvembed_mcore.data.packing import Text
from nvembed_mcore.scaling.architecture import Architecture
from nvembed_mcore.scaling.layout import Layout
from nvembed_mcore.scaling.workload import Lengths, Workload

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

ARCHITECTURE = Architecture(
    vocab_size=1000,
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
)
TIMEOUT_SECONDS = 180
STEPS = 3
"""Measured steps of a case."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One layout of the small model.

    `changes` are fields of the architecture, `texts` the least and the most tokens of a passage. On `cuda` layers are
    those that a run would have there, in bfloat16.
    """

    name: str
    world: int = 1
    tp: int = 1
    pp: int = 1
    chunks: int = 1
    sp: bool = True
    way: str = "single"
    budget: int = 100_000
    distributed: bool = True
    overlap: bool = False
    gather: bool = False
    exchange: str = "auto"
    kind: str = "latent"
    targets: tuple[str, ...] = ()
    rank: int = 8
    queries: int = 8
    negatives: int = 2
    loss: dict = field(default_factory=dict, hash=False)
    changes: dict = field(default_factory=dict, hash=False)
    fp8: str = "off"
    cp: int = 1
    mask: str = "bidirectional"
    first: int | None = None
    last: int | None = None
    texts: tuple[int, int] = (20, 120)
    fgm: float = 0.0
    device: str = "cpu"

    @property
    def architecture(self) -> Architecture:
        return Architecture(**{**vars(ARCHITECTURE), **self.changes})

    @property
    def config(self) -> RunConfig:
        """The run that this case is a step of; its paths are not read."""
        lora = LoraConfig(rank=self.rank, dropout=0.1, targets=[*self.targets]) if self.targets else LoraConfig()
        pooling = PoolingConfig(kind=self.kind, num_latents=32, num_heads=4, head_width=32)
        backend, dtype = ("local", "float32") if self.device == "cpu" else ("auto", "bfloat16")
        return RunConfig(
            run_dir="unused",
            steps=2,
            batch_size=self.queries,
            data=DataConfig(tokenizer="unused", datasets=[DatasetConfig(path="unused")]),
            model=ModelConfig(config="unused", pooling=pooling, lora=lora, backend=backend, attention_mask=self.mask),
            precision=PrecisionConfig(dtype=dtype, fp8=self.fp8),
            parallel=ParallelConfig(
                tp=self.tp,
                pp=self.pp,
                cp=self.cp,
                layers_in_first_stage=self.first,
                layers_in_last_stage=self.last,
                chunks_per_stage=self.chunks,
                sequence_parallel=self.sp,
                overlap_grad_reduce=self.overlap,
                overlap_param_gather=self.gather,
                timeout_minutes=2,
            ),
            step=StepConfig(
                way=self.way,
                tokens_per_microbatch=self.budget,
                gradient_exchange=self.exchange,
                fgm_epsilon=self.fgm,
            ),
            loss=LossConfig(**self.loss),
            optim=OptimConfig(distributed=self.distributed),
        )

    @property
    def batch(self) -> Batch:
        """Queries of 8 to 30 tokens with a positive and hard negatives of `texts` tokens, from and to."""
        random = np.random.default_rng(0)

        def text(shortest: int, longest: int) -> Text:
            count = int(random.integers(shortest, longest + 1))
            return Text(random.integers(0, self.architecture.vocab_size, count).astype(np.int32), 1)

        samples = []
        for number in range(self.queries):
            passages = [text(*self.texts) for _ in range(1 + self.negatives)]
            ids = np.arange(len(passages)) + number * len(passages)
            samples.append(Sample(text(8, 30), passages, ids, ids[:1], in_batch=True))
        return make_batch(samples)

    @property
    def lengths(self) -> Lengths:
        batch = self.batch
        of_queries = np.zeros(batch.num_queries, dtype=bool)
        return Lengths(
            tokens=batch.lengths[None],
            query=np.concatenate([np.arange(batch.num_queries), batch.passage_query])[None],
            is_positive=np.concatenate([of_queries, batch.is_positive])[None],
            source="the case",
        )

    @property
    def workload(self) -> Workload:
        return Workload.of(self.config, self.architecture, self.lengths, device_type=self.device)

    @property
    def layout(self) -> Layout:
        return Layout.of(self.config, self.world)


@dataclass(frozen=True)
class Measured:
    """What a rank's steps did.

    Attributes:
        pp_rank, dp_rank: its pipeline stage and data-parallel rank.
        static: bytes of weights, gradients and moments.
        work: the most that was allocated during a step besides.
        calls, traffic: numbers and bytes of collectives and sends, as `parallel.traffic.Traffic` counts them, of
            a step.
    """

    pp_rank: int
    dp_rank: int
    static: int
    work: int
    calls: dict[tuple[str, str], int]
    traffic: dict[tuple[str, str], int]


@lru_cache
def run(cases: tuple[Case, ...]) -> dict[str, list[Measured]]:
    """Each case's measurements by rank, by its name; processes are started once for each number of them.

    All cases are of one device.
    """
    found = {}
    for world in sorted({case.world for case in cases}):
        found |= _run_world(world, [case for case in cases if case.world == world])
    return found


def _run_world(world: int, cases: list[Case]) -> dict[str, list[Measured]]:
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    try:
        for rank in range(world):
            here, there = context.Pipe()
            processes.append(context.Process(target=_serve, args=(rank, world, cases[0].device, there)))
            processes[-1].start()
            pipes.append(here)
        found = {}
        for case in cases:
            port = _free_port()
            for pipe in pipes:
                pipe.send((case, port))
            found[case.name] = [_answer(pipe, case, rank) for rank, pipe in enumerate(pipes)]
        for pipe in pipes:
            pipe.send(None)
        return found
    finally:
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()


def _answer(pipe: Connection, case: Case, rank: int) -> Measured:
    if not pipe.poll(TIMEOUT_SECONDS):
        raise RuntimeError(f"{case.name}: rank {rank} did not answer in {TIMEOUT_SECONDS} s")
    found = pipe.recv()
    if isinstance(found, str):
        raise RuntimeError(f"{case.name}: rank {rank}\n{found}")
    return found


def _serve(rank: int, world: int, device: str, pipe: Connection) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
    os.environ["OMP_NUM_THREADS"] = "1"
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from nvembed_mcore.parallel.groups import shutdown

    while (job := pipe.recv()) is not None:
        case, port = job
        os.environ["MASTER_PORT"] = str(port)
        try:
            pipe.send(measure(case))
        except Exception:
            pipe.send(traceback.format_exc())
        shutdown()
        gc.collect()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def measure(case: Case) -> Measured:
    """Build the case's step on this rank and take some; the first allocates the moments, the others are measured."""
    from nvembed_mcore.metrics import PhaseTimer
    from nvembed_mcore.parallel.groups import initialize
    from nvembed_mcore.parallel.traffic import Traffic

    groups, others = initialize(case.config.parallel), bytes_of_all()
    with Allocations() as allocations:
        step, batch = build(case, groups), case.batch
        step(batch, 1, PhaseTimer())
        held = bytes_of_all() - others
        for number in range(STEPS):
            allocations.mark()
            with Traffic(groups) as traffic:
                step(batch, 2 + number, PhaseTimer())
    static = static_bytes(step)
    # What was held counts by what is there, not by what the allocator has not seen come back.
    work = allocations.least + held - static
    return Measured(groups.pp_rank, groups.dp_rank, static, work, dict(traffic.calls), dict(traffic.bytes))


def static_bytes(step: Any) -> int:
    """Bytes of weights, gradient buffers and optimizer state."""
    tensors = [parameter for chunk in step.chunks for parameter in chunk.parameters()]
    for chunk in step.chunks:
        tensors += [one for buffer in chunk.buffers for one in (buffer.param_data, buffer.grad_data)]
    for one in step.optimizer.chained_optimizers:
        if one.optimizer is not None:
            tensors += [parameter for group in one.optimizer.param_groups for parameter in group["params"]]
            tensors += [value for state in one.optimizer.state.values() for value in state.values()]
    return bytes_of(tensors)


def bytes_of_all() -> int:
    """Bytes of all tensors that this process can reach."""
    import torch

    gc.collect()
    # Of other classes are those that stand for tensors of a dry run, which have no bytes.
    return bytes_of(one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter))


def bytes_of(tensors: Iterable[Any]) -> int:
    """Bytes of the storages of those that are tensors, each counted once."""
    import torch

    storages = [one.untyped_storage() for one in tensors if isinstance(one, torch.Tensor)]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


def build(case: Case, groups: Any) -> Any:
    """The case's `ContrastiveStep`, with random weights."""
    from transformers import MistralConfig

    from nvembed_mcore.build import build_model
    from nvembed_mcore.optim import build_optimizer, set_learning_rate
    from nvembed_mcore.step import ContrastiveStep

    config = case.config
    sizes = {name: value for name, value in vars(case.architecture).items() if name != "gated_mlp"}
    chunks = build_model(config, MistralConfig(**sizes, max_position_embeddings=512, sliding_window=None), groups)
    optimizer = build_optimizer(config.optim, chunks)
    set_learning_rate(optimizer, 1e-3)
    return ContrastiveStep(chunks, optimizer, groups, step=config.step, loss=config.loss, seed=0)


class Allocations:
    """The most bytes that torch's allocator gives out between two marks, beyond what it had given out at the first.

    On a CPU what another thread frees is missed (gloo's threads let go of a few tensors, by chance), so it is too much
    rather than too little: of equal steps the least counts.

    Attributes:
        least: of all marks but the last to the next one, and of the last to the end of the block.
    """

    def __enter__(self) -> Allocations:
        import torch

        from nvembed_mcore import device

        self._marks: list[int] = []
        self._is_cuda, self._found = device.has_cuda(), []
        if not self._is_cuda:
            cpu = torch.profiler.ProfilerActivity.CPU
            self._profile = torch.profiler.profile(activities=[cpu], profile_memory=True)
            self._profile.start()
        return self

    def mark(self) -> None:
        """A peak counts from here."""
        if not self._is_cuda:
            self._marks.append(time.time_ns())
            return
        import torch

        self._end_on_cuda()
        torch.cuda.reset_peak_memory_stats()
        self._marks.append(torch.cuda.memory_allocated())

    def _end_on_cuda(self) -> None:
        import torch

        torch.cuda.synchronize()
        if self._marks:
            self._found.append(torch.cuda.max_memory_allocated() - self._marks[-1])

    def __exit__(self, *_: object) -> None:
        if self._is_cuda:
            self._end_on_cuda()
        else:
            self._profile.stop()
            events = self._profile.profiler.kineto_results.events()
            changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
            self._found = [peak_after(begin, end, changes) for begin, end in pairwise([*self._marks, time.time_ns()])]
        self.least = min(self._found)


def peak_after(begin: int, end: int, changes: list[tuple[int, int]]) -> int:
    """The largest sum of the changes (moment, bytes) from `begin` to before `end`, in order."""
    peak = total = 0
    for moment, change in changes:
        if begin <= moment < end:
            total += change
            peak = max(peak, total)
    return peak
