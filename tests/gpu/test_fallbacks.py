"""Optimizers and norms on a GPU: TransformerEngine's, Apex's and torch's give the same, and go on from one another."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from nvembed_mcore import apex_kernels, optim
from nvembed_mcore.model.backend import why_no_transformer_engine
from tests.helpers import adam
from tests.helpers.cases import Case, training_steps

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MISSING = {
    "TransformerEngine": why_no_transformer_engine,
    "Apex": apex_kernels.why_no_fused_adam,
    "torch": lambda: "",
}


@pytest.fixture
def named(request):
    why_not = MISSING[request.param]()
    if why_not:
        pytest.skip(f"{request.param}: {why_not}")
    return request.param


@pytest.mark.parametrize("named", MISSING, indirect=True)
@pytest.mark.parametrize("distributed", [False, True])
def test_each_optimizer_steps_as_one_process_on_the_cpu(named, distributed):
    from nvembed_mcore.parallel.groups import shutdown

    with mock.patch.object(optim, "choose_adam", lambda: (named, "")):
        found = training_steps(Case(way="single", distributed=distributed))
    shutdown()
    assert found["parameters"] <= 1e-4, found


@pytest.mark.parametrize("named", ["TransformerEngine", "Apex"], indirect=True)
def test_a_run_goes_on_with_another_optimizer(named, tmp_path):
    from nvembed_mcore.parallel.groups import shutdown

    ways = [[named, named, "torch"], ["torch", named, named]]
    differences = adam.changing_optimizers(Case(way="single"), ways, tmp_path)
    shutdown()
    assert max(differences) <= 1e-5, differences


def test_the_norm_of_apex_is_that_of_torch():
    """At most twice torch's error in bfloat16, forward and backward; in float32 the same within rounding."""
    why_not = apex_kernels.why_no_fused_norm()
    if why_not:
        pytest.skip(f"Apex: {why_not}")
    torch.manual_seed(0)
    plain = [torch.randn(257, 1, 512, device="cuda"), torch.rand(512, device="cuda") + 0.5]
    upstream = torch.randn(257, 1, 512, device="cuda")

    def run(norm, dtype):
        states, weight = (tensor.to(dtype).requires_grad_() for tensor in plain)
        out = norm(states, weight)
        return [out, *torch.autograd.grad(out, [states, weight], upstream.to(dtype))]

    def of_torch(states, weight):
        return F.rms_norm(states, (512,), weight, 1e-5)

    def of_apex(states, weight):
        return apex_kernels.fused_rms_norm()(states, weight, (512,), 1e-5)

    truth = run(of_torch, torch.float64)
    for dtype, room in ((torch.float32, 1e-6), (torch.bfloat16, 1e-3)):
        for exact, ours, others in zip(truth, run(of_apex, dtype), run(of_torch, dtype), strict=True):
            error, of_other = ((found.double() - exact).abs().max() for found in (ours, others))
            assert error <= 2 * of_other + room * exact.abs().max()
