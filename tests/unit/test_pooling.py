"""Pooling heads against the plain order of operations, and texts that must not see their neighbours in a pack."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nvembed_mcore.config import PoolingConfig
from nvembed_mcore.data.packing import Text, make_pack
from nvembed_mcore.model import pooling
from nvembed_mcore.model.attention import packing_of
from nvembed_mcore.model.pooling import build_head, segment_sum, weights_of
from tests.helpers import cases, models, plain

HIDDEN, LENGTHS, LAYERS = 24, [5, 1, 17, 9], 3


def head_with_random_weights(config: PoolingConfig, dtype: torch.dtype) -> torch.nn.Module:
    head = build_head(HIDDEN, config, LAYERS).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
    return head


def compare_with_plain(config: PoolingConfig, dtype: torch.dtype) -> dict[str, float]:
    """Largest difference from the plain form in float64, over its largest value: output, input and all weights."""
    head = head_with_random_weights(config, dtype)
    generator = torch.Generator().manual_seed(1)
    states, upstream = torch.randn(2, sum(LENGTHS), HIDDEN, generator=generator, dtype=torch.float64)
    plain_states = states.clone().requires_grad_()
    weights = {name: value.detach().double().requires_grad_() for name, value in head.named_parameters()}
    texts = plain_states.split(LENGTHS)
    expected = torch.cat([models.reference_head(text, weights, config.kind, config.num_heads) for text in texts])
    (expected * upstream).sum().backward()

    states = states.to(dtype).requires_grad_()
    found = head(states, packing_of(np.array(LENGTHS), torch.device("cpu")))
    (found * upstream.to(dtype)).sum().backward()
    pairs = {"output": (found, expected), "states": (states.grad, plain_states.grad)}
    pairs |= {name: (value.grad, weights[name].grad) for name, value in head.named_parameters()}
    pairs = {name: (one.detach(), truth.detach()) for name, (one, truth) in pairs.items()}
    assert all(float(truth.abs().max()) > 1e-3 for _, truth in pairs.values())
    return {name: float((one - truth).abs().max() / truth.abs().max()) for name, (one, truth) in pairs.items()}


HEADS = [
    PoolingConfig(kind="latent", num_latents=7, num_heads=3, head_width=10),
    PoolingConfig(kind="latent", num_latents=64, num_heads=2),
    PoolingConfig(kind="self_attention", num_heads=3, head_width=10),
]


@pytest.mark.parametrize("config", HEADS, ids=["latent", "latent-wide", "self_attention"])
def test_heads_equal_the_plain_order_of_operations(config):
    differences = compare_with_plain(config, torch.float32)
    assert max(differences.values()) <= 1e-5, differences
    of_latents = {"latents"} if config.kind == "latent" else set()
    assert differences.keys() >= of_latents | {"to_q.weight", "to_kv.weight", "to_out.weight", "norm_context.bias"}


@pytest.mark.parametrize("config", HEADS[:2], ids=["latent", "latent-wide"])
def test_the_fold_is_exact(config, monkeypatch):
    """Not an approximation: with float32 lifted to float64 where the head asks for it, nothing is left."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    differences = compare_with_plain(config, torch.float64)
    assert max(differences.values()) <= 1e-12, differences


@pytest.mark.parametrize("at_once", [1, 2 * 7, 4096], ids=["one text", "two texts", "all texts"])
def test_multi_layer_equals_the_plain_order_of_operations(monkeypatch, at_once):
    """Values go through `to_out` before they are weighted, and a few texts at a time are computed again."""
    monkeypatch.setattr(pooling, "ROWS_AT_ONCE", at_once)
    config = PoolingConfig(kind="multi_layer", num_latents=7, num_heads=3, head_width=10)
    head = head_with_random_weights(config, torch.float32)
    generator = torch.Generator().manual_seed(1)
    summaries = torch.randn(LAYERS, 5, HIDDEN, generator=generator, dtype=torch.float64)
    upstream = torch.randn(5, HIDDEN, generator=generator, dtype=torch.float64)
    plain_summaries = summaries.clone().requires_grad_()
    weights = {name: value.detach().double().requires_grad_() for name, value in head.named_parameters()}
    texts = plain_summaries.unbind(1)
    expected = torch.stack([models.reference_multi_layer(text, weights, config.num_heads) for text in texts])
    (expected * upstream).sum().backward()

    summaries = summaries.float().requires_grad_()
    found = head(summaries)
    (found * upstream).sum().backward()
    pairs = {"output": (found, expected), "summaries": (summaries.grad, plain_summaries.grad)}
    pairs |= {name: (value.grad, weights[name].grad) for name, value in head.named_parameters()}
    assert len(pairs) == 2 + 15 and "layer_embedding.weight" in pairs
    for name, (one, truth) in pairs.items():
        assert (one - truth).abs().max() <= 1e-5 * truth.abs().max(), name
        assert truth.abs().max() > 1e-3, name


def test_multi_layer_in_bfloat16():
    config = PoolingConfig(kind="multi_layer", num_latents=7, num_heads=3, head_width=10)
    summaries = torch.randn(LAYERS, 5, HIDDEN, generator=torch.Generator().manual_seed(1))
    exact = head_with_random_weights(config, torch.float32)(summaries)
    rounded = head_with_random_weights(config, torch.bfloat16)(summaries.bfloat16())
    assert rounded.dtype == torch.float32
    assert torch.cosine_similarity(exact, rounded).min() > 0.999


def test_kinds_without_parameters_have_no_head():
    mean, last = (build_head(HIDDEN, PoolingConfig(kind=kind), LAYERS) for kind in ("mean", "last"))
    assert mean is last is None


