"""The one table between Megatron-Core's parameter names and the published Hugging Face ones, used in both directions.

Letters: `H` hidden size, `F` feed-forward width, `A` query heads, `G` key/value groups, `d` head width.

Both sides store linears as [out, in], so nothing is ever transposed. Both rotate the two halves of a head (not
neighbouring pairs), so the rows of a head keep their order. What differs:

- `linear_qkv` interleaves by group: the A/G query heads of a group, its key head, its value head; Hugging Face has
  three matrices.
- `linear_fc1` is gate and up in one matrix, and a tensor rank holds its chunk of gate followed by its chunk of up: the
  ranks' shards put one after the other are *not* the global matrix.
- the embedding has rows of zeros up to a multiple of 128 rows.

Low-rank adapters have PEFT's last two words (`q_proj.lora_A.weight`), one pair a projection on both sides.

Hugging Face names are NV-Embed's (`embedding_model.*`, `latent_attention_model.*`); other prefixes are the reader's
affair (`hf_folder`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import MistralConfig

from nvembed_mcore.config import LORA_TARGETS, LoraConfig, PoolingConfig
from nvembed_mcore.model.linears import AdaptedLinear, adapted_linears
from nvembed_mcore.model.mistral import head_dim, padded_vocabulary

BACKBONE, HEAD = "embedding_model.", "latent_attention_model."

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
PROJECTIONS = {name: f"{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj" for name in LORA_TARGETS}
"""Hugging Face's projections in a layer, by the short names that `model.lora.targets` has."""

Layout = Literal["replicated", "vocabulary", "qkv", "gate_up", "columns", "rows"]


@dataclass(frozen=True)
class Entry:
    """One parameter of the encoder and the Hugging Face tensors that hold the same numbers.

    Attributes:
        name: name in the encoder, with the global layer number.
        shape: its global shape.
        hf: Hugging Face name -> shape, in the order in which `layout` puts them together.
        layout: how they are put together and split over tensor ranks. `replicated`: equal everywhere. `vocabulary`:
            rows, padded with zeros. `qkv`, `gate_up`: as in the module's text. `rows`, `columns`: split over dimension
            0 or 1.
        groups: G (`qkv` only).
    """

    name: str
    shape: tuple[int, ...]
    hf: dict[str, tuple[int, ...]]
    layout: Layout = "replicated"
    groups: int = 1

    @property
    def part(self) -> Literal["backbone", "head", "adapters"]:
        """What it is a parameter of."""
        if self.name.startswith("pooling."):
            return "head"
        return "adapters" if ".lora_" in self.name else "backbone"

    @property
    def is_head(self) -> bool:
        """Whether it belongs to the pooling head."""
        return self.part == "head"

    @property
    def is_adapter(self) -> bool:
        """Whether it is part of a low-rank adapter."""
        return self.part == "adapters"


def name_table(hf_config: MistralConfig, pooling: PoolingConfig, lora: LoraConfig | None = None) -> list[Entry]:
    """Every parameter of the encoder, in the order of the forward pass; a layer's adapters behind its weights."""
    hidden = hf_config.hidden_size
    table = {f"{BACKBONE}embed_tokens.weight": (hf_config.vocab_size, hidden)}
    entries = [Entry("embedding.word_embeddings.weight", (padded_vocabulary(hf_config), hidden), table, "vocabulary")]
    for layer in range(hf_config.num_hidden_layers):
        entries += _layer_entries(hf_config, layer) + (_adapter_entries(hf_config, layer, lora) if lora else [])
    entries.append(_same("decoder.final_layernorm.weight", f"{BACKBONE}norm.weight", (hidden,)))
    return entries + _head_entries(hidden, hf_config.num_hidden_layers, pooling)


def local_shard(entry: Entry, read: Callable[[str], Any], tp_rank: int, tp_size: int) -> torch.Tensor:
    """This tensor rank's part of a parameter, made from Hugging Face tensors.

    Args:
        read: Hugging Face name -> something that slices to a tensor along dimensions 0 and 1 (a torch tensor, or a
            safetensors slice, of which only the needed bytes are then read).

    Returns:
        A tensor of its own memory, of the dtype that `read` gives.
    """
    name, *_ = entry.hf
    out = read(name)[:0].new_empty(_local_shape(entry, tp_size))
    return copy_shard(entry, read, out, tp_rank, tp_size)


