"""The CUDA paths: variable-length attention in bfloat16, the kernel of the loss, encoder and step against the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nvembed_mcore.kernels import reference
from nvembed_mcore.loss import make_targets, score_rows
from nvembed_mcore.model.attention import packed_attention, packing_of
from tests.helpers import cases, models
from tests.helpers.grid import OPTIONS
from tests.unit import test_kernels, test_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS = np.array([7, 130, 1, 64, 33])


def plain_attention(query, key, value, causal):
    """One float32 call a sequence."""
    groups, parts, start = query.size(1) // key.size(1), [], 0
    for length in LENGTHS.tolist():
        q, k, v = (x[start : start + length].float().transpose(0, 1) for x in (query, key, value))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        parts.append(F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=causal)[0].transpose(0, 1))
        start += length
    return torch.cat(parts)


@pytest.mark.parametrize("causal", [False, True])
def test_variable_length_attention_forward_and_backward(causal):
    torch.manual_seed(0)
    tokens = int(LENGTHS.sum())
    states = [torch.randn(tokens, heads, 64, device="cuda") for heads in (8, 2, 2)]
    upstream = torch.randn(tokens, 8, 64, device="cuda")
    results = []
    for dtype, attend in (
        (torch.float32, lambda q, k, v: plain_attention(q, k, v, causal)),
        (torch.bfloat16, lambda q, k, v: packed_attention(q, k, v, packing_of(LENGTHS, q.device), causal=causal)),
        (torch.bfloat16, lambda q, k, v: plain_attention(q, k, v, causal).to(q.dtype)),
    ):
        inputs = [x.to(dtype).requires_grad_() for x in states]
        out = attend(*inputs)
        grads = torch.autograd.grad((out.float() * upstream).sum(), inputs)
        results.append([out.float(), *(grad.float() for grad in grads)])
    for exact, ours, plain in zip(*results, strict=True):
        # At most twice the error of plain attention on the same bfloat16 inputs, with room for its rounded output.
        assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_encoder_equals_hugging_face_on_the_cpu(precision):
    """Unit vectors of the trainer on the GPU against Hugging Face in float32 on the CPU."""
    from nvembed_mcore.checkpoint.names import local_shard, name_table
    from nvembed_mcore.config import ModelConfig, ParallelConfig, PoolingConfig, PrecisionConfig
    from nvembed_mcore.model.encoder import Encoder, wrap_data_parallel
    from nvembed_mcore.parallel.groups import initialize, shutdown
    from nvembed_mcore.schedule import embed_texts

    config = models.tiny_config(hidden_size=128, head_dim=16, initializer_range=0.05)
    reference = models.hf_reference(config)
    groups = initialize(ParallelConfig())
    pooling = PoolingConfig(kind="mean")
    model = ModelConfig(config="unused", pooling=pooling, backend="local")
    encoder = Encoder(config, model, ParallelConfig(), groups, precision=PrecisionConfig(dtype=precision))
    source = {f"embedding_model.{name}": value for name, value in reference.state_dict().items()}
    parameters = encoder.parameters_by_global_name()
    with torch.no_grad():
        for entry in name_table(config, pooling):
            parameters[entry.name].copy_(local_shard(entry, source.__getitem__, 0, 1))
    texts = models.random_texts(LENGTHS.tolist(), config.vocab_size)
    chunks = wrap_data_parallel([encoder], ParallelConfig(), distributed_optimizer=False)
    ours = embed_texts(chunks, groups, texts, 128).float().cpu()
    expected = torch.stack([models.reference_embedding(reference, {}, text, "mean", 1) for text in texts])
    shutdown()
    assert (ours * expected).sum(1).min() >= (0.99999 if precision == "float32" else 0.995)


def kernel_on_cuda(block, rows, columns, masks, known, *, gradient):
    """The kernel on the GPU, for tensors of the CPU."""
    from nvembed_mcore.kernels.info_nce import softmax_gradient_
    from nvembed_mcore.kernels.reference import Softmax

    scores = block.cuda().contiguous()
    known = known and Softmax(known.log_sum.cuda(), known.of_positive.cuda())
    on_cuda = scores if gradient is None else torch.empty_like(scores, dtype=gradient.dtype)
    where = (rows.to(scores.device), columns.to(scores.device))
    found, best = softmax_gradient_(scores, *where, masks, known, gradient=on_cuda)
    (block if gradient is None else gradient).copy_(on_cuda)
    return Softmax(found.log_sum.cpu(), found.of_positive.cpu()), None if best is None else best.cpu()


@pytest.mark.parametrize("name", test_kernels.CASES)
def test_loss_kernel_is_as_exact_as_its_reference(name):
    case = test_kernels.CASES[name]
    truth = test_kernels.run(case, reference.softmax_gradient_, torch.float64)
    plain = test_kernels.run(case, reference.softmax_gradient_, torch.float32)
    found = test_kernels.run(case, kernel_on_cuda, torch.float32)
    for what, values in truth.items():
        if values.numel():
            error, of_plain = ((other[what] - values).abs().max().item() for other in (found, plain))
            assert error <= 2 * of_plain + test_kernels.EPSILON * max(1.0, values.abs().max().item()), what


@pytest.mark.parametrize("masks", test_loss.MASKS.values(), ids=test_loss.MASKS)
def test_loss_and_gradients_equal_a_double_loop(masks):
    anchors, candidates, targets = test_loss.random_case(8)
    expected = test_loss.double_loop(anchors, candidates, targets, masks, 20.0)
    rows, columns = make_targets(**targets, masks=masks)
    on_cuda = [thing.to("cuda") for thing in (anchors.float(), candidates.float(), rows, columns)]
    found = score_rows(*on_cuda, masks, 20.0, with_columns=True)
    for name, truth in expected.items():
        torch.testing.assert_close(
            getattr(found, name).double().cpu(), truth.double(), rtol=1e-4, atol=1e-5 * float(truth.abs().max())
        )


@pytest.mark.parametrize(("way", "budget"), [("single", 100_000), ("retain", 200), ("cached", 200)])
@pytest.mark.parametrize(
    ("option", "exchange"),
    [("learned temperature", "recompute"), ("learned temperature", "reduce_scatter"), ("everything", "auto")],
)
def test_step_equals_one_process_on_the_cpu(way, budget, option, exchange):
    """Two steps in float32: loss, clip norm, gradients, parameters."""
    from nvembed_mcore.parallel.groups import shutdown

    case = cases.Case(way=way, budget=budget, distributed=False, exchange=exchange, loss=OPTIONS[option])
    found = cases.training_steps(case)
    shutdown()
    assert max(found[name] for name in ("loss", "norm", "gradient", "parameters")) <= 1e-4, found


def test_what_a_graph_keeps_is_what_lies_in_memory():
    """`step.way: auto` trusts this figure."""
    from nvembed_mcore import device
    from nvembed_mcore.data.packing import make_pack
    from nvembed_mcore.memory import graph_bytes
    from nvembed_mcore.parallel.groups import shutdown

    step, *_ = cases.build_step(cases.Case())
    (chunk,) = step.chunks
    pack = make_pack(models.random_texts([60] * 200, 250))
    chunk(pack)  # allocates what stays: workspaces, buffers
    measured = graph_bytes(lambda: chunk(pack), list(chunk.module.parameters()))
    before = torch.cuda.memory_allocated()
    output = chunk(pack)
    kept = torch.cuda.memory_allocated() - before
    free = device.free_memory_bytes()
    shutdown()
    assert output.requires_grad and measured == pytest.approx(kept, rel=0.1)
    assert 0 < free <= torch.cuda.get_device_properties(0).total_memory
