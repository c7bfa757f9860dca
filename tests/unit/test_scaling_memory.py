"""What memory, parameters and balance are made of, by figures that are known otherwise."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from nvembed_mcore import loss, score
from nvembed_mcore.checkpoint.names import name_table
from nvembed_mcore.config import LoraConfig, LossConfig, PoolingConfig
from nvembed_mcore.data.packing import make_plan
from nvembed_mcore.model import attention, mistral, pooling
from nvembed_mcore.scaling import activations, balance, exchange, memory, parameters
from nvembed_mcore.scaling.architecture import Architecture
from nvembed_mcore.scaling.hardware import cluster
from nvembed_mcore.scaling.layout import Layout
from nvembed_mcore.scaling.workload import Workload

MISTRAL = Architecture(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)


def workload(queries: int = 128, tokens: int = 512, **changes) -> Workload:
    """NV-Embed on a GPU: queries with a positive and seven hard negatives, all texts as long."""
    texts = 9 * queries
    owners = np.concatenate([np.arange(queries), np.repeat(np.arange(queries), 8)])
    settings = dict(
        architecture=MISTRAL,
        pooling=PoolingConfig(),
        lora=None,
        loss=LossConfig(),
        dtype="bfloat16",
        device_type="cuda",
        backend="transformer_engine",
        fp8="off",
        fp8_attention=False,
        causal=False,
        exchange="auto",
        averages=False,
        lengths=np.full((1, texts), tokens),
        query=owners[None],
        is_positive=(np.arange(texts) >= queries)[None] & ((np.arange(texts) - queries) % 8 == 0)[None],
        source="the test",
        num_queries=queries,
        steps=1,
        max_length=512,
    )
    return Workload(**settings | changes)


def test_what_this_room_may_not_import_is_the_trainers():
    assert memory.BLOCK_SCORES == {"cpu": loss.BLOCK_SCORES, "cuda": loss.CUDA_BLOCK_SCORES}
    assert memory.LEAST_ROWS == loss.LEAST_ROWS
    assert parameters.VOCABULARY_MULTIPLE == mistral.VOCABULARY_MULTIPLE
    assert (activations.BUCKET, activations.ROWS_AT_ONCE) == (attention.BUCKET_GRANULARITY, pooling.ROWS_AT_ONCE)
    assert activations.BLOCK_WIDTHS == attention.VARLEN_WIDTHS
    named = {
        (device, str(dtype).removeprefix("torch.")): rate for (device, dtype), rate in score.FLOPS_PER_BYTE.items()
    }
    assert exchange.FLOPS_PER_BYTE == named


def test_gradients_are_reduced_in_buckets_of_the_given_size():
    beside = Layout(gpus=8, overlap_grad_reduce=True)
    many, one = (
        len(parameters.buffers_of(workload(), layout, 0)[0].buckets)
        for layout in (beside, dataclasses.replace(beside, bucket_size=10**10))
    )
    assert many > 32 and one == 1


def count(work: Workload, layout: Layout, stage: int = 0) -> parameters.Count:
    found = parameters.parameters_of(work, layout, stage).values()
    return parameters.Count(sum(one.total for one in found), sum(one.trained for one in found))


def test_nv_embed_has_7851_million_parameters_of_which_740_are_the_heads():
    by_part = parameters.parameters_of(workload(), Layout(gpus=1), 0)
    assert sum(one.total for one in by_part.values()) == pytest.approx(7.851e9, rel=1e-4)
    assert by_part["head"].total == pytest.approx(740e6, rel=1e-2)
    assert by_part["layers"].total == 32 * 218_103_808


@pytest.mark.parametrize("kind", ["latent", "mean", "self_attention", "multi_layer"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=16), LoraConfig(rank=4, targets=["k", "down", "gate"])])
def test_stages_and_tensor_ranks_add_up_to_the_name_table(kind, lora):
    small = Architecture(**{**vars(MISTRAL), "num_hidden_layers": 4, "vocab_size": 1000})
    work = workload(architecture=small, pooling=PoolingConfig(kind=kind), lora=lora)
    table = name_table(small, work.pooling, lora)
    whole = sum(math.prod(entry.shape) for entry in table)
    trained = sum(math.prod(entry.shape) for entry in table if lora is None or entry.part != "backbone")
    for chunks in (1, 2):
        layout = Layout(gpus=2, pp=2, chunks=chunks)
        stages = [count(work, layout, stage) for stage in range(2)]
        assert (sum(one.total for one in stages), sum(one.trained for one in stages)) == (whole, trained)
    split = [entry for entry in table if entry.layout != "replicated"]
    expected = whole - sum(math.prod(entry.shape) for entry in split) * 3 // 4
    assert count(work, Layout(gpus=4, tp=4)).total == expected


def test_the_optimizer_is_shared_by_data_parallel_ranks():
    """18 bytes a parameter in bfloat16 on one rank, 6 + 12 / W on W (Megatron's distributed optimizer)."""
    work = workload()
    for ranks in (1, 8, 64):
        held = sum(memory.static(work, Layout(gpus=ranks), 0).values())
        assert held == pytest.approx(7.851e9 * (6 + 12 / ranks), rel=1e-3)
    plain = memory.static(work, Layout(gpus=8, distributed_optimizer=False), 0)
    assert plain["optimizer"] == pytest.approx(12 * 7.851e9, rel=1e-3)
    averaged = memory.static(workload(averages=True), Layout(gpus=8), 0)
    assert averaged["optimizer"] == pytest.approx((12 + 4) / 8 * 7.851e9, rel=1e-3)
    frozen = memory.static(workload(lora=LoraConfig(rank=16)), Layout(gpus=1), 0)
    assert frozen["weights"] == pytest.approx(2 * (7.851e9 + 42e6), rel=1e-3)
    assert frozen["gradients"] == pytest.approx(4 * 0.782e9, rel=1e-2)


def test_a_layer_keeps_34_times_its_width_a_token():
    """Megatron's formula: 34 H bytes with a feed-forward of 3.5 H and a quarter of the keys."""
    work, layout = workload(), Layout(gpus=1)
    shape = activations.shape_of(work, layout, np.full(8, 512))
    assert activations.layer(work, layout, shape) / shape.tokens == pytest.approx(34 * 4096, rel=0.01)
    split = Layout(gpus=8, tp=8)
    assert activations.layer(work, split, activations.shape_of(work, split, np.full(8, 512))) == pytest.approx(
        activations.layer(work, layout, shape) / 8
    )
    local = workload(backend="local")
    assert activations.layer(local, layout, shape) > activations.layer(work, layout, shape)
    fp8 = workload(fp8="tensorwise")
    assert activations.layer(fp8, layout, shape) < activations.layer(work, layout, shape)


def test_only_gathered_keys_and_values_are_kept_whole():
    """Repeated for each head: 2 A d numbers of 2 bytes for each token of the other context-parallel ranks."""
    whole, shared = Layout(gpus=1), Layout(gpus=4, cp=4)

    def kept(layout: Layout, **changes) -> float:
        work = workload(**changes)
        return activations.layer(work, layout, activations.shape_of(work, layout, np.full(8, 512)))

    assert kept(shared) == pytest.approx(kept(whole) / 4)
    others = 3 / 4 * 8 * 512
    more = kept(shared, backend="local") - kept(whole, backend="local") / 4
    assert more == pytest.approx(2 * 2 * 32 * 128 * others)


def test_fp8_weights_stand_beside_the_others():
    assert memory.fp8_copies(workload(), Layout(gpus=1), 0) == 0
    assert memory.fp8_copies(workload(fp8="delayed"), Layout(gpus=1), 0) == 2 * 32 * 218_103_808
    assert memory.fp8_copies(workload(fp8="delayed"), Layout(gpus=4, tp=2, pp=2), 1) == 32 * 218_103_808 / 2


def test_what_does_not_fit_one_gpu_fits_with_ranks_stages_or_caching():
    """1,152 texts of 512 tokens in full: 2.6 TB of graphs on one GPU, 66 GB on 64 with a tenth of the tokens."""
    h200, work = cluster("h200"), workload()

    def needed(**layout) -> float:
        return sum(memory.memory_of(work, Layout(**layout), h200).values())

    assert needed(gpus=1, way="retain") > 2.6e12
    assert needed(gpus=8, way="cached") < needed(gpus=8, way="retain") / 3
    assert needed(gpus=64, way="single", tokens_per_microbatch=10**6) < h200.device.memory_bytes
    assert needed(gpus=8, tp=2, way="cached") < needed(gpus=8, way="cached")
    assert memory.memory_of(work, Layout(gpus=1), h200)["fragmentation"] > 0


def test_earlier_stages_keep_more_packs():
    work = workload(queries=512)
    layout = Layout(gpus=4, pp=4, way="cached")
    first, last = (memory.rank_memory(work, layout, stage)["activations"] for stage in (0, 2))
    assert first == pytest.approx(2 * last, rel=0.1)
    interleaved = dataclasses.replace(layout, chunks=2)
    # Of eight layers a stage, four packs; of four a chunk, six to warm up, four more, and one at work.
    assert memory.rank_memory(work, interleaved, 0)["activations"] == pytest.approx(first * 11 / 8, rel=0.1)


def test_balance_is_that_of_the_trainers_plan():
    random = np.random.default_rng(0)
    lengths = random.integers(10, 512, (2, 1152))
    work, layout = workload(lengths=lengths, fp8="delayed"), Layout(gpus=8, tokens_per_microbatch=8192)
    found = balance.balance_of(work, layout)
    plans = [make_plan(one, 8, 8192) for one in lengths]
    tokens = [plan.tokens_per_rank(one) for plan, one in zip(plans, lengths, strict=True)]
    assert found.imbalance == pytest.approx(np.mean([one.max() / one.mean() for one in tokens]))
    assert found.microbatches == np.mean([plan.max_microbatches for plan in plans])
    assert 0 < found.padding < 16 * 8 / 8192 * 1.5
    assert all(pack % 16 == 0 for packs in found.fullest for pack in packs)
    alone = balance.balance_of(work, Layout(gpus=2048, tokens_per_microbatch=8192))
    assert alone.empty_ranks == 2048 - 1152 and alone.imbalance > 1.5


def test_a_pack_of_context_parallel_ranks_is_filled_for_all_of_them():
    assert balance.filled_tokens(np.array([7, 8]), 1, 1) == 15
    assert balance.filled_tokens(np.array([7, 9]), 1, 2) == 8 + 12
    assert balance.filled_tokens(np.array([], dtype=np.int64), 16, 1) == 16
