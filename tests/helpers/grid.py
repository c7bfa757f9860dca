"""The proof grid: every layout and way of stepping that is held against one process (docs/gradient-proof.md)."""

from __future__ import annotations

from collections.abc import Iterator

from nvembed_mcore.config_step import DistillationConfig
from nvembed_mcore.data.packing import make_plan
from tests.helpers.cases import Case, many_training_steps
from tests.helpers.plain import training_batch

BOUND = 1e-5
"""Largest relative difference allowed, in float32."""
LAYOUTS = [
    # processes, tp, sp, pp, chunks
    (1, 1, False, 1, 1),
    (2, 1, False, 1, 1),
    (2, 2, False, 1, 1),
    (2, 2, True, 1, 1),
    (2, 1, False, 2, 1),
    (2, 1, False, 2, 2),
    (4, 1, False, 1, 1),
    (4, 2, False, 1, 1),
    (4, 2, True, 1, 1),
    (4, 1, False, 2, 1),
    (4, 1, False, 2, 2),
    (4, 2, False, 2, 1),
    (4, 2, True, 2, 1),
    (4, 2, True, 2, 2),
    (4, 1, False, 4, 1),
]
LEARNED = {"learn_temperature": True}
ALL_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
DISTILLED = {"distillation": DistillationConfig(weight=0.7, teacher_temperature=0.5)}


