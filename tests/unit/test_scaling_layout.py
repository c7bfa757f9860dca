"""Sizes of a backbone, layouts and the data files of devices, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nvembed_mcore.config import ConfigError
from nvembed_mcore.scaling import hardware
from nvembed_mcore.scaling.architecture import Architecture
from nvembed_mcore.scaling.layout import Layout

MISTRAL = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def test_sizes_are_read_from_a_config_and_from_an_nv_embed_folder(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(MISTRAL))
    plain = Architecture.read(file)
    assert plain.head_dim == 128 and plain.gated_mlp
    file.write_text(json.dumps({"text_config": MISTRAL | {"head_dim": 64}}))
    assert Architecture.read(tmp_path).head_dim == 64


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "cannot read"),
        ("[]", "must hold an object"),
        (json.dumps(MISTRAL | {"hidden_size": "4096"}), "hidden_size must be a whole number"),
        (json.dumps({"vocab_size": 3}), "hidden_size must be a whole number of at least 1, got None"),
        (json.dumps(MISTRAL | {"num_key_value_heads": 5}), "num_key_value_heads 5 does not divide"),
    ],
)
def test_a_bad_config_is_refused_with_its_name(tmp_path, text, says):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says) as error:
        Architecture.read(file)
    assert str(file) in str(error.value)


def test_no_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no Hugging Face config.json"):
        Architecture.read(tmp_path / "absent")


def test_data_parallel_size_is_what_the_others_leave():
    assert Layout(gpus=64, tp=2, pp=4, cp=2).dp == 4
    with pytest.raises(ConfigError, match="12 GPUs are no multiple of tp 8 x pp 1 x cp 1"):
        Layout(gpus=12, tp=8)
    with pytest.raises(ConfigError, match="way 'retain' keeps graphs"):
        Layout(gpus=8, pp=2, way="retain")


@pytest.mark.parametrize(
    ("values", "stages"),
    [
        ({}, [[8], [8], [8], [8]]),
        ({"chunks": 2}, [[4, 4], [4, 4], [4, 4], [4, 4]]),
        ({"layers_in_last_stage": 5}, [[9], [9], [9], [5]]),
        ({"layers_in_first_stage": 7, "layers_in_last_stage": 5}, [[7], [10], [10], [5]]),
        ({"layers_in_first_stage": 8, "layers_in_last_stage": 4, "chunks": 2}, [[4, 4], [5, 5], [5, 5], [2, 2]]),
    ],
)
def test_stages_follow_megatrons_rule(values, stages):
    assert Layout(gpus=4, pp=4, **values).stages(32) == stages


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"layers_in_last_stage": 4}, "leave 28 of the model's num_hidden_layers = 32 to the 3 other"),
        ({"chunks": 3}, "parallel.pp = 4 times chunks_per_stage = 3 does not divide"),
        ({"layers_in_first_stage": 20, "layers_in_last_stage": 20}, "leave -8 of"),
    ],
)
def test_layers_that_cannot_be_split_are_refused(values, says):
    with pytest.raises(ConfigError, match=says):
        Layout(gpus=4, pp=4, **values).stages(32)


def test_one_stage_has_all_layers():
    assert Layout(gpus=1, layers_in_last_stage=3).stages(32) == [[32]]


@pytest.mark.parametrize("name", ["a100", "h100", "h200", "b200", "cpu"])
def test_every_device_is_complete_and_its_constants_have_a_range(name):
    found = hardware.cluster(name)
    assert found.device.matmul_flops.keys() == found.device.peak_flops.keys()
    assert all(found.device.matmul_flops[dtype] <= peak for dtype, peak in found.device.peak_flops.items())
    assert all(one.low <= one.value <= one.high for one in vars(found.constants).values())
    assert found.inter_node.latency >= found.intra_node.latency > 0


def test_an_unknown_device_is_refused():
    with pytest.raises(ConfigError, match="no device 'h300'; there are a100, b200, cpu, h100, h200"):
        hardware.cluster("h300")


def test_other_constants_leave_the_cluster_alone():
    plain = hardware.cluster("h200")
    assert plain.with_constants(matmul_half=7.0).constants.matmul_half.value == 7.0
    assert plain == hardware.cluster("h200")


def test_planning_loads_neither_torch_nor_megatron():
    """A plan must answer within seconds, and torch alone takes one to import."""
    folder = Path(hardware.__file__).parent
    modules = sorted(path.stem for path in folder.glob("*.py") if path.stem not in ("__init__", "dry_run"))
    assert {"plan", "predict", "hardware"} <= set(modules)
    code = "; ".join(f"import nvembed_mcore.scaling.{name}" for name in modules)
    code += "; import nvembed_mcore.cli.plan, sys"
    code += "; print([one for one in ('torch', 'megatron', 'transformers') if one in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
