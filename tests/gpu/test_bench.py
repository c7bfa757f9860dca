"""The GPU benchmark on a GPU with a tiny model: before minutes are spent on the large one."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BENCH = Path(__file__).parents[2] / "tools" / "bench"
OURS = ("matmul", "lora_bf16", "loss", "attention", "full_bf16", "kernels", "profile_bf16")
IN_FP8 = ("lora_fp8_tensorwise", "lora_fp8_delayed")
PEERS = ("st_plain", "st_best") if find_spec("sentence_transformers") and find_spec("peft") else ()


def test_a_tiny_model_takes_the_whole_path(tmp_path):
    path, sections = tmp_path / "figures.json", (*OURS, *IN_FP8, *PEERS)
    chosen = [section for section in sections if not section.startswith("profile")]
    command = [sys.executable, BENCH / "gpu.py", "--tiny", "--profile", "--json", path, "--only", *chosen]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures = json.loads(path.read_text())
    failed = {name: figures[f"section_{name}"] for name in sections if "done" not in figures[f"section_{name}"]}
    assert not failed, f"{failed}\n{done.stderr}"
    assert figures["kernel_info_nce_ours_extra_bytes"] > 0
    assert figures["bf16_lora_msmarco_peak_bytes"] > 0 and figures["bf16_lora_msmarco_tokens_per_second"] > 0
    named = sum(figures[f"profile_bf16_share_{name}"] for name in ("pooling_head", "LoRA_products", "attention"))
    assert named > 0.05  # kernels are found, and backward ones belong where their forward ones do