def budget_for(packs: int, ranks: int, queries: int, multiple: int = 1, uneven: bool = False, cp: int = 1) -> int:
    """A token budget that gives the fullest rank `packs` packs of the first batch; with `uneven` another fewer."""
    lengths = training_batch(queries, 1).lengths
    for budget in range(20 // cp, 2000):
        counts = [len(one) for one in make_plan(lengths, ranks, budget, multiple=multiple, cp=cp).packs]
        if max(counts) == packs and (not uneven or min(counts) < packs):
            return budget
    raise AssertionError(f"no budget gives {packs} packs on {ranks} ranks")


def layouts_and_ways() -> Iterator[Case]:
    """Each layout with each way that it allows, one pack and three (pipeline size and twice that if interleaved)."""
    for number, (world, tp, sp, pp, chunks) in enumerate(LAYOUTS):
        ranks, multiple = world // (tp * pp), pp if chunks > 1 else 1
        counts = (pp, 2 * pp) if chunks > 1 else (1, 3)
        ways = [("cached", counts[0]), ("cached", counts[1])]
        if pp == 1:
            ways += [("single", 1), ("retain", 3)]
        for way, packs in ways:
            layout = dict(world=world, tp=tp, sp=sp, pp=pp, chunks=chunks, way=way, loss=LEARNED)
            budget = 100_000 if packs == 1 else budget_for(packs, ranks, 7, multiple)
            yield Case(**layout, budget=budget, distributed=False, overlap=number % 2 == 0)
            if packs > 1:
                yield Case(**layout, budget=budget, distributed=True, overlap=number % 2 == 1)


def is_long(case: Case) -> bool:
    """Whether the suite leaves a case to its long tests: four processes and several packs without the distributed
    optimizer, where the same layout and way stand with it, or with the latent head, beside it; and tensor parallelism
    without sequence parallelism on four processes, which it has on two."""
    is_plain = case.budget < 100_000 and not case.distributed
    return case.world == 4 and (is_plain or (case.tp == 2 and not case.sp))


def uneven_batches() -> Iterator[Case]:
    """Ranks with different numbers of packs, batches that W does not divide, ranks without texts, clipping off."""
    for way in ("retain", "cached"):
        yield Case(world=2, way=way, budget=budget_for(3, 2, 7, uneven=True), distributed=False)
        yield Case(world=4, way=way, budget=budget_for(2, 4, 5, uneven=True), queries=5, distributed=False)
        # No learned temperature: over three scores its gradient is the small difference of large numbers.
        yield Case(world=4, way=way, queries=1, distributed=False, overlap=True)
        yield Case(world=4, way=way, queries=1, distributed=False, exchange="reduce_scatter")
        yield Case(world=4, way=way, queries=1, distributed=True, overlap=True)
    yield Case(world=4, pp=2, way="cached", budget=budget_for(3, 2, 7, uneven=True), distributed=False)
    budget = budget_for(4, 2, 7, multiple=2, uneven=True)
    yield Case(world=4, pp=2, chunks=2, way="cached", budget=budget, distributed=False)
    for layout in (dict(pp=2), dict(tp=2, sp=True)):
        yield Case(world=4, **layout, way="cached", budget=200, distributed=False, exchange="reduce_scatter")
    yield Case(world=2, way="single", clip=0.0, distributed=False)
    yield Case(world=2, way="single", clip=0.0, distributed=True)


OPTIONS = {
    "same documents not masked": {"mask_same_document": False},
    "in-batch negatives within a data set": {"in_batch_from": "dataset"},
    "hard negatives not shared": {"share_hard_negatives": False},
    "false negatives by margin": {"false_negative_margin": -0.05},
    "symmetric": {"symmetric": True},
    "Matryoshka": {"matryoshka_dims": [8, 16]},
    "learned temperature": LEARNED,
    "distillation": DISTILLED,
    "distillation with others": {**LEARNED, "symmetric": True, "matryoshka_dims": [8, 16], **DISTILLED},
    "everything": {
        "learn_temperature": True,
        "symmetric": True,
        "matryoshka_dims": [8, 16],
        "false_negative_margin": 0.0,
        "in_batch_from": "dataset",
        "share_hard_negatives": False,
        **DISTILLED,
    },
}


def loss_options() -> Iterator[Case]:
    """Each option of the loss, with gradients exchanged both ways."""
    for option in OPTIONS.values():
        # With a margin, scores that are computed twice could fall on both sides of it: the configuration refuses that.
        for exchange in ("reduce_scatter", "recompute")[: 1 if "false_negative_margin" in option else 2]:
            yield Case(world=2, way="retain", budget=200, distributed=False, exchange=exchange, loss=option)
    yield Case(world=4, tp=2, sp=True, way="cached", budget=200, loss=OPTIONS["everything"])
    budget = budget_for(4, 2, 7, multiple=2)
    yield Case(world=4, pp=2, chunks=2, way="cached", budget=budget, distributed=False, loss=OPTIONS["everything"])


R_DROP = {"r_drop_weight": 0.5}
OPTIONS_UNDER_R_DROP = {
    "R-Drop": R_DROP,
    "R-Drop, learned temperature": R_DROP | LEARNED,
    "R-Drop, everything but a margin": R_DROP
    | {name: value for name, value in OPTIONS["everything"].items() if name != "false_negative_margin"},
}
EPSILON = 0.3
"""How far texts are moved, of some 1.2 that their embedded tokens are long."""


def two_passes() -> Iterator[Case]:
    """FGM and R-Drop: texts moved against the loss, and texts embedded twice (tests/helpers/passes.py)."""
    everything = OPTIONS_UNDER_R_DROP["R-Drop, everything but a margin"]
    moved = dict(fgm=EPSILON, loss=LEARNED, distributed=False)
    one, pair = budget_for(3, 1, 7), dict(world=2, **moved)
    yield Case(**moved, way="retain", budget=one)
    yield Case(**moved, way="cached", budget=80, targets=ALL_TARGETS, queries=4)
    yield Case(**pair, way="cached", budget=budget_for(3, 2, 7, uneven=True), overlap=True)
    yield Case(**pair, tp=2, sp=True, way="cached", budget=one)
    yield Case(**pair, pp=2, chunks=2, way="cached", budget=budget_for(4, 1, 7, multiple=2), overlap=True)
    yield Case(**pair, cp=2, way="retain", budget=budget_for(3, 1, 7, cp=2))
    twice = dict(world=2, loss=OPTIONS_UNDER_R_DROP["R-Drop, learned temperature"], distributed=False)
    yield Case(**twice, way="retain", budget=200, exchange="recompute")
    yield Case(**twice, pp=2, way="cached", budget=one)
    yield Case(fgm=EPSILON, loss=everything, way="cached", budget=80, queries=4, distributed=False)


def more_two_passes() -> Iterator[Case]:
    """The rest of the product, which the suite leaves to its long tests."""
    learned, everything = (
        OPTIONS_UNDER_R_DROP[name] for name in ("R-Drop, learned temperature", "R-Drop, everything but a margin")
    )
    ways = [dict(fgm=EPSILON, loss=LEARNED), dict(loss=learned), dict(fgm=EPSILON, loss=everything)]
    for number, (world, tp, sp, pp, chunks) in enumerate(LAYOUTS):
        ranks, multiple = world // (tp * pp), pp if chunks > 1 else 1
        layout = dict(world=world, tp=tp, sp=sp, pp=pp, chunks=chunks, overlap=number % 2 == 0)
        budget = budget_for(2 * multiple if chunks > 1 else 3, ranks, 7, multiple)
        for options in ways:
            yield Case(**layout, **options, way="cached", budget=budget, distributed=False)
        if pp == 1:
            exchange = ("recompute", "reduce_scatter")[number % 2]
            yield Case(**layout, **ways[number % 3], way="retain", budget=budget, exchange=exchange)
    for options in ways:
        yield Case(world=4, queries=1, **{**options, "loss": dict(options["loss"], learn_temperature=False)})
        yield Case(world=2, tp=2, sp=True, targets=ALL_TARGETS, **options, distributed=False)
        yield Case(world=2, pp=2, way="cached", targets=ALL_TARGETS, kind="multi_layer", **options, distributed=False)
        for layout in (dict(cp=4), dict(cp=2, tp=2, sp=True), dict(cp=2, pp=2), dict(cp=2)):
            ranks = 4 // (layout["cp"] * layout.get("tp", 1) * layout.get("pp", 1))
            budget = budget_for(3, ranks, 7, cp=layout["cp"])
            yield Case(world=4, **layout, **options, way="cached", budget=budget, distributed=False)
    yield Case(world=2, fgm=EPSILON, way="single", kind="self_attention", distributed=False)
    yield Case(world=2, fgm=EPSILON, way="single", clip=0.0, distributed=False)


def heads() -> Iterator[Case]:
    """The other pooling heads, and multi-layer pooling in every layout."""
    for kind in ("mean", "last", "self_attention"):
        yield Case(kind=kind, distributed=False)
        yield Case(world=2, tp=2, sp=True, kind=kind, distributed=False)
    # Only this one has something to carry from stage to stage.
    for number, (world, tp, sp, pp, chunks) in enumerate(LAYOUTS):
        ranks, multiple = world // (tp * pp), pp if chunks > 1 else 1
        layout = dict(world=world, tp=tp, sp=sp, pp=pp, chunks=chunks, kind="multi_layer", overlap=number % 2 == 0)
        budget = budget_for(2 * multiple if chunks > 1 else 3, ranks, 7, multiple)
        yield Case(**layout, way="cached", budget=budget, distributed=False)
        if layout["world"] * pp == tp:  # one data-parallel rank without stages
            yield Case(**layout, way="retain", budget=budget, distributed=True)
            yield Case(**layout, way="single", distributed=False)
    yield Case(world=4, way="cached", kind="multi_layer", queries=1, distributed=False, overlap=True)


def adapters() -> Iterator[Case]:
    """Low-rank adapters on all projections and on some, with a head that trains whole and one without weights."""
    yield Case(targets=ALL_TARGETS, distributed=False)
    yield Case(targets=ALL_TARGETS, kind="mean", loss=LEARNED)
    for sp in (False, True):
        yield Case(world=2, tp=2, sp=sp, targets=ALL_TARGETS, distributed=False)
        yield Case(world=2, tp=2, sp=sp, targets=ALL_TARGETS, distributed=True, way="cached", budget=200)
        yield Case(world=2, tp=2, sp=sp, targets=("k", "up", "o"), kind="mean", distributed=False)
        yield Case(world=4, tp=2, sp=sp, targets=("q", "v", "down"), distributed=False, way="retain", budget=200)
        yield Case(world=4, tp=2, sp=sp, pp=2, targets=ALL_TARGETS, distributed=False, way="cached", budget=200)
    for kind in ("self_attention", "multi_layer"):
        yield Case(world=2, tp=2, sp=True, targets=ALL_TARGETS, kind=kind, distributed=False)
    yield Case(world=2, targets=ALL_TARGETS, distributed=True, overlap=True)
    budget = budget_for(4, 2, 7, multiple=2)
    yield Case(world=4, pp=2, chunks=2, way="cached", budget=budget, targets=ALL_TARGETS, distributed=False)


def uneven_stages() -> Iterator[Case]:
    """Stages with different numbers of layers: an embedding table and one layer, or one layer and a head."""
    for stages in (dict(first=1), dict(last=1), dict(first=3, last=1)):
        yield Case(world=2, pp=2, **stages, way="cached", budget=budget_for(3, 1, 7), distributed=False, loss=LEARNED)
    layout = dict(world=4, tp=2, sp=True, pp=2, way="cached", budget=200, distributed=False)
    # Summaries of one layer go to the next stage, which adds those of three, or the other way.
    yield Case(**layout, first=1, kind="multi_layer")
    yield Case(**layout, last=1, kind="multi_layer", overlap=True)
    yield Case(**layout, last=1, targets=ALL_TARGETS)


def context() -> Iterator[Case]:
    """Texts that ranks share: every way of stepping, every head, and each other dimension beside it."""
    three = budget_for(3, 1, 7, cp=2)
    pair = dict(world=2, cp=2)
    yield Case(**pair, way="single", distributed=False, loss=LEARNED)
    yield Case(**pair, way="retain", budget=three, distributed=True, overlap=True, kind="last")
    yield Case(**pair, way="cached", budget=three, distributed=False, overlap=True, loss=LEARNED)
    yield Case(**pair, way="cached", budget=three, distributed=False, kind="self_attention")
    yield Case(**pair, way="retain", budget=three, distributed=False, kind="multi_layer", loss=LEARNED)
    yield Case(**pair, targets=ALL_TARGETS, kind="mean", distributed=False)
    uneven = budget_for(2, 2, 7, uneven=True, cp=2)
    yield Case(world=4, cp=2, way="cached", budget=uneven, distributed=False, loss=LEARNED | DISTILLED)
    yield Case(world=4, cp=2, tp=2, sp=True, way="cached", budget=three, distributed=False, loss=LEARNED | DISTILLED)
    yield Case(world=4, cp=2, pp=2, way="cached", budget=three, distributed=False, loss=LEARNED)
    yield Case(world=4, cp=4, way="retain", budget=budget_for(3, 1, 7, cp=4), distributed=False, loss=LEARNED)


def more_context() -> Iterator[Case]:
    """The rest of the product, which the suite leaves to its long tests."""
    for layout in (dict(cp=4), dict(cp=2), dict(cp=2, tp=2, sp=True), dict(cp=2, tp=2)):
        ranks = 4 // (layout["cp"] * layout.get("tp", 1))
        three = budget_for(3, ranks, 7, cp=layout["cp"])
        for number, (way, budget) in enumerate((("single", 100_000), ("retain", three), ("cached", three))):
            for kind in ("latent", "self_attention", "multi_layer"):
                overlap = bool(number % 2)
                yield Case(world=4, **layout, way=way, budget=budget, kind=kind, distributed=False, overlap=overlap)
            yield Case(world=4, **layout, way=way, budget=budget, loss=LEARNED, overlap=not number % 2)
        yield Case(world=4, **layout, way="cached", budget=three, targets=ALL_TARGETS, distributed=False, loss=LEARNED)
        yield Case(world=4, **layout, queries=1, distributed=False)
    for chunks in (1, 2):
        budget = budget_for(2 * chunks, 1, 7, multiple=chunks, cp=2)
        for kind in ("latent", "last", "multi_layer"):
            layout = dict(world=4, cp=2, pp=2, chunks=chunks, way="cached", budget=budget, kind=kind)
            yield Case(**layout, distributed=False, targets=ALL_TARGETS if kind == "last" else ())
            yield Case(**layout, distributed=True, overlap=True)
    everything = OPTIONS["everything"]
    yield Case(world=4, cp=2, way="cached", budget=budget_for(3, 2, 7, cp=2), loss=everything, distributed=False)


GRID = {
    "Layouts and ways": [case for case in layouts_and_ways() if not is_long(case)],
    "Uneven stages": list(uneven_stages()),
    "Uneven batches": list(uneven_batches()),
    "Options of the loss": list(loss_options()),
    "Pooling heads": [case for case in heads() if not is_long(case)],
    "Low-rank adapters": list(adapters()),
    "Context parallelism": list(context()),
    "FGM and R-Drop": list(two_passes()),
}
LONG_GRID = {
    "Layouts and ways, the rest": [case for case in layouts_and_ways() if is_long(case)],
    "Pooling heads, the rest": [case for case in heads() if is_long(case)],
    "Context parallelism, the rest": list(more_context()),
    "FGM and R-Drop, the rest": list(more_two_passes()),
}
"""Too long for every run of the suite."""


def run_grid(world, grid: dict[str, list[Case]]) -> dict[Case, list[dict[str, float]]]:
    """Results by rank of every case; one job for each layout, in which its groups are made once.

    Args: world: gives the processes of a size, `world(4)`.
    """
    cases = [case for many in grid.values() for case in many]
    results = {}
    for layout in sorted({case.layout for case in cases}):
        alike = [case for case in cases if case.layout == layout]
        by_rank = world(layout[0]).run(many_training_steps, alike)
        results.update(zip(alike, zip(*by_rank, strict=True), strict=True))
    return results
