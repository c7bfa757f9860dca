"""The kernels of the pooling heads and of InfoNCE on a GPU, at the shapes of NV-Embed's head on Mistral-7B."""

from __future__ import annotations

import pytest
import torch

from nvembed_mcore.config import PoolingConfig
from nvembed_mcore.kernels import benchmark, reference_head
from nvembed_mcore.model import pooling
from nvembed_mcore.model.pooling import build_head
from tests.unit import test_latent_head as unit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
HIDDEN, HEADS, LATENTS = 4096, 8, 512
EPSILON = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", unit.CASES)
def test_kernels_are_as_exact_as_their_reference(name, dtype):
    from nvembed_mcore.kernels import latent_head

    case = unit.CASES[name]
    found = unit.run(case, getattr(latent_head, case.what), DTYPES[dtype], "cuda")
    unit.assert_as_exact(case, found, DTYPES[dtype])


def true_inputs(what: str, tokens: int) -> tuple[torch.Tensor, tuple]:
    """Of NV-Embed's head; sequences of 1 to 512 tokens, one after the other."""
    torch.manual_seed(0)
    width = {"group_softmax": HEADS * LATENTS, "geglu": 8 * HIDDEN}.get(what, HIDDEN)
    inputs = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    if what == "group_softmax":
        return inputs * 4, (HEADS,)
    if what == "geglu":
        return inputs, ()
    lengths = torch.randint(1, 513, (tokens,))
    segments = torch.repeat_interleave(torch.arange(tokens), lengths)[:tokens].cuda()
    number = int(segments[-1]) + 1
    return inputs, (1.0 / segments.bincount(minlength=number)[segments], segments, number)


@pytest.mark.parametrize("tokens", [1, 777, 16_384])
@pytest.mark.parametrize("what", ["group_softmax", "geglu", "segment_sum", "pool"])
def test_at_true_shapes(what, tokens):
    from nvembed_mcore.kernels import latent_head

    inputs, others = true_inputs(what, tokens)

    def results(module, values: torch.Tensor) -> list[torch.Tensor]:
        return benchmark.with_gradients(lambda one: getattr(module, what)(one, *others), [values])

    truth = results(reference_head, inputs.float())
    found, plain = results(latent_head, inputs), results(reference_head, inputs)
    for ours, torchs, exact in zip(found, plain, truth, strict=True):
        assert ours.dtype == torchs.dtype
        error, of_plain = (float((one.float() - exact).abs().max()) for one in (ours, torchs))
        assert error <= 2 * of_plain + 4 * EPSILON * float(exact.abs().max())
    del truth, found, plain
    beyond = benchmark.extra_bytes(lambda: results(latent_head, inputs))
    # The gradient of the output that the test itself hands in, and of `pool` a few vectors a text.
    upstream = inputs[:1, : {"geglu": 4 * HIDDEN}.get(what, inputs.size(1))].nbytes
    of_texts = 3 * 4 * HIDDEN * (others[-1] if what in ("segment_sum", "pool") else 0)
    assert beyond <= upstream + of_texts + (1 << 20)


def test_places_beyond_two_to_the_31():
    """70,000 tokens of the feed-forward's projection are 2.3e9 numbers."""
    from nvembed_mcore.kernels import latent_head

    projected = torch.zeros(70_000, 8 * HIDDEN, device="cuda", dtype=torch.bfloat16)
    projected[-3:] = torch.randn(3, 8 * HIDDEN, device="cuda", dtype=torch.bfloat16)
    output, gradient = benchmark.with_gradients(latent_head.geglu, [projected])
    expected, of_last = benchmark.with_gradients(reference_head.geglu, [projected[-3:]])
    torch.testing.assert_close(output[-3:], expected, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(gradient[-3:], of_last, rtol=2e-2, atol=1e-2)
    assert not output[:-3].any() and not gradient[:-3, 4 * HIDDEN :].any()


def test_pooling_adds_in_the_same_order_each_time():
    inputs, others = true_inputs("pool", 16_384)
    first = pooling.pool(inputs, *others)
    assert all(torch.equal(pooling.pool(inputs, *others), first) for _ in range(5))


def test_the_whole_head_is_as_exact_as_without_kernels(monkeypatch):
    """Output, input and all weights in bfloat16, with the fold in TF32, against float32 of the same numbers."""
    config = PoolingConfig(kind="latent", num_latents=128, num_heads=4)
    torch.manual_seed(0)
    states = torch.randn(1000, 1024, device="cuda", dtype=torch.bfloat16)
    weights = {name: value for name, value in build_head(1024, config, 1).cuda().bfloat16().named_parameters()}
    for value in weights.values():
        value.data.copy_(torch.randn(value.shape) * (1.0 if value.dim() == 1 else value.size(-1) ** -0.5))

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        head = build_head(1024, config, 1).cuda().to(dtype)
        head.load_state_dict(weights)
        names, values = zip(*head.named_parameters(), strict=True)

        def forward(inputs: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(head, dict(zip(names, parameters, strict=True)), (inputs, None))

        return benchmark.with_gradients(forward, [states.to(dtype), *values])

    truth, found = results(torch.float32), results(torch.bfloat16)
    monkeypatch.setattr(pooling, "kernels_for", lambda states: reference_head)
    plain = results(torch.bfloat16)
    for ours, torchs, exact in zip(found, plain, truth, strict=True):
        error, of_plain = (float((one.float() - exact).norm()) for one in (ours, torchs))
        assert error <= 2 * of_plain
    assert torch.get_float32_matmul_precision() == "highest"


def test_infonce_in_bfloat16_is_exact_and_small():
    """Against the whole matrix in bfloat16; and at the size of the bar, memory beyond inputs and gradients."""
    errors = benchmark.errors(benchmark.SMALL, torch.device("cuda"))
    assert max(errors.values()) <= 2, errors
    sizes = benchmark.Sizes()
    batch = benchmark.InfoNce(sizes, torch.device("cuda"))
    beyond = benchmark.extra_bytes(lambda: batch.streaming(batch.anchors, batch.candidates))
    assert beyond < 1_000_000_000
