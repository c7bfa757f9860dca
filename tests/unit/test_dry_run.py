"""`nvembed plan --dry-run`: a run of any size on one process; what cannot work is refused as `train` refuses it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from nvembed_mcore.cli import main
from nvembed_mcore.config import LoraConfig, ParallelConfig, PoolingConfig, PrecisionConfig
from tests.helpers import runs
from tests.helpers.models import tiny_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Nine queries a step, and everything that the run reads; more layers and heads than elsewhere, to be split."""
    folder = runs.write_inputs(tmp_path_factory.mktemp("inputs"), with_words=True)
    architecture = tiny_config(
        vocab_size=80, hidden_size=64, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=8
    )
    (folder / "config.json").write_text(json.dumps(architecture.to_dict()), encoding="utf-8")
    return runs.write_config(runs.run_config(folder, folder / "run"))


def plan(config, *options: str) -> int:
    return main(["plan", str(config), "--dry-run", *options])


def test_a_run_of_a_thousand_processes(capsys, config, tmp_path):
    file = tmp_path / "found.json"
    layout = ["--parallel.tp", "4", "--parallel.pp", "4", "--parallel.layers_in_first_stage", "4"]
    layout += ["--parallel.layers_in_last_stage", "2"]
    assert plan(config, "--gpus", "1024", *layout, "--json", str(file)) == 0
    output = capsys.readouterr().out
    assert "1,024 processes (tp 4, pp 4, cp 1, dp 64); layers of the stages: 4, 2 x 3, 2" in output
    found = json.loads(file.read_text())
    ranks = {one["rank"]: one for one in found["ranks"]}
    assert [*ranks] == [0, 256, 512, 768, 1023]
    assert ranks[1023]["place"] == {"tp": 3, "pp": 3, "cp": 0, "dp": 63}
    assert ranks[256]["groups"]["tp"] == [256, 257, 258, 259] and ranks[256]["groups"]["pp"] == [0, 256, 512, 768]
    assert ranks[256]["groups"]["dp"] == [*range(256, 512, 4)]
    assert [one["layers"] for one in ranks.values()][:4] == [[[0, 1, 2, 3]], [[4, 5, 6]], [[7, 8, 9]], [[10, 11]]]
    packing = found["packing"]
    assert (packing["source"], packing["steps"], packing["steps_with_idle_ranks"]) == ("the run's own batches", 8, 8)
    assert packing["emptiest"] == 0 and packing["ranks_without_text"] >= 64 - packing["texts"]
    assert any("of the 64 data-parallel ranks have no text" in warning for warning in found["warnings"])
    assert " ".join(output.split()).count("have no text") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpus", "1000", "--parallel.tp", "16"], ["parallel.tp", "= 16 does not divide the 1000 process"]),
        (["--gpus", "1024", "--parallel.tp", "16"], ["parallel.tp = 16", "num_key_value_heads = 8"]),
        (["--gpus", "1280", "--parallel.pp", "5"], ["parallel.pp = 5", "num_hidden_layers = 12"]),
        (["--gpus", "1024", "--parallel.pp", "2", "--step.way", "retain"], ["step.way 'retain'", "parallel.pp is 2"]),
        (["--gpus", "1", "--step.way", "single"], ["needs one pack a rank, but the batch of step 1 needs"]),
        (
            ["--gpus", "1024", "--precision.fp8", "blockwise", "--parallel.tp", "8"],
            ["multiples of 16", "tensor rank is 8"],
        ),
        (["--gpus", "1024", "--loss.matryoshka_dims", "[64]"], ["loss.matryoshka_dims", "hidden_size 64"]),
        (["--gpus", "8", "--batch_size", "41"], ["batch_size must be between 1 and the 40 records", "got 41"]),
        (["--gpus", "1024", "--ranks", "7,1024"], ["ranks 0 to 1023, got 1024"]),
        (["--gpus", "8,16"], ["one size", "--gpus 8,16"]),
        (["--gpus", "8", "--device", "cpu", "--model.backend", "transformer_engine"], ["no CUDA device"]),
        (
            ["--gpus", "8", "--precision.fp8", "delayed", "--precision.fp8_attention", "on"],
            ["precision.fp8_attention is 'on'", "width 128, the model's have 8"],
        ),
    ],
)
def test_what_cannot_work(capsys, config, options, words):
    assert plan(config, *options) == 78
    message = capsys.readouterr().err
    assert message.count("error:") == 1 and "Traceback" not in message
    for word in words:
        assert word in message, message