def test_weights_by_hand():
    lengths, pooled_from = np.array([4, 1, 3, 2]), np.array([2, 0, 0])  # the last sequence is a dummy
    mean = weights_of(lengths, pooled_from, "mean")
    assert mean.dtype == np.float32
    np.testing.assert_array_equal(mean, np.array([0, 0, 1 / 2, 1 / 2, 1, 1 / 3, 1 / 3, 1 / 3, 0, 0], np.float32))
    for kind in ("latent", "self_attention"):
        np.testing.assert_array_equal(weights_of(lengths, pooled_from, kind), mean)
    assert weights_of(lengths, pooled_from, "last").tolist() == [0, 0, 0, 1, 1, 0, 0, 1, 0, 0]


def test_a_text_without_a_pooled_position_is_refused():
    with pytest.raises(AssertionError, match="without a pooled position"):
        weights_of(np.array([3, 2]), np.array([0, 2]), "mean")


def test_segment_sum_is_the_mean_over_pooled_positions():
    lengths, pooled_from = np.array([4, 3]), np.array([1, 0])
    states = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights = torch.as_tensor(weights_of(lengths, pooled_from, "mean"))
    pooled = segment_sum(states, weights, torch.tensor([0, 0, 0, 0, 1, 1, 1]), 2)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, torch.stack([states[1:4].float().mean(0), states[4:].float().mean(0)]))


# What follows runs in the process of a world: Megatron-Core wants process groups, if only of one.


@torch.enable_grad()  # Megatron's data parallelism hooks into the graph
def encoder_of(kind: str, mask: str = "bidirectional"):
    """(trainer's encoder, Hugging Face's backbone, the head's weights)."""
    parallel, groups = cases.layout(1, 1, False)
    config = models.tiny_config()
    reference = models.hf_reference(config, is_causal=mask == "causal")
    head = plain.random_head(config.hidden_size, kind)
    (encoder,), _, _ = cases.build(config, reference, head, kind, parallel, groups, mask)
    return encoder.eval(), reference, head


@torch.no_grad()
def neighbours_of_a_text(kind: str, mask: str) -> dict[str, float]:
    """Largest differences of embeddings between packings, and from Hugging Face's backbone with the plain head."""
    encoder, reference, head = encoder_of(kind, mask)
    lengths = [12, 3, 30, 1, 16, 17, 2, 45, 8, 31, 64, 5]
    texts = models.random_texts(lengths, 250)
    alone = torch.cat([encoder(make_pack([text])) for text in texts])
    together = encoder(make_pack(texts))
    order = np.random.default_rng(0).permutation(len(texts))
    shuffled = torch.empty_like(alone)
    for part in np.array_split(order, 3):
        shuffled[torch.as_tensor(part)] = encoder(make_pack([texts[number] for number in part], 16))
    expected = torch.stack([models.reference_embedding(reference, head, text, kind, plain.HEADS) for text in texts])
    return {
        "together": float((together - alone).abs().max()),
        "shuffled": float((shuffled - alone).abs().max()),
        "plain": float((alone - expected).abs().max()),
        "spread": float((alone @ alone.T).fill_diagonal_(0).abs().max()),
    }


@pytest.mark.parametrize(
    ("kind", "mask"),
    [(kind, "bidirectional") for kind in ("latent", "self_attention", "mean", "last", "multi_layer")]
    + [("multi_layer", "causal")],
)
def test_an_embedding_does_not_depend_on_its_pack(world, kind, mask):
    (differences,) = world(1).run(neighbours_of_a_text, kind, mask)
    assert max(differences["together"], differences["shuffled"]) <= 1e-6, differences
    assert differences["plain"] <= 5e-6, differences
    assert differences["spread"] < 0.999, "embeddings that are all alike would prove nothing"


@torch.no_grad()
def pack_as_long_as_the_table(lengths: list[int]) -> float:
    """Largest difference from the reference for a pack with `max_position_embeddings` tokens."""
    encoder, reference, head = encoder_of("latent")
    assert sum(lengths) == reference.config.max_position_embeddings
    texts = models.random_texts(lengths, 250)
    expected = [models.reference_embedding(reference, head, text, "latent", plain.HEADS) for text in texts]
    return float((encoder(make_pack(texts)) - torch.stack(expected)).abs().max())


@pytest.mark.parametrize("lengths", [[64], [20, 30, 14], [1] * 64])
def test_a_pack_as_long_as_the_rotary_table(world, lengths):
    assert world(1).run(pack_as_long_as_the_table, lengths)[0] <= 5e-6


@torch.no_grad()
def effect_of_a_changed_token(mask: str) -> list[float]:
    """How much each token's state moves when token 9 of the second text of a pack changes; 12 tokens a text."""
    encoder, _, _ = encoder_of("mean", mask)
    encoder.module._pool = lambda states, pack, packing: states
    texts = models.random_texts([12, 12, 12], 250)
    changed = texts[1].token_ids.copy()
    changed[9] = (changed[9] + 1) % 250
    others = [texts[0], Text(changed, texts[1].pooled_from), texts[2]]
    return (encoder(make_pack(texts)) - encoder(make_pack(others))).abs().amax(1).tolist()


@pytest.mark.parametrize("mask", ["bidirectional", "causal"])
def test_what_a_later_token_changes(world, mask):
    (moved,) = world(1).run(effect_of_a_changed_token, mask)
    before, inside, behind = moved[:12], moved[12:24], moved[24:]
    assert max(before + behind) <= 1e-6, "other texts of the pack"
    assert min(inside[9:]) > 1e-4
    if mask == "causal":
        assert max(inside[:9]) <= 1e-6
    else:
        assert min(inside[:9]) > 1e-4
