"""`nvembed doctor`: what it says of this machine is what a run does; warnings by facts that are made up."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import json
import sys

import pytest
import torch
import yaml

from nvembed_mcore import doctor, installed, resume
from nvembed_mcore.cli import main
from nvembed_mcore.cli.run_config import read_run_config
from nvembed_mcore.config import ConfigError, ModelConfig, OptimConfig, ParallelConfig, PrecisionConfig
from nvembed_mcore.device import Gpu
from nvembed_mcore.doctor import Settings, examine, paths_of, warnings_of
from nvembed_mcore.installed import Installed
from nvembed_mcore.model import fp8_attention
from nvembed_mcore.model.backend import Backend
from tests.helpers.models import tiny_config
from tests.helpers.runs import run_config

of_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="of a host without a CUDA device")
H200 = Gpu("NVIDIA H200", (9, 0), 150_000_000_000)
WELL = Installed(
    python="3.12.1",
    torch="2.11.0+cu130",
    cuda_build="13.0",
    cudnn=(9, 19, 0),
    nccl="2.28.9",
    devices=[H200] * 8,
    driver="580.82.07",
    packages={name: "1.0" for name in ("transformer-engine", "transformer-engine-torch", "psutil")},
    apex="none",
)


def warned(parallel: ParallelConfig | None = None, environment: dict | None = None, **changes) -> list[str]:
    return list(warnings_of(dataclasses.replace(WELL, **changes), parallel or ParallelConfig(), environment or {}))


@pytest.fixture
def config(tmp_path):
    """A file whose run could start here: the doctor looks at paths, not into the files."""
    (tmp_path / "train.jsonl").touch()
    for name in ("tokenizer", "beir"):
        (tmp_path / name).mkdir()
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict()), encoding="utf-8")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(resume.plain(run_config(tmp_path, tmp_path / "run"))), encoding="utf-8")
    return str(file)


@of_a_cpu
def test_of_this_machine(capsys, tmp_path):
    assert main(["doctor", "--json", str(tmp_path / "found.json")]) == 0
    said = capsys.readouterr().out
    assert said.endswith("doctor: a run can start here\n") and "doctor: warning" not in said
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["found: torch"] == f"{torch.__version__}, for CPUs" and found["found: GPUs"] == "none"
    assert found["found: megatron-core"].startswith("0.16") and found["refusal"] == "" and found["warnings"] == []
    expected = {
        "layers": ("Megatron's local layers", "there is no CUDA device"),
        "weights": ("float32", "on cpu"),
        "norms": ("torch", "Apex: there is no CUDA device"),
        "FP8 mxfp8": ("emulated only", "there is no CUDA device"),
        "attention": ("torch, padded buckets of similar length", "attention to a pack as it is needs a CUDA device"),
        "optimizer": ("torch's fused AdamW", "there is no CUDA device"),
        "loss": ("torch", "the kernel needs a CUDA device"),
        "pooling head": ("torch", "the kernels need a CUDA device"),
        "architecture": ("32 layers of width 4096", "Mistral-7B's, for no configuration is given"),
        "FP8 attention": ("off", "precision.fp8_attention is off; the layers are Megatron's local layers"),
        "exchange": ("gloo", "objects and checkpoints travel over gloo"),
        "gradients": ("reduced between the passes", "parallel.overlap_grad_reduce is false"),
    }
    for part, (choice, why) in expected.items():
        assert (found[f"path: {part}"], found[f"why: {part}"]) == (choice, why)


@of_a_cpu
def test_with_a_configuration(capsys, config):
    lora = ["--model.lora.rank", "4", "--parallel.overlap_grad_reduce", "true", "--precision.fp8", "tensorwise"]
    assert main(["doctor", config, *lora]) == 0
    said = capsys.readouterr().out
    for words in (
        "adapters of rank 4 and the head",
        "reduced while the backward pass runs",
        "FP8 tensorwise, emulated",
    ):
        assert words in said


@of_a_cpu
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--model.backend", "transformer_engine"],
            "model.backend is transformer_engine, but there is no CUDA device",
        ),
        (["--parallel.tp", "3"], "parallel.tp = 3 does not divide the model's num_attention_heads"),
        (["--data.tokenizer", "nowhere"], "data.tokenizer: there is no nowhere"),
        (["--optim.lr", "-1"], "optim.lr must be above 0, got -1"),
    ],
)
def test_what_cannot_run_here(capsys, config, options, words):
    assert main(["doctor", config, *options]) == 78
    said = capsys.readouterr().out
    assert f"doctor: cannot run: {words}" in said.replace("\n", " ") or words in said
    assert "megatron-core" in said, "what is installed is told all the same"


@of_a_cpu
def test_a_configuration_whose_files_are_elsewhere(config):
    """As the recipes of a fresh checkout: what is missing is told, and who would compute."""
    options = [
        "--model.config",
        "nowhere",
        "--data.tokenizer",
        "nowhere",
        "--model.lora.rank",
        "4",
        "--parallel.cp",
        "2",
    ]
    found = examine(lambda: read_run_config([config, *options]))
    assert found.refusal == "data.tokenizer: there is no nowhere\nmodel.config: there is no nowhere"
    parts = {one.part: one for one in found.paths}
    assert parts["architecture"].why == "Mistral-7B's, for there is no nowhere"
    assert parts["trained"].why == "model.lora.rank is 4"
    assert parts["attention"].choice.endswith("keys and values gathered from 2 ranks")


def test_sizes_that_fp8_does_not_take(monkeypatch):
    """The encoder refuses them, too."""
    monkeypatch.setattr(doctor, "choose", lambda *_: Backend("transformer_engine", torch.bfloat16, "delayed"))
    with pytest.raises(ConfigError, match="precision.fp8 is 'delayed', which needs multiples of 16, but the model's"):
        list(paths_of(Settings(architecture=tiny_config(hidden_size=24))))


@pytest.mark.parametrize(
    ("asked", "missing", "attention", "in_fp8"),
    [
        ("off", "", "TransformerEngine, packed", "off"),
        ("on", "", "TransformerEngine in FP8, padded buckets of similar length", "on"),
        (
            "auto",
            "",
            "TransformerEngine, packed or in FP8 over padded buckets: measured when a run starts",
            "auto",
        ),
        ("auto", "it needs cuDNN 9.7 or later", "TransformerEngine, packed", "off"),
    ],
)
def test_attention_of_transformer_engine(monkeypatch, asked, missing, attention, in_fp8):
    """On a machine that has it, which is made up."""
    backend = Backend("transformer_engine", torch.bfloat16, "delayed", asked)
    monkeypatch.setattr(doctor, "choose", lambda *_: backend)
    monkeypatch.setattr(fp8_attention, "missing", lambda _: missing)
    found = {
        one.part: one for one in paths_of(Settings(precision=PrecisionConfig(fp8="delayed", fp8_attention=asked)))
    }
    assert found["attention"].choice == attention and found["FP8 attention"].choice == in_fp8
    assert found["FP8 attention"].why == f"precision.fp8_attention is {asked}; {missing or 'it can be here'}"
    assert found["rotary positions"].choice == "TransformerEngine, one kernel"


def test_a_megatron_that_cannot_be_imported(monkeypatch):
    """As where TransformerEngine is half installed, which it does not foresee."""

    class Broken:
        def find_spec(self, name, *_):
            if name == "nvembed_mcore.optim":
                raise AssertionError("Could not find `transformer-engine`.")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "nvembed_mcore.optim", raising=False)
    monkeypatch.delattr("nvembed_mcore.optim", raising=False)
    found = examine()
    assert found.refusal == (
        "Megatron-Core or another library cannot be imported: AssertionError: Could not find `transformer-engine`."
    )
    assert not found.paths and found.found["Python"]


def test_paths_follow_the_configuration():
    parallel = ParallelConfig(overlap_grad_reduce=True, overlap_param_gather=True)
    settings = Settings(ModelConfig(config="", backend="local"), PrecisionConfig(dtype="bfloat16"), parallel)
    found = {one.part: one for one in paths_of(settings)}
    assert found["layers"].why == "model.backend is local" and found["weights"].choice == "bfloat16"
    assert found["new weights"].choice == "gathered while the next forward pass runs"
    plain = Settings(optim=OptimConfig(distributed=False))
    found = {one.part: one.choice for one in paths_of(plain)}
    assert found["optimizer's state"] == "whole on every rank" and "new weights" not in found
    with pytest.raises(ConfigError, match="precision.fp8_attention is 'on'"):
        list(paths_of(Settings(ModelConfig(config="", backend="local"), ON)))


ON = PrecisionConfig(fp8="delayed", fp8_attention="on")


def test_a_well_kept_machine_has_no_warning():
    assert warned() == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(devices=[]), "built for CUDA 13.0, but no device can be used (driver: 580.82.07)"),
        (dict(devices=[], environment={"CUDA_VISIBLE_DEVICES": ""}), "(CUDA_VISIBLE_DEVICES is '')"),
        (dict(cuda_build=None, devices=[]), "an NVIDIA driver (580.82.07), but torch is built for CPUs"),
        (dict(apex="another package"), "`apex` of the Python index is installed"),
        (dict(apex="without kernels"), "Apex is installed without its kernels"),
        (dict(cudnn=(9, 10, 0)), "cuDNN 9.10.0"),
        (dict(packages={}), "psutil is not installed"),
        (dict(packages={"transformer-engine-cu13": "2", "psutil": "7"}), "without transformer-engine, transformer-"),
        (
            dict(packages={"transformer-engine": "2", "transformer-engine-torch": "3", "psutil": "7"}),
            "different versions",
        ),
        (dict(parallel=ParallelConfig(tp=2)), "CUDA_DEVICE_MAX_CONNECTIONS is None, with parallel.tp = 2 and"),
        (dict(parallel=ParallelConfig(cp=4)), "with parallel.tp = 1 and parallel.cp = 4"),
        (
            dict(parallel=ParallelConfig(overlap_grad_reduce=True), environment={"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
            "CUDA_DEVICE_MAX_CONNECTIONS is 1, with parallel.tp = parallel.cp = 1",
        ),
        (dict(environment={"NCCL_P2P_DISABLE": "1"}), "NCCL_P2P_DISABLE is 1: GPUs of a node exchange through"),
        (dict(environment={"NCCL_DEBUG": "INFO"}), "NCCL_DEBUG is INFO"),
        (dict(environment={"NVTE_FUSED_ATTN": "0"}), "NVTE_FUSED_ATTN is 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_commonly_goes_wrong(changes, words):
    (found,) = warned(**changes)
    assert words in found


def test_settings_that_are_well():
    well = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_DEBUG": "WARN", "NVTE_FUSED_ATTN": "1"}
    assert warned(ParallelConfig(tp=2), well) == []
    assert warned(ParallelConfig(tp=2), {}, devices=[], cuda_build=None, driver="") == [], (
        "nothing of GPUs without one"
    )


def test_which_apex(monkeypatch, tmp_path):
    """By folders: nothing is imported, for the other package does not even import everywhere."""
    places = {}

    def find_spec(name):
        if name not in places:
            return None
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(places[name])]
        return spec

    monkeypatch.setattr(installed.importlib.util, "find_spec", find_spec)
    assert installed._apex() == "none"
    places["apex"] = tmp_path
    assert installed._apex() == "another package"
    (tmp_path / "optimizers").mkdir()
    (tmp_path / "optimizers" / "fused_adam.py").touch()
    assert installed._apex() == "without kernels"
    places |= {"amp_C": tmp_path, "fused_layer_norm_cuda": tmp_path}
    assert installed._apex() == "with kernels"


def test_versions_in_words():
    assert [installed._cudnn(number) for number in (None, 8907, 91002, 91900)] == [
        None,
        (8, 9, 7),
        (9, 10, 2),
        (9, 19, 0),
    ]
    lines = WELL.lines()
    assert lines["GPUs"] == "8 x NVIDIA H200, compute capability 9.0, 140 GiB"
    assert lines["torch"] == "2.11.0+cu130, for CUDA 13.0" and lines["cuDNN"] == "9.19.0"
    assert lines["triton"] == "not installed" and lines["Apex (NVIDIA's)"] == "not installed"


def test_every_answer_has_a_name_of_its_own():
    names = [one.part for one in paths_of(Settings())]
    assert len(set(names)) == len(names) > 15
