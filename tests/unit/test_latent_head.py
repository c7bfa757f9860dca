"""The Triton kernels of the pooling heads against float64 and against their reference, by Triton's interpreter.

In float16 and float32: the interpreter cuts numbers off where bfloat16 would be rounded. As for the loss's kernel, a
child process interprets and another one compiles.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nvembed_mcore.kernels import reference_head
from tests.unit.test_kernels import EPSILON, in_child

DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of one function.

    Attributes:
        what: the function's name, the same in both modules.
        rows: tokens; of `segment_sum` and `pool` instead the tokens of each sequence.
        width: of what comes in.
        groups: of the softmax.
        scale: of what comes in.
        towards: added to the first column of each group.
    """

    what: str
    rows: int | tuple[int, ...]
    width: int
    groups: int = 1
    scale: float = 1.0
    towards: float = 0.0


CASES = {
    "softmax": Case(what="group_softmax", rows=5, width=96, groups=3),
    "softmax_odd": Case(what="group_softmax", rows=7, width=5 * 37, groups=5),
    "softmax_one_token": Case(what="group_softmax", rows=1, width=8 * 512, groups=8),
    "softmax_several_programs": Case(what="group_softmax", rows=9, width=2 * 1000, groups=2),
    "softmax_wider_than_a_program": Case(what="group_softmax", rows=2, width=2 * 5000, groups=2),
    "softmax_one_column": Case(what="group_softmax", rows=3, width=4, groups=4),
    "softmax_large_logits": Case(what="group_softmax", rows=5, width=96, groups=3, scale=3000.0),
    "softmax_one_dominates": Case(what="group_softmax", rows=6, width=2 * 64, groups=2, towards=13.0),
    "geglu": Case(what="geglu", rows=5, width=2 * 64),
    "geglu_odd": Case(what="geglu", rows=3, width=2 * 77, scale=4.0),
    "geglu_one_token": Case(what="geglu", rows=1, width=2),
    "geglu_several_blocks": Case(what="geglu", rows=2, width=2 * 5000),
    "geglu_large_gates": Case(what="geglu", rows=4, width=2 * 50, scale=60.0),
    "sum": Case(what="segment_sum", rows=(3, 1, 70, 32), width=256),
    "sum_odd": Case(what="segment_sum", rows=(5, 33, 2), width=131),
    "sum_of_one_token": Case(what="segment_sum", rows=(1,), width=8),
    "sum_of_absent_sequences": Case(what="segment_sum", rows=(0, 4, 0, 0, 9, 0), width=40),
    "pool": Case(what="pool", rows=(3, 1, 70, 32), width=256),
    "pool_odd": Case(what="pool", rows=(5, 33, 2), width=131, scale=100.0),
    "pool_of_one_token": Case(what="pool", rows=(1,), width=8),
}


