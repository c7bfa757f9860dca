"""Names of groups and sizes that a step's traffic must have; tests/distributed/test_scaling.py counts real ones."""

from __future__ import annotations

import pytest

from nvembed_mcore.config import LoraConfig
from nvembed_mcore.scaling.layout import Layout
from nvembed_mcore.scaling.traffic import group_of, traffic_of
from tests.unit.test_scaling_memory import workload


def test_groups_of_the_same_ranks_have_the_first_name():
    one = Layout(gpus=8, tp=8)
    assert group_of(one, "tp") == group_of(one, "tp", "pp") == "tensor"
    assert group_of(one, "dp") is None
    both = Layout(gpus=8, tp=2, cp=2)
    assert group_of(both, "dp", "cp") == "data and context" and group_of(both, "dp", "tp", "pp", "cp") == "all"


def test_full_fine_tuning_reduces_four_bytes_a_parameter_and_gathers_two():
    found = traffic_of(workload(), Layout(gpus=8))
    assert found["reduce_scatter", "data"] == pytest.approx(4 * 7.851e9, rel=1e-3)
    gathered = 2 * 7.851e9 / 8
    embeddings = 4 * 4096 * 1152 / 8
    assert found["all_gather", "data"] == pytest.approx(gathered + embeddings, rel=1e-3)
    adapted = traffic_of(workload(lora=LoraConfig(rank=16)), Layout(gpus=8))
    assert adapted["reduce_scatter", "data"] == pytest.approx(4 * 0.782e9, rel=1e-2)


def test_sequence_parallelism_moves_what_all_reduces_would():
    """A ring's all-reduce is a reduce-scatter and an all-gather: so are the bytes that enter it."""
    work = workload(queries=8, lora=LoraConfig(rank=16, targets=["q"]))
    split, whole = (traffic_of(work, Layout(gpus=2, tp=2, sequence_parallel=on, way="single")) for on in (True, False))
    assert split["reduce_scatter", "tensor"] == pytest.approx(whole["all_reduce", "tensor"], rel=0.05)
    assert split["all_gather", "tensor"] == pytest.approx(split["reduce_scatter", "tensor"] / 2, rel=0.05)


def test_stages_send_hidden_states_twice_and_gradients_once():
    work, layout = workload(queries=64), Layout(gpus=4, pp=4, way="cached")
    first, middle, last = (traffic_of(work, layout, stage)["send", "pipeline"] for stage in (0, 1, 3))
    assert first == pytest.approx(2 * 2 * 64 * 9 * 512 * 4096, rel=1e-3)
    assert middle == pytest.approx(first * 1.5) and last == pytest.approx(first / 2)
