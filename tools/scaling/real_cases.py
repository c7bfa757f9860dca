"""Layouts and ways of the small model that memory and traffic are compared in."""

from __future__ import annotations

from real_steps import Case

ALL = ("q", "k", "v", "o", "gate", "up", "down")
PACK = 600
"""Tokens of a pack where a rank is to have several."""

R_DROP = {"r_drop_weight": 0.5}
WIDE = {"hidden_size": 256, "head_dim": 32, "num_hidden_layers": 1}

ONE = [
    Case(name="single, latent"),
    Case(name="retain, latent", way="retain", budget=PACK),
    Case(name="cached, latent", way="cached", budget=PACK),
    Case(name="single, mean, plain optimizer", kind="mean", distributed=False),
    Case(name="cached, last", kind="last", way="cached", budget=PACK),
    Case(name="single, self attention", kind="self_attention"),
    Case(name="single, multi-layer", kind="multi_layer"),
    Case(name="single, adapters, latent", targets=ALL),
    Case(name="cached, adapters on q and v, mean", targets=("q", "v"), kind="mean", way="cached", budget=PACK),
    Case(name="single, FP8 emulated", fp8="tensorwise"),
    Case(name="retain, symmetric", way="retain", budget=PACK, queries=16, loss={"symmetric": True}),
    Case(name="single, causal, last", kind="last", mask="causal", queries=4),
    Case(name="single, many short texts", kind="mean", queries=160, negatives=3, texts=(2, 6), changes=WIDE),
    Case(name="cached, large vocabulary", way="cached", budget=200, kind="mean", changes={"vocab_size": 30_000}),
    Case(name="single, FP8 emulated, delayed", fp8="delayed", kind="mean"),
    Case(name="cached, FGM", way="cached", budget=PACK, fgm=0.1),
    Case(name="retain, adapters, R-Drop", way="retain", targets=ALL, queries=16, loss=R_DROP),
    Case(name="single, wide", changes={"hidden_size": 256, "head_dim": 32, "num_hidden_layers": 2}),
]
TWO = [
    Case(name="DP 2, single", world=2),
    Case(name="DP 2, retain, plain optimizer", world=2, way="retain", budget=PACK, distributed=False),
    Case(name="DP 2, cached, reduce-scatter", world=2, way="cached", budget=PACK, exchange="reduce_scatter"),
    Case(name="DP 2, overlap of both", world=2, overlap=True, gather=True),
    Case(name="DP 2, adapters", world=2, targets=ALL, kind="mean"),
    Case(name="DP 2, symmetric", world=2, queries=12, exchange="recompute", loss={"symmetric": True}),
    Case(name="TP 2, SP, latent", world=2, tp=2),
    Case(name="TP 2, without SP", world=2, tp=2, sp=False, way="cached", budget=PACK),
    Case(name="TP 2, SP, adapters", world=2, tp=2, targets=ALL),
    Case(name="TP 2, adapters without SP", world=2, tp=2, sp=False, targets=("q", "up", "down"), kind="mean"),
    Case(name="TP 2, SP, self attention", world=2, tp=2, kind="self_attention"),
    Case(name="TP 2, SP, multi-layer", world=2, tp=2, kind="multi_layer", way="retain", budget=PACK),
    Case(name="PP 2", world=2, pp=2, way="cached", budget=PACK),
    Case(name="PP 2, interleaved", world=2, pp=2, chunks=2, way="cached", budget=PACK),
    Case(name="PP 2, multi-layer", world=2, pp=2, kind="multi_layer", way="cached", budget=PACK),
    Case(name="PP 2, uneven stages", world=2, pp=2, way="cached", budget=PACK, first=3, last=1, kind="mean"),
    Case(name="CP 2", world=2, cp=2),
    Case(name="CP 2, self attention", world=2, cp=2, kind="self_attention", way="cached", budget=PACK),
    Case(name="CP 2, multi-layer", world=2, cp=2, kind="multi_layer", way="retain", budget=PACK),
    Case(name="TP 2, SP, adapters, FGM", world=2, tp=2, targets=ALL, way="retain", budget=PACK, fgm=0.1),
    Case(name="DP 2, adapters, R-Drop", world=2, targets=ALL, kind="mean", way="cached", budget=PACK, loss=R_DROP),
    Case(name="PP 2, adapters, FGM, R-Drop", world=2, pp=2, targets=ALL, way="cached", fgm=0.1, loss=R_DROP),
    Case(name="CP 2, FGM", world=2, cp=2, way="cached", budget=PACK, fgm=0.1),
    Case(name="PP 2, learned temperature", world=2, pp=2, way="cached", loss={"learn_temperature": True}),
]
FOUR = [
    Case(name="TP 2, SP, DP 2", world=4, tp=2, way="retain", budget=PACK // 2),
    Case(name="PP 2, DP 2", world=4, pp=2, way="cached", budget=PACK // 2, distributed=False),
    Case(name="TP 2, SP, PP 2", world=4, tp=2, pp=2, way="cached", budget=PACK),
    Case(name="TP 2, SP, CP 2, adapters", world=4, tp=2, cp=2, targets=ALL, way="cached", budget=PACK),
    Case(name="CP 2, DP 2", world=4, cp=2, exchange="reduce_scatter"),
    Case(name="PP 4", world=4, pp=4, way="cached", budget=PACK // 2),
]
LARGE = dict(vocab_size=32_000, hidden_size=2048, intermediate_size=7168, num_hidden_layers=8)
LARGE |= dict(num_attention_heads=16, num_key_value_heads=4, head_dim=128)
BUDGET = 16_384
GPU = [
    Case(name="single, latent", device="cuda", changes=LARGE, queries=64),
    Case(name="cached, latent", device="cuda", changes=LARGE, queries=256, way="cached", budget=BUDGET),
    Case(name="retain, mean", device="cuda", changes=LARGE, queries=128, way="retain", budget=BUDGET, kind="mean"),
    Case(name="single, adapters", device="cuda", changes=LARGE, queries=128, targets=ALL),
    Case(name="single, FP8", device="cuda", changes=LARGE, queries=128, fp8="tensorwise"),
    Case(name="retain, adapters, FP8", device="cuda", changes=LARGE, queries=256, targets=ALL, fp8="delayed"),
]
"""On one GPU, of a model that it takes some gigabytes for."""
CASES = {1: ONE, 2: TWO, 4: FOUR}


def cases(most: int) -> tuple[Case, ...]:
    """Those on CPUs of up to `most` processes."""
    return tuple(case for world, some in CASES.items() if world <= most for case in some)
