"""FLOPs by formula against FLOPs counted on the real modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig, MistralModel

from nvembed_mcore.checkpoint.names import name_table
from nvembed_mcore.config import LoraConfig, PoolingConfig
from nvembed_mcore.model.pooling import build_head
from nvembed_mcore.scaling.architecture import Architecture
from nvembed_mcore.scaling.flops import pack_flops
from tests.helpers.plain import add_adapters

TINY = MistralConfig(
    vocab_size=32,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    attn_implementation="eager",
)
MEAN = PoolingConfig(kind="mean")


def counted(forward) -> int:
    """FLOPs of forward and backward as torch counts the matrix products that run."""
    with FlopCounterMode(display=False) as counter:
        forward().sum().backward()
    return counter.get_total_flops()


def test_backbone_flops_are_those_that_run():
    model = MistralModel(TINY)
    lengths = [7, 13]
    texts = [torch.randint(0, 32, (1, length)) for length in lengths]
    flops = sum(counted(lambda text=text: model(text, use_cache=False).last_hidden_state) for text in texts)
    assert pack_flops(TINY, MEAN, lengths) == flops


def test_flops_with_adapters_are_those_that_run():
    """Weights of linears have no gradient then; the adapters' have."""
    lora = LoraConfig(rank=3, targets=["q", "v", "o", "up", "down"])
    model, adapters = MistralModel(TINY).requires_grad_(False), {}
    for entry in name_table(TINY, MEAN, lora):
        if entry.is_adapter:
            adapters |= {name: torch.randn(shape, requires_grad=True) for name, shape in entry.hf.items()}
    add_adapters(model, adapters, lora.scale)
    states = torch.randn(1, 9, 24, requires_grad=True)
    flops = counted(lambda: model(inputs_embeds=states, use_cache=False).last_hidden_state)
    assert pack_flops(TINY, MEAN, [9], lora=lora) == flops


def test_latent_head_flops_are_those_that_run():
    hidden, heads, latents, width, tokens = 24, 3, 5, 7, 11
    leaf = {
        name: torch.randn(shape, requires_grad=True)
        for name, shape in {
            "states": (tokens, hidden),
            "latents": (latents, hidden),
            "to_q": (heads, hidden, width),
            "to_k": (heads, hidden, width),
            "to_v": (heads, hidden, width),
            "to_out": (heads, width, hidden),
            "mlp_in": (hidden, 8 * hidden),
            "mlp_out": (4 * hidden, hidden),
        }.items()
    }

    def forward() -> torch.Tensor:
        keys = leaf["latents"] @ leaf["to_k"]
        values = leaf["latents"] @ leaf["to_v"]
        into = (leaf["to_q"] @ keys.transpose(1, 2)).permute(1, 0, 2).flatten(1)
        out_of = (values @ leaf["to_out"]).flatten(0, 1)
        states = (leaf["states"] @ into).unflatten(1, (heads, latents)).softmax(-1).flatten(1) @ out_of
        value, gate = (states @ leaf["mlp_in"]).chunk(2, dim=-1)
        return (value * F.gelu(gate)) @ leaf["mlp_out"]

    pooling = PoolingConfig(kind="latent", num_latents=latents, num_heads=heads, head_width=width)
    lengths = [4, 7]
    assert pack_flops(TINY, pooling, lengths) - pack_flops(TINY, MEAN, lengths) == counted(forward)


def test_self_attention_head_flops_by_hand():
    pooling = PoolingConfig(kind="self_attention", num_heads=2, head_width=5)
    head = pack_flops(TINY, pooling, [3, 4]) - pack_flops(TINY, MEAN, [3, 4])
    projections, attention, mlp = 6 * 7 * 4 * 24 * 10, 12 * 10 * (9 + 16), 6 * 7 * 12 * 24 * 24
    assert head == projections + attention + mlp


def test_multi_layer_head_flops_are_those_that_run():
    pooling = PoolingConfig(kind="multi_layer", num_latents=5, num_heads=2, head_width=7)
    head = build_head(24, pooling, TINY.num_hidden_layers)
    with FlopCounterMode(display=False) as counter:  # forward: the backward pass would count what is computed again
        head(torch.randn(3, 4, 24))
    lengths = [3, 1, 9, 4]
    assert pack_flops(TINY, pooling, lengths) - pack_flops(TINY, MEAN, lengths) == 3 * counter.get_total_flops()


def test_causal_attention_has_the_pairs_below_the_diagonal():
    both = pack_flops(TINY, MEAN, [9, 2])
    causal = pack_flops(TINY, MEAN, [9, 2], causal=True)
    assert both - causal == 12 * 3 * 4 * 10 * (81 + 4 - 45 - 3)
    head = PoolingConfig(kind="self_attention")
    assert pack_flops(TINY, head, [9, 2]) - pack_flops(TINY, head, [9, 2], causal=True) == both - causal


def test_nv_embed_costs_what_is_published():
    """Mistral-7B without its embeddings has 6.98e9 weights in linears; the folded head adds some percent."""
    config = MistralConfig(max_position_embeddings=32768)
    lengths = [512] * 32
    per_token = pack_flops(config, MEAN, lengths) / sum(lengths)
    assert per_token == pytest.approx(6 * 6.979e9 + 12 * 32 * 4096 * 512, rel=1e-3)
    assert 1.02 < pack_flops(config, PoolingConfig(), lengths) / pack_flops(config, MEAN, lengths) < 1.06


def test_flops_need_no_transformers():
    """An `Architecture` has the same names."""
    lora, lengths = LoraConfig(rank=4), [5, 9]
    light = Architecture.of(TINY.to_dict())
    assert pack_flops(light, PoolingConfig(), lengths, lora=lora) == pack_flops(
        TINY, PoolingConfig(), lengths, lora=lora
    )