def test_a_vocabulary_that_is_too_small(capsys, config, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tiny_config(vocab_size=20).to_dict()), encoding="utf-8")
    assert plan(config, "--gpus", "8", "--architecture", str(file)) == 78
    assert "the model's vocab_size is 20" in capsys.readouterr().err


def test_without_the_files_of_the_run(capsys, config):
    """They may be on the cluster only."""
    assert plan(config, "--gpus", "8", "--data.tokenizer", "elsewhere") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "data.tokenizer elsewhere is not on this machine, so the run's own batches are not planned" in output


def test_better_stages_are_proposed(config):
    from nvembed_mcore.cli.run_config import read_run_config
    from nvembed_mcore.scaling.dry_run import dry_run

    # A head of 12 times the usual width.
    config = read_run_config([str(config), "--parallel.pp", "4", "--model.pooling.head_width", "1024"])
    run = dry_run(config, 4)
    (warning,) = [one for one in run.warnings if "layers_in_first_stage" in one]
    first, last = (int(word) for word in warning.split("layers_in_last_stage ")[1].replace(" and", "").split()[:2])
    parallel = dataclasses.replace(config.parallel, layers_in_first_stage=first, layers_in_last_stage=last)
    better = dry_run(dataclasses.replace(config, parallel=parallel), 4)
    assert better.stages[-1] < 3 and not [one for one in better.warnings if "layers_in_first_stage" in one]


RECIPE = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8)


@pytest.mark.parametrize("lora", [0, 16])
def test_the_plan_counts_what_would_be_built(config, lora):
    """NV-Embed's sizes on 4,608 processes: 36 layers in twelve stages, of tensors that no machine here could hold."""
    from nvembed_mcore.cli.run_config import read_run_config
    from nvembed_mcore.scaling.architecture import Architecture
    from nvembed_mcore.scaling.dry_run import dry_run
    from nvembed_mcore.scaling.layout import Layout
    from nvembed_mcore.scaling.memory import static
    from nvembed_mcore.scaling.parameters import parameters_of
    from nvembed_mcore.scaling.workload import Lengths, Workload

    config = read_run_config([str(config)])
    model = dataclasses.replace(config.model, pooling=PoolingConfig(), lora=LoraConfig(rank=lora))
    parallel = ParallelConfig(tp=8, pp=12, layers_in_last_stage=3, overlap_grad_reduce=True)
    config = dataclasses.replace(config, model=model, parallel=parallel, precision=PrecisionConfig(dtype="bfloat16"))
    hf_config = tiny_config(vocab_size=32000, num_hidden_layers=36, head_dim=128, **RECIPE)
    ranks = [0, 384, 4607]
    run = dry_run(config, 4608, hf_config=hf_config, ranks=ranks)
    nothing = Lengths(np.ones((1, 1), np.int64), np.zeros((1, 1), np.int64), np.zeros((1, 1), bool), "none")
    workload = Workload.of(config, Architecture.of(hf_config.to_dict()), nothing)
    layout = Layout.of(config, 4608)
    for rank in run.ranks:
        counts = parameters_of(workload, layout, rank.place["pp"]).values()
        assert rank.trained == sum(one.trained for one in counts)
        assert rank.frozen == sum(one.total - one.trained for one in counts)
        held = static(workload, layout, rank.place["pp"])
        assert (rank.weights, rank.gradients) == (held["weights"], held["gradients"])
