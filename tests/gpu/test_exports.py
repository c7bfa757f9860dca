"""Exports on a GPU: flash attention, and the other ways of attending, against the plain computation on the CPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from nvembed_mcore.data.tokenizer import write_mistral_tokenizer
from tests.helpers.exports import INSTRUCTION, LIMIT, PROMPT, TEXTS, Case, auto_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

needs_flash = pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs the flash_attn package")


@pytest.mark.parametrize("implementation", ["sdpa", "eager", pytest.param("flash_attention_2", marks=needs_flash)])
@pytest.mark.parametrize(
    ("kind", "causal"), [("latent", False), ("multi_layer", False), ("mean", False), ("last", True)]
)
def test_half_precision_is_near_the_cpu_in_float32(tmp_path, monkeypatch, kind, causal, implementation):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    write_mistral_tokenizer(tmp_path / "tokenizer")
    case = Case(kind, tmp_path / "tokenizer", tmp_path, causal=causal)
    model = auto_model(case.folder, dtype=torch.float16, attn_implementation=implementation).to("cuda")
    for prompt, instruction in (("", ""), (PROMPT, INSTRUCTION)):
        found = model.encode(TEXTS, instruction=prompt, max_length=LIMIT, batch_size=3)
        assert found.is_cuda and found.dtype == torch.float32
        assert torch.cosine_similarity(found.cpu(), case.expected(TEXTS, instruction)).min() >= 0.999
