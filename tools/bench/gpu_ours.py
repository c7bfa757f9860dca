"""The trainer on one GPU: LoRA and full steps, embedding alone, the head's share, what the host needs for a layer."""

from __future__ import annotations

import statistics

import torch
from gpu_measure import Figures, begin_peak, fastest, is_out_of_memory, peak, queueing_seconds, release, seconds_of
from gpu_workload import KINDS, Size, make_batches

from nvembed_mcore import device
from nvembed_mcore.config import LossConfig, OptimConfig, ParallelConfig, PrecisionConfig, StepConfig
from nvembed_mcore.data.batch import Batch
from nvembed_mcore.data.packing import Pack, make_pack
from nvembed_mcore.metrics import PhaseTimer
from nvembed_mcore.model.attention import packing_of
from nvembed_mcore.model.encoder import Encoder, wrap_data_parallel
from nvembed_mcore.optim import build_optimizer, set_learning_rate
from nvembed_mcore.parallel.groups import Groups, initialize
from nvembed_mcore.scaling.flops import pack_flops
from nvembed_mcore.schedule import embed_packs, pack_multiple, packs_of_rank, plan_texts
from nvembed_mcore.step import ContrastiveStep

HOST_TOKENS = 32
"""Multiple of the tokens of the pack with which queueing is timed: a GPU is done with it before the host is."""
TERA = 1e12


@torch.no_grad()
def fill(module: torch.nn.Module) -> None:
    """Random weights, made on the device: norms 1, biases 0, everything else normal of deviation 0.02."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.02)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


class Ours:
    """The encoder, and for training an optimizer and a step around it."""

    def __init__(
        self, size: Size, groups: Groups, precision: PrecisionConfig, *, trains: bool, adapters: bool = True
    ) -> None:
        """
        Args:
            trains: otherwise it can only embed, and has no adapters, as a merged export.
            adapters: train them and the head; otherwise all weights.
        """
        self.size, self.groups = size, groups
        self.hf_config, model = size.hf_config(), size.model(adapters=trains and adapters)
        self.lora = model.adapters
        self.encoder = Encoder(self.hf_config, model, ParallelConfig(), groups, precision=precision)
        fill(self.encoder)
        if not trains:
            self.chunks = [self.encoder.eval().requires_grad_(False)]
            return
        self.chunks = wrap_data_parallel([self.encoder], ParallelConfig(), distributed_optimizer=True)
        self.optimizer = build_optimizer(OptimConfig(), self.chunks)
        set_learning_rate(self.optimizer, 1e-5)
        self.done = 0

    def step(self, way: str) -> ContrastiveStep:
        how = StepConfig(way=way, tokens_per_microbatch=self.size.pack_tokens)
        return ContrastiveStep(self.chunks, self.optimizer, self.groups, step=how, loss=LossConfig(), seed=0)

    def packs(self, batch: Batch) -> list[Pack]:
        plan = plan_texts(batch.lengths, self.chunks, self.groups, self.size.pack_tokens)
        return packs_of_rank(batch.texts, plan, self.chunks, self.groups)

    def flops(self, batch: Batch) -> float:
        """Model FLOPs of a step: 6 a weight and token, and with adapters 4 for the weights that they leave alone."""
        return pack_flops(self.hf_config, self.size.pooling(), batch.lengths.tolist(), lora=self.lora)

    def seconds(self, batch: Batch, way: str) -> dict[str, float]:
        """Median seconds of a step's phases, and `total`."""
        step, timer = self.step(way), PhaseTimer(device.synchronize)
        laps = []
        for _ in range(1 + self.size.steps):
            timer.lap()
            self.done += 1
            step(batch, self.done, timer)
            device.synchronize()
            laps.append(timer.lap())
        return {phase: statistics.median(lap[phase] for lap in laps[1:]) for phase in laps[-1]}


