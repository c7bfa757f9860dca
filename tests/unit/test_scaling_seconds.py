"""Terms of time against values by hand, and which way they move."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pytest

from nvembed_mcore.config import LoraConfig, PoolingConfig
from nvembed_mcore.scaling import hardware, seconds
from nvembed_mcore.scaling.architecture import Architecture
from nvembed_mcore.scaling.hardware import Cluster, Constant, Constants, Device, Link
from nvembed_mcore.scaling.layers import Pack, embedding, head, layer
from nvembed_mcore.scaling.layout import Layout
from nvembed_mcore.scaling.pipeline import even_layers, walk, with_host
from nvembed_mcore.scaling.update import data_parallel

PLAIN = Architecture(
    vocab_size=1000,
    hidden_size=400,
    intermediate_size=1000,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=50,
)


@dataclass(frozen=True)
class Work:
    architecture: Architecture = PLAIN
    dtype: str = "bfloat16"
    fp8: str = "off"
    causal: bool = False
    lora: LoraConfig | None = None


def constant(value: float) -> Constant:
    return Constant(value=value, low=value, high=value)


def machine(**constants: float) -> Cluster:
    """A device whose rates are round numbers, without overheads but those that are asked for."""
    plain = dict(matmul_share=1.0, matmul_half=0.0, memory_share=1.0, exposed=0.25, unexplained=1.0)
    plain |= dict(host_layer=0.0, host_step=0.0)
    flops = {"float32": 1e9, "tf32": 2e9, "bfloat16": 794.5e9, "fp8": 1589e9}
    device = Device(
        name="round",
        peak_flops=flops,
        matmul_flops=flops,
        reference_flops=794.5e9,
        attention_flops=(1e9, 5e8),
        attention_half=(100.0, 300.0),
        memory_bytes=1e9,
        memory_bandwidth=1e9,
        gpus_per_node=8,
        intra_node="fast",
        inter_node="slow",
        constants="none",
    )
    return Cluster(
        device=device,
        intra_node=Link(name="fast", bandwidth=100.0, latency=0.001),
        inter_node=Link(name="slow", bandwidth=10.0, latency=0.01),
        constants=Constants(**{name: constant(value) for name, value in (plain | constants).items()}),
    )


def fast(cluster: Cluster) -> Cluster:
    """With memory that never limits."""
    return replace(cluster, device=replace(cluster.device, memory_bandwidth=1e18))


def test_a_product_takes_its_flops_over_the_rate():
    slow = replace(machine(), device=replace(machine().device, matmul_flops={"bfloat16": 1e6, "fp8": 2e6}))
    assert seconds.matmul(slow, "bfloat16", 10, 20, 50) == pytest.approx(2 * 10 * 20 * 50 / 1e6)
    assert seconds.matmul(slow, "fp8", 10, 20, 50) == pytest.approx(2 * 10 * 20 * 50 / 2e6)


def test_small_products_are_as_if_each_size_were_longer():
    def stretched(dtype: str) -> float:
        times = [seconds.matmul(fast(machine(matmul_half=half)), dtype, 300, 1e6, 1e6) for half in (100.0, 0.0)]
        return times[0] / times[1]

    assert stretched("bfloat16") == pytest.approx(400 / 300, rel=1e-3)
    # Twice as fast a type has edges twice as long.
    assert stretched("fp8") == pytest.approx(500 / 300, rel=1e-3)


def test_a_thin_product_is_bound_by_memory():
    moved = 2 * (1000 * 1000 + 1000 + 1000)
    assert seconds.matmul(machine(), "bfloat16", 1, 1000, 1000) == pytest.approx(moved / 1e9)


def test_casts_count_readings_and_copies():
    assert seconds.quantise(machine(), "delayed", 1e6, 2) == pytest.approx(4e-3)
    assert seconds.quantise(machine(), "tensorwise", 1e6, 1) == pytest.approx(5e-3)
    assert seconds.quantise(machine(), "off", 1e6, 2) == 0


def test_attention_is_slow_over_few_keys():
    device = machine().device
    assert seconds.attention(device, 1e9, 100, False) == pytest.approx(2.0)
    assert seconds.attention(device, 1e9, 300, True) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("ranks", "per_node", "expected"),
    [
        (1, 8, 0.0),
        (4, 8, 3 * 0.001 + 1000 * 3 / 4 / 100),  # one node
        (16, 8, 14 * 0.001 + 0.01 + 1000 * 15 / 16 / 80),  # two nodes, eight ports each
        (4, 1, 3 * 0.01 + 1000 * 3 / 4 / 10),  # a rank in each of four nodes
    ],
)
def test_a_ring_has_a_hop_for_each_rank_and_ports_for_each_in_a_node(ranks, per_node, expected):
    assert seconds.ring(machine(), 1000, ranks, per_node) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("computing", "is_overlapped", "expected"), [(0.0, False, 8.0), (100.0, True, 2.0), (3.0, True, 5.0)]
)
def test_overlapped_communication_shows_its_share_and_what_is_too_long(computing, is_overlapped, expected):
    assert seconds.visible(machine(), 8.0, computing, is_overlapped) == expected


def test_a_layers_products_are_its_weights():
    """Forward one product of each linear, backward two, and one where weights are frozen."""
    pack, layout = Pack(1000, 100), Layout(gpus=1)
    weights = 400 * (400 + 2 * 200) + 400 * 400 + 3 * 400 * 1000
    one = layer(Work(), layout, fast(machine()), pack)
    assert one.forward["matmul"] == pytest.approx(2 * 1000 * weights / 794.5e9)
    assert one.backward["matmul"] == pytest.approx(2 * one.forward["matmul"])
    frozen = layer(Work(lora=LoraConfig(rank=4)), layout, fast(machine()), pack)
    assert frozen.backward["matmul"] == pytest.approx(one.forward["matmul"])
    assert frozen.forward["adapters"] > 0 and one.forward["adapters"] == 0


def test_attention_and_elementwise_of_a_layer_by_hand():
    one = layer(Work(), Layout(gpus=1), machine(), Pack(1000, 100))
    flops = 4 * 1000 * 100 * 8 * 50
    assert one.forward["attention"] == pytest.approx(flops / 5e8)
    assert one.backward["attention"] == pytest.approx(2.5 * flops / (5e8 * 100 / 400))
    numbers = 10 * 400 + 2 * 12 * 50 + 3 * 1000
    assert one.forward["elementwise"] == pytest.approx(2 * 1000 * numbers / 1e9)
    kept = layer(Work(causal=True), Layout(gpus=1), machine(), Pack(1000, 50), is_fused=False)
    scores = 1000 * 100 * 8
    assert kept.forward["attention"] == pytest.approx(flops / 794.5e9 + 10 * scores / 1e9)


def test_tensor_ranks_share_the_products_and_pay_rings():
    pack = Pack(1000, 100)
    alone, shared = (layer(Work(), Layout(gpus=tp, tp=tp), machine(), pack) for tp in (1, 4))
    assert shared.forward["matmul"] < alone.forward["matmul"] / 2
    one = 3 * 0.001 + 2 * 1000 * 400 * 3 / 4 / 100
    assert shared.forward["tensor_parallel"] == pytest.approx(4 * one)
    assert shared.backward["tensor_parallel"] == pytest.approx(6 * one)
    assert "tensor_parallel" not in alone.forward


def test_tensor_ranks_share_the_adapters_products_and_exchange_what_lies_between():
    """Each product is split one way or the other: by tokens, or by what the linear splits."""
    cluster, pack, work = fast(machine()), Pack(1000, 100), Work(lora=LoraConfig(rank=4))
    alone, shared, whole = (
        layer(work, Layout(gpus=tp, tp=tp, sequence_parallel=is_split), cluster, pack)
        for tp, is_split in ((1, True), (4, True), (4, False))
    )
    for way in ("forward", "backward"):
        one, parts, most = (getattr(some, way)["adapters"] for some in (alone, shared, whole))
        assert parts == pytest.approx(one / 4) and most > 1.5 * parts
    plain = layer(Work(), Layout(gpus=4, tp=4), machine(), pack)
    rings = layer(work, Layout(gpus=4, tp=4), machine(), pack).forward - plain.forward
    # Seven projections of rank 4: three of queries, keys and values, one, two and one.
    assert rings["tensor_parallel"] == pytest.approx(4 * 3 * 0.001 + 2 * 1000 * 7 * 4 * 3 / 4 / 100)


def test_context_ranks_gather_keys_and_values():
    one = layer(Work(dtype="float32"), Layout(gpus=2, cp=2), machine(), Pack(1000, 100))
    gathered = 0.001 + 4 * 2000 * 2 * 4 * 50 / 2 / 100
    assert one.forward["context_parallel"] == pytest.approx(gathered)
    assert one.backward["context_parallel"] == pytest.approx(2 * gathered)


@pytest.mark.parametrize("kind", ["latent", "self_attention", "multi_layer", "mean", "last"])
def test_a_heads_time_grows_with_its_pack(kind):
    pooling = PoolingConfig(kind=kind, num_latents=16, num_heads=2)
    found = [head(pooling, Work(), Layout(gpus=1), machine(), Pack(t, 100, t / 100)) for t in (1000, 2000)]
    assert found[0].forward["head"] < found[1].forward["head"] <= 2 * found[0].forward["head"]
    assert found[0].backward["head"] >= found[0].forward["head"]


def test_a_frozen_embedding_has_no_gradient():
    frozen = embedding(Work(lora=LoraConfig(rank=4)), Layout(gpus=1), machine(), 1000)
    assert frozen.forward["embedding"] > 0 and frozen.backward.total() == 0


def test_a_pipeline_waits_for_its_slowest_stage():
    stages = [Counter(matmul=1.0), Counter(matmul=3.0, head=1.0), Counter(matmul=2.0)]
    assert walk(stages, 5, 1) == Counter(matmul=15.0, head=5.0, bubble=3.0)
    assert walk(stages, 5, 2)["bubble"] == 1.5
    assert walk(stages[:1], 5, 1) == Counter(matmul=5.0)


def test_the_host_shows_where_it_is_slower():
    assert with_host(Counter(matmul=2.0), 5.0)["host"] == 3.0
    assert "host" not in with_host(Counter(matmul=2.0), 1.0)


@pytest.mark.parametrize(
    ("layers", "pp", "first", "last", "slowest"),
    [
        (32, 1, 0.0, 3.0, 35.0),
        (32, 4, 0.0, 0.0, 8.0),
        (32, 2, 0.0, 4.0, 18.0),  # 18 and 14
        (32, 4, 0.0, 3.0, 9.0),  # 8, 9, 9 and 6: even ones have 11
        (6, 4, 0.0, 1.0, 2.0),  # even ones cannot be
    ],
)
def test_ends_count_as_layers(layers, pp, first, last, slowest):
    in_first, in_last = even_layers(layers, pp, 1, first, last)
    layout = Layout(gpus=pp, pp=pp, layers_in_first_stage=in_first, layers_in_last_stage=in_last)
    stages = [sum(chunks) for chunks in layout.stages(layers)]
    stages[0] += first
    stages[-1] += last
    assert max(stages) == slowest and sum(stages) == layers + first + last


def test_of_stages_that_wait_for_the_head_alone_the_most_even_are_taken():
    assert even_layers(32, 4, 1, 0.0, 14.0) == (11, 1)  # 11, 10, 10 and 1, and not 1, 15, 15 and 1


def test_ranks_that_share_the_optimizer_update_less_and_gather():
    given = dict(parameters=800.0, gradient_bytes=3200.0, weight_bytes=1600.0, backward=0.0, forward=0.0)
    shared = data_parallel(machine(), Layout(gpus=4), **given, overlaps=(False, False))
    one = 3 * 0.001 + 3200 * 3 / 4 / 100
    assert shared["grad_reduce"] == pytest.approx(one)
    assert shared["optimizer"] == pytest.approx(200 * 30 / 1e9)
    assert shared["param_gather"] == pytest.approx(3 * 0.001 + 1600 * 3 / 4 / 100)
    whole = data_parallel(machine(), Layout(gpus=4, distributed_optimizer=False), **given, overlaps=(False, False))
    assert whole["grad_reduce"] == pytest.approx(2 * one) and whole["param_gather"] == 0
    assert whole["optimizer"] == pytest.approx(800 * 30 / 1e9)


def test_faster_devices_are_faster():
    pack, layout = Pack(16384, 512), Layout(gpus=8)
    times = [
        layer(Work(), layout, hardware.cluster(name), pack).forward.total()
        for name in ("a100", "h100", "h200", "b200")
    ]
    assert times == sorted(times, reverse=True)
