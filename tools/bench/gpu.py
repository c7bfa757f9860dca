"""What the trainer does on one GPU, near what the GPU can do, and beside others in the same run.

    PYTHONPATH=. python tools/bench/gpu.py --json gpu.json              under 8 minutes on one H200
    PYTHONPATH=. python tools/bench/gpu.py --json step.json --profile --only matmul lora_bf16 lora_fp8_tensorwise
                                                                        and where the time of a step goes
    PYTHONPATH=. python tools/bench/gpu.py --device cpu --tiny          the same path with a tiny model, in seconds

from the root of the repository, with the package installed there (`pip install --no-deps --no-build-isolation -e .`
needs no index). On a machine without an index TransformerEngine comes as two wheels that were built or fetched
elsewhere: docs/install-gpu.md and tools/install_gpu.sh. Without it the trainer's own layers are measured, whose FP8 is
emulated and judged by no bar. A peer that is not installed is a cell that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_report import BARS, derived, lines

FIGURES = """
Mistral-7B's shapes, all layers, NV-Embed's head, random weights, AdamW. A query has a positive and seven hard
negatives. `msmarco`: passages of 105 tokens in the mean, 180 at the 95th percentile, cut at 512; queries of 33.
`longest`: all texts have 512. Tokens are real ones, without padding. P is a precision: bf16, fp8_tensorwise,
fp8_delayed, fp8_blockwise, fp8_attention (delayed, and attention in FP8 over padded buckets), or fp8 for the fastest
recipe.

  matmul_bf16_tflops, matmul_fp8_tflops
                         the fastest of some shapes: the denominator of MFU; ..._of_a_layer: the four linears' shapes
  P_lora_KIND_...        a step that trains adapters (rank 16, all projections) and head, on the fastest batch whose
                         graphs all fit, found by doubling. FLOPs are 4 a backbone weight and token, 6 a weight of
                         adapters and head, and attention; nothing that is computed twice
    tokens_per_second, seconds, seconds_PHASE, peak_bytes, queries, tokens, out_of_memory_at (queries)
    tflops, mfu, mfu_of_spec
                         over the measured products of the same type, and over the data sheet's (an H200: 989 in bf16)
  P_lora_cached_...      32 queries, embedded twice (`step.way: cached`), so the rate is that of three passes, not two
  P_forward_KIND_...     embedding alone, without adapters (as merged); 2 FLOPs a weight and token
  P_full_longest_...     a step that trains all weights (6 a weight and token). The optimizer's state of all layers
                         does not fit, so `measured_layers` and half as many are timed (P_full_N_layers_seconds), and
                         the line through both is read at all layers: a prediction
  P_head_share           the head's forward and backward alone, over the time of a step on the same tokens
  P_host_forward_ms_a_layer, P_host_backward_ms_a_layer
                         until the calls for a pack of one text return, without waiting for the GPU: the host's time
                         to queue a layer's work. pack_ms_a_layer: both directions of a full pack, waited for
  P_launch_bound_below_tokens
                         packs below it leave the GPU waiting for the host: what CUDA graphs could mend
  st_plain_...           sentence-transformers and PEFT, MultipleNegativesRankingLoss, columns padded, torch's
                         attention; same token ids, same adapters, and our head as one of its modules
  st_best_...            flat with FlashAttention where that is installed (st_best_setting), four batches dealt anew by
                         length; st_cached_...: CachedMultipleNegativesRankingLoss, mini-batches by tokens, 32 queries
  nemo_...               NeMo Automodel's bidirectional backbone and adapters
  P_over_PEER            our rate over the peer's, `msmarco`; ..._longest; P_over_st_cached: cached against cached
  attention_KIND_FORM_ms, ..._tflops
                         one layer forward and backward over a pack: torch_packed and torch_padded (attention alone),
                         te_packed in bf16 and te_padded_fp8 (with rotation, and the way into buckets and back)
  kernel_NAME_...        kernels/benchmark.py, whose --help says more: `ours`, `torch` and `compile`; NAME_over_torch:
                         how many times faster ours is. `info_nce`: the streaming loss, 16,384 queries and 131,072
                         passages of width 4,096; share_of_matmul: of matmul_bf16_tflops, by its three products
  profile_P_share_FAMILY share of a step's time on the GPU (--profile)
  section_NAME           done, failed and why, stopped at its limit, or skipped for want of time
  bar_KEY                met, NOT MET, or not measured
