"""Adapters on TransformerEngine's linears, and a step with adapters on a GPU against the CPU's reference."""

from __future__ import annotations

import pytest
import torch

from nvembed_mcore.config import LoraConfig, ParallelConfig
from nvembed_mcore.model.backend import Backend
from nvembed_mcore.model.linears import adapted_linears
from nvembed_mcore.model.lora import Adapter, add_to_output
from nvembed_mcore.model.mistral import transformer_config
from tests.helpers import cases, models
from tests.helpers.grid import ALL_TARGETS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOKENS = 48


@pytest.mark.parametrize("number", range(4), ids=["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"])
def test_adapters_on_transformer_engine_linears(number):
    """In bfloat16, on one GPU: output and gradients against the adapter in float32, which the proof grid covers."""
    pytest.importorskip("transformer_engine.pytorch")
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    from nvembed_mcore.parallel.groups import initialize, shutdown

    initialize(ParallelConfig())
    hf_config = models.tiny_config(hidden_size=128, head_dim=16, intermediate_size=256)
    lora = LoraConfig(rank=8, dropout=0.0)
    half, whole = (
        transformer_config(hf_config, Backend(layers="transformer_engine", dtype=dtype), ParallelConfig())
        for dtype in (torch.bfloat16, torch.float32)
    )
    linear = adapted_linears(128, 256, 8, 2, 16)[number]
    kind, how = (
        (TERowParallelLinear, {"input_is_parallel": True})
        if linear.is_row_parallel
        else (TEColumnParallelLinear, {"gather_output": False})
    )
    rows = sum(linear.rows.values())
    settings = dict(config=half, init_method=torch.nn.init.zeros_, bias=False, skip_bias_add=False, is_expert=False)
    base = kind(linear.inputs, rows, **how, **settings).cuda().requires_grad_(False)
    adapter, exact = Adapter(linear, lora, half), Adapter(linear, lora, whole)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in [base.weight, *adapter.parameters()]:
            parameter.normal_(0.0, 0.1)
    exact.load_state_dict(adapter.state_dict())
    add_to_output(base, adapter)
    states = torch.randn(TOKENS, 1, linear.inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(TOKENS, 1, rows, device="cuda")
    output, _ = base(states)
    (output.float() * upstream).sum().backward()
    leaf = states.detach().float().requires_grad_()
    expected = exact(leaf, leaf @ base.weight.float().T)
    (expected * upstream).sum().backward()
    pairs = {"output": (output, expected), "states": (states.grad, leaf.grad)}
    pairs |= {name: (p.grad, exact.get_parameter(name).grad) for name, p in adapter.named_parameters()}
    shutdown()
    for name, (found, truth) in pairs.items():
        assert (found.float() - truth).abs().max() < 2e-2 * truth.abs().max(), name


@pytest.mark.parametrize("kind", ["latent", "mean"])
def test_a_step_with_adapters_equals_one_process(kind):
    """The proof grid's case, on the GPU in float32 against float64 on the CPU."""
    from nvembed_mcore.parallel.groups import shutdown

    found = cases.training_steps(cases.Case(targets=ALL_TARGETS, kind=kind, distributed=False))
    shutdown()
    assert max(found[name] for name in ("loss", "norm", "gradient", "parameters")) < 1e-4
