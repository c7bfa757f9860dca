"""Tiny models, and references that share no code with the trainer."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from transformers import MistralConfig, MistralModel
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from nvembed_mcore.data.packing import Text


def tiny_config(**changes) -> MistralConfig:
    """Four layers, grouped queries, a vocabulary that is no multiple of 128."""
    values = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=250,
        max_position_embeddings=64,
        sliding_window=None,
        initializer_range=0.2,
    )
    return MistralConfig(**{**values, **changes})


def hf_reference(config: MistralConfig, seed: int = 0, is_causal: bool = False) -> MistralModel:
    """Hugging Face's own Mistral with random weights and norms that are not all ones."""
    torch.manual_seed(seed)
    model = MistralModel(config).eval()
    model.config.is_causal = is_causal
    for layer in model.layers:
        layer.self_attn.is_causal = is_causal
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def in_float64(model: MistralModel) -> MistralModel:
    """The same model in float64, its norms too, which Hugging Face always computes in float32."""
    model.double()
    for parent in [*model.layers, model]:
        for name, child in list(parent.named_children()):
            if isinstance(child, MistralRMSNorm):
                norm = torch.nn.RMSNorm(len(child.weight), eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model


def random_texts(lengths: list[int], vocab_size: int, seed: int = 1) -> list[Text]:
    """Random token sequences; every second has an instruction, so its first positions are not pooled."""
    generator = np.random.default_rng(seed)
    return [
        Text(generator.integers(0, vocab_size, n).astype(np.int32), min(2, n - 1) if i % 2 else 0)
        for i, n in enumerate(lengths)
    ]


def reference_states(model: MistralModel, text: Text) -> torch.Tensor:
    """Last hidden states of one text on its own, float32 [length, H]; differentiable."""
    ids = torch.as_tensor(text.token_ids.astype(np.int64))[None]
    return model(input_ids=ids, use_cache=False).last_hidden_state[0]


def reference_blocks(
    queries: torch.Tensor, context: torch.Tensor, weights: dict[str, torch.Tensor], heads: int
) -> torch.Tensor:
    """Cross attention and feed-forward, each with its residual, in NV-Embed's plain order of operations.

    queries [q, H] and context [c, H] -> [q, H].
    """

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    q = norm(queries, "norm_query") @ weights["to_q.weight"].T
    k, v = (norm(context, "norm_context") @ weights["to_kv.weight"].T).chunk(2, -1)
    outs = []
    for qh, kh, vh in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        outs.append((qh @ kh.T / math.sqrt(qh.size(-1))).softmax(-1) @ vh)
    states = torch.cat(outs, -1) @ weights["to_out.weight"].T + queries
    x, g = (norm(states, "norm_mlp") @ weights["mlp_in.weight"].T + weights["mlp_in.bias"]).chunk(2, -1)
    return (x * F.gelu(g)) @ weights["mlp_out.weight"].T + weights["mlp_out.bias"] + states


def reference_head(states: torch.Tensor, weights: dict[str, torch.Tensor], kind: str, heads: int) -> torch.Tensor:
    """The pooling head on one text's states [length, H]."""
    if kind in ("mean", "last"):
        return states
    return reference_blocks(states, weights["latents"] if kind == "latent" else states, weights, heads)


def reference_layers(model: MistralModel, text: Text) -> torch.Tensor:
    """What multi-layer pooling reads of one text: the mean (causal: the last state) after each layer, [layers, H].

    Hugging Face's last hidden states are those behind the final norm.
    """
    ids = torch.as_tensor(text.token_ids.astype(np.int64))[None]
    _, *layers = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    assert len(layers) == model.config.num_hidden_layers
    return torch.stack([s[0, -1] if model.config.is_causal else s[0, text.pooled_from :].mean(0) for s in layers])


def reference_multi_layer(layers: torch.Tensor, weights: dict[str, torch.Tensor], heads: int) -> torch.Tensor:
    """Multi-layer pooling of one text's layers [layers, H]: [H]."""
    context = layers + weights["layer_embedding.weight"]
    return reference_blocks(weights["latents"], context, weights, heads).mean(0)


def reference_embedding(
    model: MistralModel, head: dict[str, torch.Tensor], text: Text, kind: str, heads: int
) -> torch.Tensor:
    """Unit vector of one text, float32 [H]."""
    if kind == "multi_layer":
        pooled = reference_multi_layer(reference_layers(model, text), head, heads)
    else:
        states = reference_head(reference_states(model, text), head, kind, heads)
        pooled = states[-1] if kind == "last" else states[text.pooled_from :].mean(0)
    return pooled / pooled.norm()
