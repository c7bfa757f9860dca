"""`nvembed doctor` on a GPU: what it names is what a run takes."""

from __future__ import annotations

import pytest
import torch

from nvembed_mcore.config import ModelConfig, PrecisionConfig
from nvembed_mcore.doctor import examine
from nvembed_mcore.model.backend import choose, why_no_transformer_engine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_of_this_machine():
    found = examine()
    assert found.refusal == "" and found.found["GPUs"].startswith(f"{torch.cuda.device_count()} x ")
    assert found.found["cuDNN"] != "none" and found.found["NCCL"] != "none" and found.found["driver"] != "none"
    paths = {one.part: one for one in found.paths}
    is_te = choose(ModelConfig(config=""), PrecisionConfig()).layers == "transformer_engine"
    assert (paths["layers"].choice == "TransformerEngine") == is_te == (why_no_transformer_engine() == "")
    assert paths["weights"].choice == "bfloat16" and paths["exchange"].choice == "cpu:gloo,cuda:nccl"
    assert paths["loss"].choice == "Triton kernel" and paths["pooling head"].choice.startswith("Triton")
    assert paths["optimizer"].choice != ""
    if is_te and torch.cuda.get_device_capability() >= (9, 0):
        assert paths["FP8 tensorwise"].choice == "supported"