@torch.no_grad()
def copy_shard(
    entry: Entry, read: Callable[[str], Any], out: torch.Tensor, tp_rank: int, tp_size: int
) -> torch.Tensor:
    """Fill this tensor rank's part of a parameter, one Hugging Face tensor after the other.

    Args:
        read: as in `local_shard`; what it gives is let go before the next one is read.
        out: the part, on any device; numbers are converted to its dtype.

    Returns:
        `out`.
    """
    for (name, shape), part in zip(entry.hf.items(), _parts(entry, out), strict=True):
        if entry.layout == "columns":
            begin, end = _part(shape[1], tp_rank, tp_size)
            part.copy_(read(name)[:, begin:end])
        elif entry.layout == "qkv":
            first, last = _part(entry.groups, tp_rank, tp_size)
            rows = shape[0] // entry.groups  # of one group: (A/G) * d for queries, d for keys and values
            part.copy_(read(name)[first * rows : last * rows].unflatten(0, (last - first, rows)))
        elif entry.layout in ("gate_up", "rows"):
            begin, end = _part(shape[0], tp_rank, tp_size)
            part.copy_(read(name)[begin:end])
        elif entry.layout == "vocabulary":
            begin, end = (min(bound, shape[0]) for bound in _part(entry.shape[0], tp_rank, tp_size))
            part[: end - begin].copy_(read(name)[begin:end])
            part[end - begin :] = 0
        else:
            part.copy_(read(name)[:])
    return out


