"""What computes where TransformerEngine is not: Apex if it is installed, by a stand-in here, and torch otherwise.

tests/gpu/test_fallbacks.py has the real ones.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nvembed_mcore import apex_kernels, optim
from nvembed_mcore.loss import why_no_kernel
from nvembed_mcore.model import mistral
from nvembed_mcore.model.attention import why_padded
from nvembed_mcore.model.pooling import why_no_kernels
from tests.helpers import adam
from tests.helpers.cases import Case


def test_a_run_goes_on_with_another_optimizer(world, tmp_path):
    """Apex's counts steps from the first one on, and not in groups of which a rank has no parameter."""
    ways = [["Apex", "Apex", "torch"], ["torch", "Apex", "Apex"]]
    case = Case(world=2, way="single", overlap=True)
    for differences in world(2).run(adam.changing_optimizers, case, ways, tmp_path):
        assert max(differences) < 1e-5, differences


@pytest.mark.parametrize(
    ("has_cuda", "no_te", "no_apex", "expected"),
    [
        (False, "", "", ("torch", "there is no CUDA device")),
        (True, "", "x", ("TransformerEngine", "it can be imported")),
        (True, "it is broken", "", ("Apex", "TransformerEngine: it is broken")),
        (True, "it is broken", "it is old", ("torch", "TransformerEngine: it is broken; Apex: it is old")),
    ],
)
def test_whose_optimizer(monkeypatch, has_cuda, no_te, no_apex, expected):
    monkeypatch.setattr(optim.device, "has_cuda", lambda: has_cuda)
    monkeypatch.setattr(optim, "why_no_transformer_engine", lambda: no_te)
    monkeypatch.setattr(optim, "why_no_fused_adam", lambda: no_apex)
    assert optim.choose_adam() == expected


@pytest.fixture
def modules(monkeypatch):
    """Puts modules where imports find them, on a machine that seems to have a GPU."""
    everything = (
        apex_kernels.fused_adam,
        apex_kernels.fused_rms_norm,
        apex_kernels.why_no_fused_adam,
        apex_kernels.why_no_fused_norm,
    )

    def install(**contents: dict) -> None:
        for name, content in contents.items():
            module = ModuleType(name.replace("__", "."))
            module.__path__ = []
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, module.__name__, module)

    monkeypatch.setattr(apex_kernels.device, "has_cuda", lambda: True)
    for one in everything:
        one.cache_clear()
    yield install
    for one in everything:
        one.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="Apex may be installed there")
def test_apex_is_known_by_its_kernels(modules):
    assert apex_kernels.why_no_fused_adam() == "it cannot be imported: No module named 'amp_C'"
    apex_kernels.why_no_fused_adam.cache_clear()
    modules(apex={})  # that of the index; or the real one, installed without kernels
    assert apex_kernels.why_no_fused_adam() == "it cannot be imported: No module named 'amp_C'"
    apex_kernels.why_no_fused_adam.cache_clear()
    modules(amp_C={}, apex__optimizers={"FusedAdam": adam.StandIn})
    assert apex_kernels.why_no_fused_adam() == "" and apex_kernels.fused_adam() is adam.StandIn
    assert apex_kernels.why_no_fused_norm() == "it cannot be imported: No module named 'fused_layer_norm_cuda'"


@pytest.mark.skipif(torch.cuda.is_available(), reason="Apex may be installed there")
def test_norms_take_the_kernel_of_apex(modules):
    """Parameter, mark for sequence parallelism and gradient are those of torch's norm."""
    calls = []

    def fused_rms_norm_affine(states, weight, shape, eps):
        calls.append(shape)
        return states * (states.square().mean(-1, keepdim=True) + eps).rsqrt() * weight

    modules(
        apex={},
        fused_layer_norm_cuda={},
        apex__normalization={},
        apex__normalization__fused_layer_norm={"fused_rms_norm_affine": fused_rms_norm_affine},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mistral.device, "current", lambda: torch.device("cpu"))
        norm = mistral.RMSNorm(SimpleNamespace(params_dtype=torch.float32, sequence_parallel=True), 8, eps=1e-3)
    assert [name for name, _ in norm.named_parameters()] == ["weight"] and norm.weight.sequence_parallel
    states = torch.randn(3, 8, requires_grad=True)
    found = torch.autograd.grad(norm(states).square().sum(), [states, norm.weight])
    plain = F.rms_norm(states, (8,), norm.weight, 1e-3)
    expected = torch.autograd.grad(plain.square().sum(), [states, norm.weight])
    assert calls == [(8,)]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (why_no_kernel("cpu", torch.float32), "CUDA device"),
        (why_no_kernel("cuda", torch.float64), "not torch.float64"),
        (why_no_kernels("cpu", torch.bfloat16), "CUDA device"),
        (why_no_kernels("cuda", torch.float32), "the weights are torch.float32"),
        (why_padded("cpu", torch.bfloat16, 64, 0.0), "CUDA device"),
        (why_padded("cuda", torch.float32, 64, 0.0), "not torch.float32"),
        (why_padded("cuda", torch.bfloat16, 12, 0.0), "not 12"),
        (why_padded("cuda", torch.float16, 64, 0.1), "drops"),
        (why_padded("cuda", torch.bfloat16, 64, 0.0, causal_parts=True), "two chunks"),
    ],
)
def test_why_a_slower_way_is_taken(reason, words):
    assert words in reason


def test_where_the_fast_ones_are_taken():
    assert why_padded("cuda", torch.bfloat16, 128, 0.0) == ""
    pytest.importorskip("triton")
    assert why_no_kernel("cuda", torch.float32) == why_no_kernels("cuda", torch.bfloat16) == ""