"""


@dataclass(frozen=True)
class Section:
    """A process of its own. `limit` seconds at most; `least`: with fewer left it is not begun."""

    name: str
    limit: float
    least: float = 30


SECTIONS = [
    Section("matmul", 45, 10),
    Section("lora_bf16", 120),
    Section("lora_fp8_tensorwise", 110),
    Section("st_plain", 100),
    Section("st_best", 120),
    Section("lora_fp8_delayed", 90),
    Section("loss", 75, 15),
    Section("attention", 45, 15),
    Section("full_bf16", 80),
    Section("lora_fp8_blockwise", 90),
    Section("kernels", 80, 15),
    Section("lora_fp8_attention", 90),
    Section("full_fp8_tensorwise", 80),
    Section("nemo", 90, 5),
]
"""In order of worth: what does not fit into the time is at the end."""
PROFILES = [Section("profile_bf16", 90), Section("profile_fp8_tensorwise", 90)]
PACKAGES = (
    *("torch", "triton", "megatron-core", "transformer-engine", "transformers"),
    *("sentence-transformers", "peft", "flash-attn", "nemo-automodel"),
)


def run(names: Sequence[str], size: str, use_cpu: bool, limit: float) -> dict[str, Any]:
    """Run sections in a process of their own; their figures, and `section_NAME` for each."""
    settings = json.dumps(dict(sections=list(names), size=size))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if use_cpu:
        env |= {"CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, str(Path(__file__).with_name("gpu_section.py")), settings],
            stdout=out,
            env=env,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
            ended = f"failed: its process ended with status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            ended = f"stopped at its limit of {limit:.0f} s; what was measured until then counts"
        out.seek(0)
        text = out.read()
    figures: dict[str, Any] = {}
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):  # the last one may be cut
            figures |= json.loads(line)
    return figures | {f"section_{name}": ended for name in names if f"section_{name}" not in figures}


def measure(sections: list[Section], size: str, use_cpu: bool, minutes: float) -> dict[str, Any]:
    """Figures of all sections that the time allows, each in a process of its own; tiny ones share one."""
    end = time.monotonic() + 60 * minutes
    jobs = [([section.name], section.limit, section.least) for section in sections]
    if size == "tiny":
        jobs = [([section.name for section in sections], 60 * minutes, 1.0)]
    figures: dict[str, Any] = {}
    for names, limit, least in jobs:
        left = end - time.monotonic()
        if left < least:
            why = f"skipped: {max(0.0, left):.0f} s of {minutes:g} minutes are left"
            figures |= {f"section_{name}": why for name in names}
            continue
        print(f"{', '.join(names)} ...", file=sys.stderr, flush=True)
        figures |= run(names, size, use_cpu, min(left, limit))
    return figures


def conditions() -> dict[str, Any]:
    """What a figure is worth nothing without."""
    found = {}
    for package in PACKAGES:
        try:
            found[f"version_{package}"] = version(package)
        except PackageNotFoundError:
            found[f"version_{package}"] = "not installed"
    query = [
        "nvidia-smi",
        "--query-gpu=name,memory.total,power.limit,clocks.max.sm,driver_version",
        "--format=csv,noheader",
    ]
    for name, command in (("commit", ["git", "describe", "--always", "--dirty"]), ("gpu", query)):
        try:
            found[name] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
        except (OSError, subprocess.CalledProcessError):
            found[name] = "unknown"
    return found | {"python": sys.version.split()[0], "date": time.strftime("%Y-%m-%d")}


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=FIGURES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all figures to PATH as one flat object")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="also profile two steps, behind all else; tables beside the JSON",
    )
    parser.add_argument("--minutes", type=float, default=8, help="for all sections together (default: 8)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="SECTION", help=f"of {', '.join(names)}")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and one process, to see that all of it runs")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(arguments)
    sections = [section for section in SECTIONS if not chosen.only or section.name in chosen.only]
    if chosen.profile:
        named = [section.name for section in sections]
        sections += [section for section in PROFILES if section.name.replace("profile", "lora") in named]
    begin = time.monotonic()
    figures = conditions() | measure(
        sections, "tiny" if chosen.tiny else "mistral", chosen.device == "cpu", chosen.minutes
    )
    figures |= derived(figures) | {"minutes": (time.monotonic() - begin) / 60}
    if not chosen.tiny:
        figures |= {f"bar_{bar.key}": bar.verdict(figures) for bar in BARS}
    print("\n".join(lines(figures, with_bars=not chosen.tiny)))
    tables = {key: figures.pop(key) for key in [key for key in figures if key.endswith("_table")]}
    for name, table in tables.items():
        print(f"\n{name}\n{table}")
        if chosen.json:
            chosen.json.with_suffix(f".{name}.txt").write_text(table + "\n", encoding="utf-8")
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