def join_shards(entry: Entry, shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """The global tensor from the local ones of all tensor ranks, in rank order."""
    if entry.layout == "replicated":
        return shards[0]
    if entry.layout == "gate_up":
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat(gates + ups)
    return torch.cat(list(shards), dim=1 if entry.layout == "columns" else 0)


def to_hf(entry: Entry, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Hugging Face tensors of a global tensor; contiguous, padding rows dropped."""
    assert tuple(tensor.shape) == entry.shape, f"{entry.name}: got {tuple(tensor.shape)}, the table has {entry.shape}"
    parts = _parts(entry, tensor)
    if entry.layout == "qkv":
        parts = [part.flatten(0, 1) for part in parts]
    elif entry.layout == "vocabulary":
        (rows, _), *_ = entry.hf.values()
        parts = [tensor[:rows]]
    return {name: part.contiguous() for name, part in zip(entry.hf, parts, strict=True)}


def _parts(entry: Entry, tensor: torch.Tensor) -> list[torch.Tensor]:
    """Views of a parameter or of a tensor rank's part of it, one for each Hugging Face tensor; those of `qkv` have the
    groups as a dimension of their own."""
    if entry.layout == "gate_up":
        return list(tensor.chunk(2))
    if entry.layout == "qkv":
        rows = [shape[0] // entry.groups for shape in entry.hf.values()]
        return list(tensor.unflatten(0, (-1, sum(rows))).split(rows, dim=1))  # of [G, (A/G + 2) * d, H]
    return [tensor]


def _local_shape(entry: Entry, tp_size: int) -> tuple[int, ...]:
    if entry.layout == "replicated":
        return entry.shape
    begin, end = _part(entry.shape[1 if entry.layout == "columns" else 0], 0, tp_size)
    return (entry.shape[0], end - begin) if entry.layout == "columns" else (end - begin, *entry.shape[1:])


def _part(size: int, tp_rank: int, tp_size: int) -> tuple[int, int]:
    assert size % tp_size == 0, f"{tp_size} tensor ranks do not divide {size}; the layout is checked before"
    return tp_rank * size // tp_size, (tp_rank + 1) * size // tp_size


def _same(name: str, hf_name: str, shape: tuple[int, ...], layout: Layout = "replicated") -> Entry:
    return Entry(name, shape, {hf_name: shape}, layout)


def _layer_entries(config: MistralConfig, layer: int) -> list[Entry]:
    ours, theirs = f"decoder.layers.{layer}.", f"{BACKBONE}layers.{layer}."
    hidden, ffn, groups = config.hidden_size, config.intermediate_size, config.num_key_value_heads
    width = head_dim(config)
    query = config.num_attention_heads * width
    qkv = {"q": query, "k": groups * width, "v": groups * width}
    return [
        _same(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight", (hidden,)),
        Entry(
            f"{ours}self_attention.linear_qkv.weight",
            (sum(qkv.values()), hidden),
            {f"{theirs}self_attn.{part}_proj.weight": (rows, hidden) for part, rows in qkv.items()},
            "qkv",
            groups,
        ),
        _same(
            f"{ours}self_attention.linear_proj.weight",
            f"{theirs}self_attn.o_proj.weight",
            (hidden, query),
            "columns",
        ),
        _same(f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight", (hidden,)),
        Entry(
            f"{ours}mlp.linear_fc1.weight",
            (2 * ffn, hidden),
            {f"{theirs}mlp.{part}_proj.weight": (ffn, hidden) for part in ("gate", "up")},
            "gate_up",
        ),
        _same(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.down_proj.weight", (hidden, ffn), "columns"),
    ]


def _adapter_entries(config: MistralConfig, layer: int, lora: LoraConfig) -> list[Entry]:
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, head_dim(config)
    linears = adapted_linears(config.hidden_size, config.intermediate_size, heads, groups, width)
    entries = []
    for linear in linears:
        for target in (target for target in linear.rows if target in lora.targets):
            entries += _adapter(linear, target, lora.rank, layer)
    return entries


def _adapter(linear: AdaptedLinear, target: str, rank: int, layer: int) -> list[Entry]:
    ours = f"decoder.layers.{layer}.lora_{linear.name}"
    theirs = f"{BACKBONE}layers.{layer}.{PROJECTIONS[target]}"
    layouts = ("columns", "replicated") if linear.is_row_parallel else ("replicated", "rows")
    shapes = (rank, linear.inputs), (linear.rows[target], rank)
    return [
        _same(f"{ours}.{part}.{target}", theirs + suffix, shape, layout)
        for part, suffix, shape, layout in zip("ab", (LORA_A, LORA_B), shapes, layouts, strict=True)
    ]


def _head_entries(hidden: int, num_layers: int, pooling: PoolingConfig) -> list[Entry]:
    """The pooling head, replicated over tensor ranks. `to_kv` has the rows of K first on both sides, `mlp_in` those of
    the value half before those of the gate half."""
    if pooling.kind in ("mean", "last"):
        return []
    inner = pooling.num_heads * (pooling.head_width or hidden)
    cross, feed_forward = f"{HEAD}cross_attend_blocks.0.", f"{HEAD}cross_attend_blocks.1."
    own = []
    if pooling.kind != "self_attention":
        own.append(_same("pooling.latents", f"{HEAD}latents", (pooling.num_latents, hidden)))
    if pooling.kind == "multi_layer":
        own.append(_same("pooling.layer_embedding.weight", f"{HEAD}layer_embedding.weight", (num_layers, hidden)))
    return own + [
        *_weight_and_bias("norm_query", f"{cross}norm", (hidden,)),
        *_weight_and_bias("norm_context", f"{cross}norm_context", (hidden,)),
        _same("pooling.to_q.weight", f"{cross}fn.to_q.weight", (inner, hidden)),
        _same("pooling.to_kv.weight", f"{cross}fn.to_kv.weight", (2 * inner, hidden)),
        _same("pooling.to_out.weight", f"{cross}fn.to_out.weight", (hidden, inner)),
        *_weight_and_bias("norm_mlp", f"{feed_forward}norm", (hidden,)),
        *_weight_and_bias("mlp_in", f"{feed_forward}fn.net.0", (8 * hidden, hidden)),
        *_weight_and_bias("mlp_out", f"{feed_forward}fn.net.2", (hidden, 4 * hidden)),
    ]


def _weight_and_bias(ours: str, theirs: str, shape: tuple[int, ...]) -> list[Entry]:
    return [
        _same(f"pooling.{ours}.weight", f"{theirs}.weight", shape),
        _same(f"pooling.{ours}.bias", f"{theirs}.bias", shape[:1]),
    ]