def arguments_of(case: Case) -> tuple[Tensor, list]:
    """Float64 numbers that float16 and bfloat16 hold as they are, and what else the function takes."""
    generator = torch.Generator().manual_seed(0)
    lengths = case.rows if isinstance(case.rows, tuple) else (case.rows,)
    inputs = torch.randn(sum(lengths), case.width, generator=generator, dtype=torch.float64) * case.scale
    inputs[:, :: case.width // case.groups] += case.towards
    inputs = inputs.bfloat16().half().double()
    if case.what in ("segment_sum", "pool"):
        segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        return inputs, [torch.rand(len(segments), generator=generator), segments, len(lengths)]
    return inputs, [case.groups] if case.what == "group_softmax" else []


def exact(case: Case, inputs: Tensor, *others) -> Tensor:
    """The function in float64, as one would write it down."""
    if case.what == "group_softmax":
        return torch.cat([part.softmax(1) for part in inputs.chunk(case.groups, dim=1)], dim=1)
    if case.what == "geglu":
        value, gate = inputs.chunk(2, dim=1)
        return value * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    weights, segments, number = others
    member = segments[None] == torch.arange(number, device=segments.device)[:, None]
    sums = (member * weights.double()) @ inputs
    return sums / sums.norm(dim=1, keepdim=True) if case.what == "pool" else sums


def run(case: Case, function: Callable[..., Tensor], dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """Output and gradient, on the CPU."""
    inputs, others = arguments_of(case)
    inputs = inputs.to(device, dtype).requires_grad_()
    output = function(inputs, *(one.to(device) if isinstance(one, Tensor) else one for one in others))
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(output.shape, generator=generator).bfloat16().half().to(output)
    (gradient,) = torch.autograd.grad(output, inputs, upstream)
    return {"output": output.detach().cpu(), "gradient": gradient.cpu()}


def assert_as_exact(case: Case, found: dict[str, Tensor], dtype: torch.dtype) -> None:
    """At most twice the error of plain torch at the same dtype, and a last digit of float32, which all compute in."""
    truth = run(case, lambda *arguments: exact(case, *arguments), torch.float64)
    plain = run(case, getattr(reference_head, case.what), dtype)
    for what, values in truth.items():
        assert found[what].dtype == plain[what].dtype and found[what].shape == values.shape
        error, of_plain = ((other[what].double() - values).abs().max().item() for other in (found, plain))
        assert error <= 2 * of_plain + EPSILON * values.abs().max().item(), (what, error, of_plain)


def interpret_all(path: str) -> None:
    """Run by the child: the kernels' results of all cases, into a file."""
    from nvembed_mcore.kernels import latent_head

    torch.save(
        {
            f"{name} {dtype}": run(case, getattr(latent_head, case.what), DTYPES[dtype])
            for name, case in CASES.items()
            for dtype in DTYPES
        },
        path,
    )


def compile_all() -> None:
    """Run by the child: machine code of all kernels, with the sizes of NV-Embed's head."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nvembed_mcore.kernels import latent_head

    tile = dict(ROWS=latent_head.ROWS, COLUMNS=latent_head.COLUMNS)
    softmax = dict(SIZE=512, GROUPS=latent_head.AT_ONCE // 512, BLOCK=512)
    kernels = {
        latent_head._group_softmax: softmax,
        latent_head._group_softmax_backward: softmax,
        latent_head._geglu: dict(BLOCK=latent_head.AT_ONCE),
        latent_head._geglu_backward: dict(BLOCK=latent_head.AT_ONCE),
        latent_head._segment_sum: tile,
        latent_head._spread: tile,
        latent_head._unit: dict(BLOCK=4096),
        latent_head._unit_backward: dict(BLOCK=4096),
    }
    types = dict(num_groups="i32", width="i32", hidden="i32", bounds="*i64", weights="*fp32")
    sums = dict(vectors="*fp32", units="*fp32", norms="*fp32")
    for kernel, constants in kernels.items():
        of_sums = kernel in (latent_head._unit, latent_head._unit_backward)
        others = types | sums | (dict(result="*fp32", upstream="*fp32") if of_sums else {})
        if kernel in (latent_head._segment_sum, latent_head._spread):
            others |= dict(result="*fp32") if kernel is latent_head._segment_sum else dict(upstream="*fp32")
        signature = {
            name: "constexpr" if name in constants else others.get(name, "*bf16") for name in kernel.arg_names
        }
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, constexprs=places)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        assert len(compiled.asm["cubin"]) > 0


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, dict[str, Tensor]]:
    """The kernels' results of each case and dtype."""
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("kernels") / "results.pt"
    child = in_child("interpret_all", str(path), module="test_latent_head", TRITON_INTERPRET="1")
    assert child.returncode == 0, child.stderr
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_as_exact_as_their_reference(name, dtype, interpreted):
    assert_as_exact(CASES[name], interpreted[f"{name} {dtype}"], DTYPES[dtype])


def test_where_one_column_dominates_its_gradient_is_small_but_right(interpreted):
    """Weights rounded before the backward pass would leave nothing of it."""
    case = CASES["softmax_one_dominates"]
    truth = run(case, lambda *arguments: exact(case, *arguments), torch.float64)
    first = (slice(None), slice(0, None, case.width // case.groups))
    assert truth["output"][first].min() > 0.99
    found = interpreted["softmax_one_dominates float16"]["gradient"][first].double()
    torch.testing.assert_close(found, truth["gradient"][first], rtol=2e-3, atol=2e-7)


def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    backends = pytest.importorskip("triton.backends").backends
    if "nvidia" not in backends:
        pytest.skip("this Triton has no NVIDIA compiler")
    child = in_child("compile_all", module="test_latent_head", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert child.returncode == 0, child.stderr


def test_the_benchmark_runs_plain_torch_on_a_cpu(tmp_path, monkeypatch, capsys):
    from nvembed_mcore.kernels import benchmark

    written = tmp_path / "figures.json"
    words = ["benchmark", "--device", "cpu", "--tiny", "--repeats", "1", "--json", str(written)]
    monkeypatch.setattr("sys.argv", words)
    benchmark.main()
    figures = json.loads(written.read_text(encoding="utf-8"))
    assert "No kernel runs on a CPU" in capsys.readouterr().out
    names = ("group_softmax", "geglu", "segment_sum", "pool", "fold_product", "info_nce")
    assert all(figures[f"{name}_torch_ms"] > 0 for name in names)
    assert not [key for key in figures if "_ours_" in key or "_compile_" in key]
    monkeypatch.setattr("sys.argv", ["benchmark", "--device", "cpu"])
    with pytest.raises(SystemExit):
        benchmark.main()


def test_streaming_and_naive_infonce_of_the_benchmark_are_the_same():
    """Otherwise one would be timed for another's work."""
    from nvembed_mcore.kernels import benchmark

    batch = benchmark.InfoNce(benchmark.TINY, torch.device("cpu"))
    inputs = (batch.anchors.double(), batch.candidates.double())
    for one, other in zip(batch.streaming(*inputs), batch.naive(*inputs), strict=True):
        torch.testing.assert_close(one, other.double(), rtol=1e-6, atol=1e-9)


def test_the_reference_is_what_the_heads_always_computed():
    """To the last digit: the golden run must not move because its functions did."""
    states = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    plain = states.unflatten(-1, (3, -1)).float().softmax(dim=-1).to(states.dtype).flatten(-2)
    assert torch.equal(reference_head.group_softmax(states, 3), plain)
    value, gate = states.chunk(2, dim=-1)
    assert torch.equal(reference_head.geglu(states), value * F.gelu(gate))
    weights, segments = torch.rand(6), torch.tensor([0, 0, 0, 1, 1, 1])
    sums = torch.zeros(2, 24).index_add(0, segments, states * weights[:, None])
    assert torch.equal(reference_head.segment_sum(states, weights, segments, 2), sums)
    assert torch.equal(reference_head.pool(states, weights, segments, 2), F.normalize(sums, dim=-1))
