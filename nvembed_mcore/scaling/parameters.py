"""Parameters of a rank, one by one: how large each is here, who trains it, and which buffers of Megatron hold it.

The numbers of a rank do not depend on its place among the tensor and data-parallel ranks, only on its pipeline stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from nvembed_mcore.scaling.architecture import Architecture
    from nvembed_mcore.scaling.layout import Layout
    from nvembed_mcore.scaling.workload import Workload

VOCABULARY_MULTIPLE = 128
"""As in `model.mistral`, which this room does not import."""

Part = Literal["embedding", "layers", "norms", "adapters", "head", "temperature"]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a rank.

    Attributes:
        name: in the encoder, with its layer's number in the stage's chunk.
        part: what it belongs to.
        numel: its numbers on this rank.
        is_trained: whether it has a gradient.
        is_summed: whether its gradient is summed over tensor ranks, which each see a part of the tokens.
        is_float32: in every precision.
    """

    name: str
    part: Part
    numel: int
    is_trained: bool
    is_summed: bool = False
    is_float32: bool = False


@dataclass(frozen=True)
class Count:
    """Parameters of a part, on one rank."""

    total: int = 0
    trained: int = 0


def parameters_of(workload: Workload, layout: Layout, stage: int) -> dict[Part, Count]:
    """Parameters of a rank of a pipeline stage (from 0), by part."""
    counts: dict[Part, Count] = {}
    for chunk in range(layout.chunks):
        for one in chunk_parameters(workload, layout, stage, chunk):
            known = counts.get(one.part, Count())
            counts[one.part] = Count(known.total + one.numel, known.trained + one.numel * one.is_trained)
    return counts


def chunk_parameters(workload: Workload, layout: Layout, stage: int, chunk: int = 0) -> list[Parameter]:
    """Parameters of one chunk of a stage, in the order in which the encoder names them."""
    architecture, is_split = workload.architecture, layout.splits_tokens
    is_first = stage == 0 and chunk == 0
    is_last = stage == layout.pp - 1 and chunk == layout.chunks - 1
    trains, found = workload.lora is None, []
    if is_last and workload.loss.learn_temperature:
        found.append(Parameter("log_scale", "temperature", 1, True, is_float32=True))
    if is_first:
        rows = padded_vocabulary(architecture) // layout.tp
        name = "embedding.word_embeddings.weight"
        found.append(Parameter(name, "embedding", rows * architecture.hidden_size, trains))
    for layer in range(layout.stages(architecture.num_hidden_layers)[stage][chunk]):
        found += _layer(workload, layout, f"decoder.layers.{layer}.", trains, is_split)
    if is_last:
        norm = Parameter("decoder.final_layernorm.weight", "norms", architecture.hidden_size, trains, is_split)
        found += [norm, *_head(workload, is_split)]
    return found


