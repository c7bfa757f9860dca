"""The CUDA paths: variable-length attention in bfloat16, and the encoder against its own float32 on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nvembed_mcore.model.attention import packed_attention, packing_of

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
    from nvembed_mcore.config import ModelConfig, ParallelConfig, PoolingConfig
    from nvembed_mcore.model.encoder import Encoder, wrap_data_parallel
    from nvembed_mcore.parallel.groups import initialize, shutdown
    from nvembed_mcore.schedule import embed_texts
    from tests.helpers import models

    config = models.tiny_config(hidden_size=128, head_dim=16, initializer_range=0.05)
    reference = models.hf_reference(config)
    groups = initialize(ParallelConfig())
    pooling = PoolingConfig(kind="mean")
    model = ModelConfig(config="unused", precision=precision, pooling=pooling)
    encoder = Encoder(config, model, ParallelConfig(), groups)
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
