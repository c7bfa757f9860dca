"""What follows from the figures of the GPU benchmark: MFU, ratios to peers, and which bars are met."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Figures = dict[str, Any]

RECIPES = ("fp8_tensorwise", "fp8_delayed", "fp8_blockwise")
RATE = "tokens_per_second"


@dataclass(frozen=True)
class Bar:
    """What a figure must reach, or with `is_most` must not exceed."""

    label: str
    key: str
    bound: float
    is_most: bool = False

    def verdict(self, figures: Figures) -> str:
        value = figures.get(self.key)
        if not isinstance(value, (int, float)):
            return "not measured"
        return "met" if (value <= self.bound if self.is_most else value >= self.bound) else "NOT MET"


def _bars() -> list[Bar]:
    found = []
    for name, step, forward, plain, best in (("bf16", 19e3, 38e3, 4, 1.5), ("fp8", 26e3, 52e3, 5, 2)):
        for kind in ("msmarco", "longest"):
            found.append(Bar(f"{name} LoRA step, packed, {kind}: tokens/s", f"{name}_lora_{kind}_{RATE}", step))
            found.append(Bar(f"{name} forward only, {kind}: tokens/s", f"{name}_forward_{kind}_{RATE}", forward))
        found.append(Bar(f"{name} over sentence-transformers, padded (sdpa)", f"{name}_over_st_plain", plain))
        found.append(Bar(f"{name} over sentence-transformers at its best", f"{name}_over_st_best", best))
    return [
        *found,
        Bar(
            "streaming loss: bytes beyond inputs and gradients", "kernel_info_nce_ours_extra_bytes", 1e9, is_most=True
        ),
        Bar("streaming loss: share of the matmul rate", "kernel_info_nce_share_of_matmul", 0.6),
        Bar("the head's share of a step, bf16", "bf16_head_share", 0.03, is_most=True),
    ]


BARS = _bars()


def derived(figures: Figures) -> Figures:
    """Figures that follow from others, as far as these are there."""
    found = _best_recipe(figures)
    every = figures | found
    for key in [key for key in every if key.endswith("_tflops") and not key.startswith(("matmul", "attention"))]:
        kind = "fp8" if key.startswith("fp8") else "bf16"
        name = key.removesuffix("_tflops")
        _divide(found, every, f"{name}_mfu", key, f"matmul_{kind}_tflops")
        _divide(found, every, f"{name}_mfu_of_spec", key, f"matmul_{kind}_spec_tflops")
    for name in ("bf16", "fp8"):
        for kind, peers in (("msmarco", ("st_plain", "st_best", "nemo")), ("longest", ("st_plain",))):
            for peer in peers:
                ratio = f"{name}_over_{peer}" + ("" if kind == "msmarco" else f"_{kind}")
                _divide(found, every, ratio, f"{name}_lora_{kind}_{RATE}", f"{peer}_{kind}_{RATE}")
        _divide(found, every, f"{name}_over_st_cached", f"{name}_lora_cached_{RATE}", f"st_cached_{RATE}")
    _divide(found, every, "kernel_info_nce_share_of_matmul", "kernel_info_nce_ours_tflop_per_s", "matmul_bf16_tflops")
    for key in [key for key in every if key.startswith("kernel_") and key.endswith("_ours_ms")]:
        name = key.removesuffix("_ours_ms")
        for other in ("torch", "compile"):
            _divide(found, every, f"{name}_over_{other}", f"{name}_{other}_ms", key)
    return found


def _best_recipe(figures: Figures) -> Figures:
    """`fp8_...`: the figures of the recipe whose LoRA step is fastest; none where FP8 is only emulated."""
    rates = {
        name: figures[f"{name}_lora_msmarco_{RATE}"]
        for name in RECIPES
        if f"{name}_lora_msmarco_{RATE}" in figures and not figures.get(f"{name}_fp8_is_emulated")
    }
    if not rates:
        return {}
    best = max(rates, key=rates.__getitem__)
    parts = [f"lora_{kind}" for kind in ("msmarco", "longest", "cached")] + ["forward_msmarco", "forward_longest"]
    keys = [f"{part}_{what}" for part in parts for what in (RATE, "tflops")]
    return {"fp8_best_recipe": best} | {
        f"fp8_{key}": figures[f"{best}_{key}"] for key in keys if f"{best}_{key}" in figures
    }


def _divide(found: Figures, figures: Figures, key: str, above: str, below: str) -> None:
    values = figures.get(above), figures.get(below)
    if all(isinstance(value, (int, float)) for value in values) and values[1]:
        found[key] = values[0] / values[1]


def lines(figures: Figures, with_bars: bool) -> list[str]:
    """The table: runs, bars, then every figure."""
    found = [f"{'run':32} {'tokens/s':>10} {'TFLOP/s':>8} {'MFU':>6} {'peak GB':>8} {'queries':>8}"]
    for key, value in figures.items():
        if key.endswith(f"_{RATE}") and not key.startswith("bar_"):
            name = key.removesuffix(f"_{RATE}")
            cells = [figures.get(f"{name}_{what}") for what in ("tflops", "mfu", "peak_bytes", "queries")]
            cells = [value, *cells[:2], cells[2] and cells[2] / 1e9, cells[3]]
            formats = ("10,.0f", "8.1f", "6.1%", "8.1f", "8d")
            found.append(f"{name:32} " + " ".join(_cell(*pair) for pair in zip(cells, formats, strict=True)))
    if with_bars:
        found += ["", f"{'bar':62} {'bound':>16} {'found':>16}"]
        for bar in BARS:
            bound = f"{'<=' if bar.is_most else '>='} {_plain(bar.bound)}"
            found.append(f"{bar.label:62} {bound:>16} {_plain(figures.get(bar.key)):>16} {bar.verdict(figures)}")
    if any(figures.get(f"{name}_fp8_is_emulated") for name in RECIPES):
        found += [
            "",
            "TransformerEngine cannot compute here: FP8 is emulated, slower than bf16, and judged by no bar.",
        ]
    found.append("")
    for key, value in figures.items():
        if not key.endswith("_table"):
            found.append(f"{key:48} {_plain(value)}")
    return found


def _plain(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return "-" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _cell(value: Any, how: str) -> str:
    width = int("".join(char for char in how.partition(",")[0].partition(".")[0] if char.isdigit()))
    return f"{value:{how}}" if isinstance(value, (int, float)) else f"{'-' if value is None else value:>{width}}"
