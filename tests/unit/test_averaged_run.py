"""A run that averages its weights is evaluated, exported and gone on from with the average."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import MistralConfig

from nvembed_mcore.checkpoint import store
from nvembed_mcore.checkpoint.adapters import merged
from nvembed_mcore.checkpoint.folders import folder_of, name_of
from nvembed_mcore.checkpoint.names import Entry, name_table, to_hf
from nvembed_mcore.cli import main
from nvembed_mcore.config import CheckpointConfig, LoraConfig, ModelConfig, PoolingConfig
from nvembed_mcore.ema import decay_of
from nvembed_mcore.evaluation.encode import RetrievalEvaluation
from nvembed_mcore.log import read_metrics
from nvembed_mcore.train import train
from tests.helpers import runs

DECAY, STEPS = 0.9, 4
WEIGHT = "decoder.layers.0.mlp.linear_fc2.weight"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return runs.write_inputs(tmp_path_factory.mktemp("inputs"), with_words=True)


def configured(inputs: Path, run_dir: Path, decay: float | None = DECAY, lora: int = 0):
    """Four steps, each of them saved."""
    config = runs.run_config(inputs, run_dir, steps=STEPS, batch_size=4)
    return dataclasses.replace(
        config,
        checkpoint=CheckpointConfig(every_steps=1, keep=9),
        model=dataclasses.replace(config.model, lora=LoraConfig(rank=lora)),
        optim=dataclasses.replace(config.optim, ema_decay=decay),
    )


@pytest.fixture(scope="module")
def seen() -> list[torch.Tensor]:
    """A weight of the model at each evaluation of `run`."""
    return []


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory, seen):
    folder = tmp_path_factory.mktemp("run")
    evaluate = RetrievalEvaluation.__call__

    def evaluate_and_look(self, chunks, *args):
        seen.append(chunks[0].module.parameters_by_global_name()[WEIGHT].detach().clone())
        return evaluate(self, chunks, *args)

    with mock.patch.object(RetrievalEvaluation, "__call__", evaluate_and_look):
        train(configured(inputs, folder))
    return folder


@pytest.fixture(scope="module")
def lora_run(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    train(configured(inputs, folder, lora=2))
    return folder


def entries_of(found: store.Checkpoint) -> tuple[list[Entry], MistralConfig, PoolingConfig, LoraConfig]:
    model = found.facts["config"]["model"]
    hf_config = MistralConfig.from_dict(found.facts["hf_config"])
    pooling, lora = PoolingConfig(**model["pooling"]), LoraConfig(**model["lora"])
    return name_table(hf_config, pooling, lora if lora.rank else None), hf_config, pooling, lora


def weights_of(folder: Path, weights: str | None = None) -> dict[str, torch.Tensor]:
    found = store.find_checkpoint(folder)
    read = store.open_weights(found, weights)
    return {entry.name: read(entry.name) for entry in entries_of(found)[0]}


def brute_force(folder: Path) -> dict[str, torch.Tensor]:
    """The average of the weights that the run saved after each step, in float64."""
    average = {}
    for step in range(1, STEPS + 1):
        decay = decay_of(DECAY, step) if average else 0.0
        for name, weight in weights_of(folder_of(folder) / name_of(step), "last").items():
            average[name] = decay * average.get(name, 0.0) + (1 - decay) * weight.double()
    return average


@pytest.mark.parametrize("which", ["run", "lora_run"])
def test_what_is_read_is_the_average_of_all_steps(request, which):
    folder = request.getfixturevalue(which)
    expected, found, last = brute_force(folder), weights_of(folder), weights_of(folder, "last")
    for name, weight in found.items():
        assert (weight.double() - expected[name]).abs().max() <= 2e-6 * max(1e-3, expected[name].abs().max()), name
    moved = {name for name, weight in found.items() if not torch.equal(weight, last[name])}
    trained = {name for name in found if which == "run" or "lora" in name or name.startswith("pooling.")}
    # A bias that no gradient moves, or a frozen weight, is its own average.
    assert moved <= trained and len(moved) > 0.9 * len(trained)


@pytest.mark.parametrize("which", ["run", "lora_run"])
def test_exports_hold_the_average_unless_asked_otherwise(request, tmp_path, capsys, which):
    folder = request.getfixturevalue(which)
    table, hf_config, pooling, lora = entries_of(store.find_checkpoint(folder))
    chosen = ([], None, "exponential moving average"), (["--weights", "last"], "last", "of the last step")
    for arguments, weights, words in chosen:
        output = tmp_path / str(weights)
        assert main(["export-hf", str(folder), str(output), *arguments]) == 0
        exported, read = load_file(output / "model.safetensors"), weights_of(folder, weights).__getitem__
        read = merged(read, hf_config, pooling, lora) if lora.rank else read
        for entry in (entry for entry in table if not entry.is_adapter):
            for name, tensor in to_hf(entry, read(entry.name)).items():
                assert torch.equal(exported[name], tensor), name
        card = (output / "README.md").read_text(encoding="utf-8")
        # What was evaluated is the average.
        assert f"| weights | {words} |" in card and ("ndcg_at_10" in card) == (weights is None)
    assert main(["inspect", str(folder)]) == 0
    assert "weights averaged, decay" in capsys.readouterr().out


def test_a_run_without_an_average_has_none_to_give(inputs, tmp_path, capsys):
    train(configured(inputs, tmp_path / "run", decay=None))
    assert not any("average" in name for name in store.stored_tensors(store.find_checkpoint(tmp_path / "run")))
    assert main(["export-hf", str(tmp_path / "run"), str(tmp_path / "out"), "--weights", "ema"]) == 78
    assert "has no averaged weights: its run has no optim.ema_decay" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_next_stage_begins_with_what_was_evaluated(inputs, run, seen, tmp_path):
    average, away = weights_of(run)[WEIGHT], weights_of(run, "last")[WEIGHT]
    assert torch.equal(seen[-1], average) and not torch.equal(average, away)
    config = configured(inputs, tmp_path / "next", decay=None)
    model = ModelConfig(init_from=str(run), pooling=config.model.pooling)
    train(dataclasses.replace(config, model=model, stage=2, steps=1))
    last = [line for line in read_metrics(run / "metrics.jsonl") if "loss" not in line][-1]
    first = read_metrics(tmp_path / "next" / "metrics.jsonl")[0]
    assert last["step"] == STEPS and first["step"] == 0
    assert {**last, "step": 0} == first
    found = weights_of(tmp_path / "next")[WEIGHT]
    assert (found - average).abs().max() < (found - away).abs().max()