def lora(figures: Figures, size: Size, name: str, precision: dict[str, str]) -> None:
    """Embedding alone, then steps that train adapters and head, with packs of both kinds."""
    groups, how = initialize(ParallelConfig()), PrecisionConfig(**precision)
    forward(figures, size, name, groups, how)
    release()
    ours = Ours(size, groups, how, trains=True)
    backend = ours.encoder.backend
    figures.add(name, layers_by=backend.layers, fp8_is_emulated=int(backend.is_fp8_emulated))
    for kind in KINDS:
        steps(
            figures,
            ours,
            f"{name}_lora_{kind}",
            kind,
            size.queries if kind == "msmarco" else max(1, size.queries // 2),
        )
    head_and_host(figures, ours, name)
    (batch,) = make_batches(size, "msmarco", size.large_queries)
    total = ours.seconds(batch, "cached")["total"]
    figures.add(f"{name}_lora_cached", tokens_per_second=int(batch.lengths.sum()) / total)


def steps(figures: Figures, ours: Ours, name: str, kind: str, queries: int) -> None:
    """The fastest batch whose graphs all fit, and its figures."""
    found: dict[int, dict[str, float]] = {}

    def rate(number: int) -> float:
        (batch,) = make_batches(ours.size, kind, number)
        begin_peak()
        found[number] = ours.seconds(batch, "retain") | {"peak": peak()}
        return int(batch.lengths.sum()) / found[number]["total"]

    best = fastest(rate, queries, ours.size.most_queries)
    if not best.size:
        raise torch.OutOfMemoryError(f"{name}: out of memory at {best.too_large} queries")
    seconds, (batch,) = found[best.size], make_batches(ours.size, kind, best.size)
    figures.add(
        name,
        tokens_per_second=best.rate,
        tflops=ours.flops(batch) / seconds["total"] / TERA,
        peak_bytes=int(seconds["peak"]),
        queries=best.size,
        tokens=int(batch.lengths.sum()),
        seconds=seconds["total"],
        out_of_memory_at=best.too_large,
    )
    for phase in ("embed", "score", "backward", "optimizer"):
        figures.add(name, **{f"seconds_{phase}": seconds[phase]})


def forward(figures: Figures, size: Size, name: str, groups: Groups, precision: PrecisionConfig) -> None:
    """Embedding without graphs, with packs of both kinds."""
    ours = Ours(size, groups, precision, trains=False)
    for kind in KINDS:
        (batch,) = make_batches(size, kind, size.large_queries)
        packs = ours.packs(batch)
        begin_peak()
        seconds = seconds_of(lambda packs=packs: embed_packs(ours.chunks, packs), size.steps)
        figures.add(
            f"{name}_forward_{kind}",
            tokens_per_second=int(batch.lengths.sum()) / seconds,
            tflops=ours.flops(batch) / 3 / seconds / TERA,
            peak_bytes=peak(),
        )


def head_and_host(figures: Figures, ours: Ours, name: str) -> None:
    """The head's share of a step's time, and how long the host needs to queue a layer forward and backward."""
    (chunk,), layers = ours.chunks, ours.size.layers
    queries = int(figures.found[f"{name}_lora_msmarco_queries"])
    (batch,) = make_batches(ours.size, "msmarco", queries)
    pack = ours.packs(batch)[0]
    packing = packing_of(pack.lengths, device.current())
    shape = (len(pack.token_ids), ours.size.hidden)
    states = torch.randn(shape, dtype=ours.encoder.backend.dtype, device=device.current()).requires_grad_()
    trained = [states, *ours.encoder.pooling.parameters()]

    def head() -> None:
        torch.autograd.grad(ours.encoder._pool(states, pack, packing).sum(), trained)

    of_pack = figures.found[f"{name}_lora_msmarco_seconds"] * pack.real_tokens / int(batch.lengths.sum())
    head_seconds = seconds_of(head, ours.size.steps)
    figures.add(name, head_seconds=head_seconds, head_share=head_seconds / of_pack)
    small = make_pack([batch.texts[0]], max(HOST_TOKENS, pack_multiple(ours.chunks)))

    def both(pack: Pack) -> None:
        chunk(pack).sum().backward()

    host = queueing_seconds(lambda: both(small), 3 * ours.size.steps)
    host_forward = queueing_seconds(lambda: chunk(small), 3 * ours.size.steps)
    gpu = seconds_of(lambda: both(pack), ours.size.steps)
    figures.add(
        name,
        host_forward_ms_a_layer=1e3 * host_forward / layers,
        host_backward_ms_a_layer=1e3 * (host - host_forward) / layers,
        pack_ms_a_layer=1e3 * gpu / layers,
        # Where the host takes as long as the GPU; packs below it leave the GPU waiting.
        launch_bound_below_tokens=len(pack.token_ids) * host / gpu,
    )


def full(figures: Figures, size: Size, name: str, precision: dict[str, str]) -> None:
    """Steps that train all weights: as many layers as fit, half of them, and the line through both at all layers."""
    groups, how = initialize(ParallelConfig()), PrecisionConfig(**precision)
    (batch,) = make_batches(size, "longest", max(1, size.queries // 2))
    tokens, layers, seconds = int(batch.lengths.sum()), size.layers * 3 // 4, {}
    while layers >= 1 and len(seconds) < 2:
        try:
            begin_peak()
            seconds[layers] = Ours(size.with_layers(layers), groups, how, trains=True, adapters=False).seconds(
                batch, "retain"
            )
            figures.add(f"{name}_full_{layers}_layers", seconds=seconds[layers]["total"], peak_bytes=peak())
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            figures.add(f"{name}_full", out_of_memory_at_layers=layers)
        release()
        # Where it does not fit, a quarter less; where it does, half of it for the line.
        layers = layers // 2 if seconds else layers * 3 // 4
    if len(seconds) < 2:
        raise MemoryError(f"a line needs two numbers of layers that fit, and only {sorted(seconds) or 'none'} did")
    many, few = sorted(seconds, reverse=True)
    a_layer = (seconds[many]["total"] - seconds[few]["total"]) / (many - few)
    scaled = seconds[many]["total"] + a_layer * (size.layers - many)
    flops = pack_flops(size.hf_config(), size.pooling(), batch.lengths.tolist())
    figures.add(
        f"{name}_full_longest",
        tokens_per_second=tokens / scaled,
        tflops=flops / scaled / TERA,
        seconds=scaled,
        measured_layers=many,
        tokens=tokens,
    )
