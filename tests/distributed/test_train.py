"""Whole runs on real processes: resuming, other layouts, the second stage, and the export of what they wrote."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from nvembed_mcore.checkpoint.store import find_checkpoint
from nvembed_mcore.config import LossConfig, ModelConfig, ParallelConfig
from nvembed_mcore.log import read_metrics
from nvembed_mcore.train import train
from tests.helpers import runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return runs.write_inputs(tmp_path_factory.mktemp("inputs"))


def losses(run_dir) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]


def evaluations(run_dir) -> list[dict]:
    return [line for line in read_metrics(run_dir / "metrics.jsonl") if "loss" not in line]


def layout(tp: int = 1, pp: int = 1, chunks: int = 1, cp: int = 1) -> ParallelConfig:
    return ParallelConfig(tp=tp, pp=pp, cp=cp, chunks_per_stage=chunks, timeout_minutes=2)


@pytest.fixture(scope="module")
def straight(world, inputs, tmp_path_factory):
    """Eight steps on two data-parallel ranks, which nobody interrupted."""
    run_dir = tmp_path_factory.mktemp("straight")
    world(2).run(train, runs.run_config(inputs, run_dir, parallel=layout()))
    return run_dir


def test_learns_logs_and_evaluates(straight):
    lines = read_metrics(straight / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [line["step"] for line in evaluations(straight)] == [0, 4, 8]
    for name in ("grad_norm", "lr", "real_tokens", "tokens_per_second", "padded_tokens_per_second", "pad_fraction"):
        assert steps[0][name] >= 0
    assert all(f"seconds_{phase}" in steps[0] for phase in ("data", "embed", "score", "backward", "optimizer"))
    assert (straight / "config.yaml").is_file()
    assert (straight / "logs" / "0001" / "rank-1.log").is_file()


@pytest.mark.parametrize(
    "size", [dict(tp=2), pytest.param(dict(pp=2), marks=pytest.mark.slow), dict(pp=2, chunks=2), dict(cp=2)], ids=str
)
def test_other_layouts_have_the_same_curve(world, inputs, straight, tmp_path, size):
    config = runs.run_config(inputs, tmp_path, parallel=layout(**size))
    world(2).run(train, dataclasses.replace(config, stop_at=5))
    np.testing.assert_allclose(losses(tmp_path), losses(straight)[:5], rtol=1e-4)
    # In the layout that wrote it a checkpoint goes on by bits, in another one within rounding.
    world(2).run(train, dataclasses.replace(config, parallel=layout()))
    np.testing.assert_allclose(losses(tmp_path), losses(straight), rtol=1e-4)


def test_a_learned_temperature_is_saved_and_goes_on_in_another_layout(world, inputs, tmp_path):
    loss = LossConfig(temperature=0.1, learn_temperature=True)
    config = runs.run_config(inputs, tmp_path / "straight", parallel=layout(), loss=loss, steps=5)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, path=None))
    world(2).run(train, config)
    expected = [line["temperature"] for line in read_metrics(tmp_path / "straight" / "metrics.jsonl")]
    assert expected[0] == pytest.approx(0.1) and len(set(expected)) == 5
    config = dataclasses.replace(config, run_dir=str(tmp_path / "again"))
    world(2).run(train, dataclasses.replace(config, stop_at=3))
    world(2).run(train, dataclasses.replace(config, parallel=layout(1, 2, 2)))
    found = [line["temperature"] for line in read_metrics(tmp_path / "again" / "metrics.jsonl")]
    assert found[:3] == expected[:3]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # The next stage goes on with it; one that learns a temperature after a stage that did not starts with its own.
    second = dataclasses.replace(config, run_dir=str(tmp_path / "second"), steps=1, parallel=layout(2))
    model = dataclasses.replace(config.model, config=None, init_from=str(tmp_path / "straight"))
    world(2).run(train, dataclasses.replace(second, model=model))
    (line,) = read_metrics(tmp_path / "second" / "metrics.jsonl")
    assert line["temperature"] == pytest.approx(expected[-1], rel=0.05) and line["temperature"] != pytest.approx(0.1)


def weights_of(run_dir) -> dict[str, torch.Tensor]:
    from nvembed_mcore.checkpoint.names import name_table
    from nvembed_mcore.checkpoint.store import open_weights
    from nvembed_mcore.config import PoolingConfig
    from nvembed_mcore.model.mistral import read_mistral_config
    from nvembed_mcore.parallel.groups import initialize

    initialize(layout())
    found = find_checkpoint(run_dir)
    read = open_weights(found)
    config = found.facts["config"]["model"]
    path = run_dir / "architecture.json"
    path.write_text(json.dumps(found.facts["hf_config"]))
    return {
        entry.name: read(entry.name)
        for entry in name_table(read_mistral_config(path), PoolingConfig(**config["pooling"]))
    }


def test_second_stage_begins_with_the_first_ones_weights(world, inputs, straight, tmp_path):
    first = runs.run_config(inputs, tmp_path)
    model = ModelConfig(init_from=str(straight), pooling=first.model.pooling)
    second = dataclasses.replace(first, model=model, stage=2, parallel=layout(2), steps=1)
    second = dataclasses.replace(second, optim=dataclasses.replace(second.optim, lr=1e-12, warmup_steps=0))
    world(2).run(train, second)
    (before,) = world(1).run(weights_of, straight)
    (after,) = world(1).run(weights_of, tmp_path)
    assert before.keys() == after.keys()
    for name in before:
        assert torch.allclose(before[name], after[name], atol=1e-9, rtol=1e-6), name


def exported_difference(run_dir, output, inputs) -> float:
    """Smallest cosine between the trainer's embeddings of the run's checkpoint and those of its export."""
    import json

    from nvembed_mcore.checkpoint.export_run import export_run
    from nvembed_mcore.checkpoint.hf_export import ExportError
    from nvembed_mcore.checkpoint.hf_load import load_exported
    from nvembed_mcore.checkpoint.store import load_weights
    from nvembed_mcore.data.prompts import query_prompt
    from nvembed_mcore.data.tokenizer import load_tokenizer
    from nvembed_mcore.evaluation.encode import tokenize
    from nvembed_mcore.model.encoder import Encoder, wrap_data_parallel
    from nvembed_mcore.model.mistral import read_mistral_config
    from nvembed_mcore.parallel.groups import initialize
    from nvembed_mcore.schedule import embed_texts

    export_run(str(run_dir), str(output), dtype="float32", instruction=None)
    with pytest.raises(ExportError, match="format 'mean' holds models with 'mean' pooling, this one has 'latent'"):
        export_run(str(run_dir), str(output) + "-mean", dtype="float32", instruction=None, format="mean")
    groups = initialize(layout())
    config = runs.run_config(inputs, run_dir)
    encoder = Encoder(read_mistral_config(config.model.config), config.model, config.parallel, groups)
    load_weights(find_checkpoint(run_dir), [encoder])
    chunks = wrap_data_parallel([encoder], config.parallel, distributed_optimizer=False)
    texts = [json.dumps(runs.record(i)) for i in range(12)]
    tokenizer = load_tokenizer(inputs / "tokenizer")
    exported = load_exported(output)
    worst = 1.0
    for instruction in ("", "Find it"):
        ours = embed_texts(chunks, groups, tokenize(tokenizer, texts, instruction, 32), 100)
        theirs = exported.encode(texts, query_prompt(instruction), max_length=32)
        worst = min(worst, (ours * theirs).sum(1).min().item())
    return worst


def test_export_embeds_as_the_trainer_does(world, inputs, straight, tmp_path):
    (cosine,) = world(1).run(exported_difference, straight, tmp_path / "export", inputs)
    assert cosine >= 0.99999


def run_command(arguments: list[str]) -> int:
    from nvembed_mcore.cli import main

    return main(arguments)


def test_bad_data_ends_every_rank(world, inputs, tmp_path):
    """What only rank 0 reads must not leave the others waiting."""
    import yaml

    (tmp_path / "bad.jsonl").write_text('{"query": "a", "pos": ["b"]}\n{"query": \n', encoding="utf-8")
    config = runs.run_config(inputs, tmp_path / "run")
    tree = dataclasses.asdict(config)
    tree["data"]["datasets"][0]["path"] = str(tmp_path / "bad.jsonl")
    tree["optim"]["betas"] = list(tree["optim"]["betas"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert world(2).run(run_command, ["train", str(tmp_path / "config.yaml")]) == [78, 78]
    assert world(2).run(run_command, ["train", str(tmp_path / "config.yaml"), "--parallel.tp", "4"]) == [78, 78]