def padded_vocabulary(architecture: Architecture) -> int:
    """Rows of the embedding table with its padding, over all tensor ranks."""
    return -(-architecture.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


@dataclass(frozen=True)
class Linear:
    """A linear of a layer as a tensor rank has it.

    Attributes:
        name: in its layer.
        inputs, outputs: its width on this rank.
        rows: output rows of each projection on this rank.
        is_row_parallel: whether tensor ranks split inputs, otherwise they split outputs.
    """

    name: str
    inputs: int
    outputs: int
    rows: dict[str, int]
    is_row_parallel: bool


def linears(architecture: Architecture, tp: int) -> list[Linear]:
    """The four linears of a layer, in the order of the forward pass."""
    hidden, ffn = architecture.hidden_size, architecture.intermediate_size // tp
    inner = architecture.num_attention_heads * architecture.head_dim // tp
    of_groups = architecture.num_key_value_heads * architecture.head_dim // tp
    qkv = {"q": inner, "k": of_groups, "v": of_groups}
    up = {"gate": ffn, "up": ffn} if architecture.gated_mlp else {"up": ffn}
    return [
        Linear("self_attention.linear_qkv", hidden, sum(qkv.values()), qkv, False),
        Linear("self_attention.linear_proj", inner, hidden, {"o": hidden}, True),
        Linear("mlp.linear_fc1", hidden, sum(up.values()), up, False),
        Linear("mlp.linear_fc2", ffn, hidden, {"down": hidden}, True),
    ]


def _layer(workload: Workload, layout: Layout, prefix: str, trains: bool, is_split: bool) -> list[Parameter]:
    hidden = workload.architecture.hidden_size
    qkv, proj, fc1, fc2 = linears(workload.architecture, layout.tp)

    def norm(name: str) -> Parameter:
        return Parameter(f"{prefix}{name}.weight", "norms", hidden, trains, is_split)

    def weight(linear: Linear) -> Parameter:
        return Parameter(f"{prefix}{linear.name}.weight", "layers", linear.inputs * linear.outputs, trains)

    found = [norm("input_layernorm"), weight(proj), weight(qkv), norm("pre_mlp_layernorm"), weight(fc1), weight(fc2)]
    for linear in (qkv, proj, fc1, fc2):
        found += _adapter(workload, linear, prefix, is_split)
    return found


def _adapter(workload: Workload, linear: Linear, prefix: str, is_split: bool) -> list[Parameter]:
    if workload.lora is None:
        return []
    rank, name = workload.lora.rank, f"{prefix}lora_{linear.name.rpartition('.')[2]}"
    targets = [target for target in linear.rows if target in workload.lora.targets]
    # The one that tensor ranks do not split sees a part of the tokens only: `a` before split outputs, `b` after
    # split inputs.
    whole = "b" if linear.is_row_parallel else "a"
    sizes = {"a": lambda target: linear.inputs * rank, "b": lambda target: linear.rows[target] * rank}
    return [
        Parameter(f"{name}.{part}.{target}", "adapters", sizes[part](target), True, is_split and part == whole)
        for part in ("a", "b")
        for target in sorted(targets)  # as torch keeps a dictionary of parameters
    ]


def _head(workload: Workload, is_split: bool) -> list[Parameter]:
    """The pooling head, whole on every tensor rank, in the order of its modules."""
    pooling, hidden = workload.pooling, workload.architecture.hidden_size
    if pooling.kind in ("mean", "last"):
        return []
    inner = pooling.num_heads * (pooling.head_width or hidden)
    sizes = {} if pooling.kind == "self_attention" else {"latents": pooling.num_latents * hidden}
    sizes |= {"mlp_in.weight": 8 * hidden * hidden, "mlp_in.bias": 8 * hidden}
    sizes |= {"mlp_out.weight": 4 * hidden * hidden, "mlp_out.bias": hidden}
    for norm in ("norm_query", "norm_context"):
        sizes |= {f"{norm}.weight": hidden, f"{norm}.bias": hidden}
    sizes |= {"to_q.weight": inner * hidden, "to_kv.weight": 2 * inner * hidden, "to_out.weight": inner * hidden}
    sizes |= {"norm_mlp.weight": hidden, "norm_mlp.bias": hidden}
    if pooling.kind == "multi_layer":
        sizes["layer_embedding.weight"] = workload.architecture.num_hidden_layers * hidden
    is_summed = is_split and pooling.kind == "latent"
    return [Parameter(f"pooling.{name}", "head", numel, True, is_summed) for name, numel in sizes.items()]


@dataclass(frozen=True)
class Buffer:
    """Gradients, and with the distributed optimizer the weights, of the parameters of one dtype in one chunk.

    Attributes:
        buckets: numbers of each bucket with its padding; what one collective reduces.
        numel: of all parameters, without padding.
        is_float32: of the parameters' dtype; the gradients are float32 always.
    """

    buckets: list[int]
    numel: int
    is_float32: bool

    @property
    def padded(self) -> int:
        return sum(self.buckets)


def buffers_of(workload: Workload, layout: Layout, stage: int, chunk: int = 0) -> list[Buffer]:
    """Megatron's buffers of a chunk (`_ParamAndGradBuffer` of Megatron-Core 0.16)."""
    trained = [one for one in chunk_parameters(workload, layout, stage, chunk) if one.is_trained]
    kinds: dict[bool, list[Parameter]] = {}
    for one in trained:
        kinds.setdefault(one.is_float32 or workload.dtype == "float32", []).append(one)
    size = bucket_size(layout) if stage == 0 else None
    return [
        Buffer(_buckets([one.numel for one in many], layout, size), sum(one.numel for one in many), is_float32)
        for is_float32, many in kinds.items()
    ]


def bucket_size(layout: Layout) -> int | None:
    """Parameters of a bucket at least, on the first stage, given or as Megatron chooses it; None: one bucket."""
    if not layout.overlap_grad_reduce:
        return None
    return layout.bucket_size or max(40_000_000, 1_000_000 * layout.dp)


def _buckets(sizes: list[int], layout: Layout, bucket_size: int | None) -> list[int]:
    """Parameters of these sizes, from the last to the first, in buckets; starts and ends padded where ranks share."""
    start_multiple, end_multiple = (
        (64, math.lcm(layout.dp * layout.cp, 128)) if layout.distributed_optimizer else (1, 1)
    )
    buckets, begin, place = [], 0, 0
    for number, size in enumerate(reversed(sizes), 1):
        place = _up(place, start_multiple) + size
        if number == len(sizes) or (bucket_size is not None and place - begin >= bucket_size):
            place = _up(place, end_multiple)
            buckets.append(place - begin)
            begin = place
    return buckets


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
