"""Low-rank adapters through whole runs: what trains, resuming, stages, merged exports, PEFT folders out and in."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralModel

from nvembed_mcore.checkpoint.store import find_checkpoint
from nvembed_mcore.config import LoraConfig, LossConfig, ParallelConfig, PoolingConfig, PrecisionConfig
from nvembed_mcore.log import read_metrics
from nvembed_mcore.train import train
from tests.helpers import cases, runs
from tests.helpers.grid import ALL_TARGETS

LORA = LoraConfig(rank=4, alpha=12.0, dropout=0.2)
TEXTS = [json.dumps(runs.record(i)) for i in range(8)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Inputs of a run, and a Hugging Face model to start from."""
    folder = runs.write_inputs(tmp_path_factory.mktemp("inputs"))
    torch.manual_seed(2)
    MistralModel(MistralConfig.from_dict(json.loads((folder / "config.json").read_text()))).save_pretrained(
        folder / "base"
    )
    shutil.copytree(folder / "tokenizer", folder / "base", dirs_exist_ok=True)
    return folder


def lora_run(inputs, run_dir, lora=LORA, kind="latent", init_from=None, layout=(1, 1), **changes):
    config = runs.run_config(inputs, run_dir, **{"steps": 4, "loss": LossConfig(temperature=0.1), **changes})
    pooling = dataclasses.replace(config.model.pooling, kind=kind)
    model = dataclasses.replace(
        config.model, config=None, init_from=str(init_from or inputs / "base"), pooling=pooling, lora=lora
    )
    return dataclasses.replace(
        config,
        model=model,
        eval=dataclasses.replace(config.eval, path=None),
        parallel=ParallelConfig(tp=layout[0], pp=layout[1], timeout_minutes=2),
        optim=dataclasses.replace(config.optim, lr=1e-2),
    )


def losses(run_dir) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def straight(world, inputs, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("straight")
    world(2).run(train, lora_run(inputs, run_dir))
    return run_dir


def weights_of(run_dir) -> dict[str, torch.Tensor]:
    """Global tensors of a run's newest checkpoint by our names."""
    from nvembed_mcore.checkpoint.names import name_table
    from nvembed_mcore.checkpoint.store import open_weights
    from nvembed_mcore.parallel.groups import initialize

    initialize(ParallelConfig(timeout_minutes=2))
    found = find_checkpoint(run_dir)
    model = found.facts["config"]["model"]
    pooling, lora = PoolingConfig(**model["pooling"]), LoraConfig(**model["lora"])
    table = name_table(MistralConfig.from_dict(found.facts["hf_config"]), pooling, lora if lora.rank else None)
    read = open_weights(found)
    return {entry.name: read(entry.name) for entry in table}


def test_only_adapters_and_the_head_train(world, inputs, straight):
    (weights,) = world(1).run(weights_of, straight)
    base = load_file(inputs / "base" / "model.safetensors")
    for ours, theirs in (("linear_proj", "self_attn.o_proj"), ("linear_fc2", "mlp.down_proj")):
        block = theirs.partition(".")[0].replace("self_attn", "self_attention")
        stored = base[f"layers.1.{theirs}.weight"]
        assert torch.equal(weights[f"decoder.layers.1.{block}.{ours}.weight"], stored)
    assert torch.equal(weights["decoder.final_layernorm.weight"], base["norm.weight"])
    adapters = {name: value for name, value in weights.items() if ".lora_" in name}
    assert len(adapters) == 4 * 7 * 2 and all(value.abs().max() > 0 for value in adapters.values())
    assert losses(straight)[-1] < losses(straight)[0]


def optimizer_and_trained(targets: tuple[str, ...]) -> tuple[int, int, set[str]]:
    """Numbers that the optimizer holds, numbers of adapters and head, and the parts that require a gradient."""
    step, _, table, parameters = cases.build_step(cases.Case(targets=targets, distributed=False))
    held = sum(p.numel() for group in step.optimizer.param_groups for p in group["params"])
    trained = sum(parameters[name].numel() for name, entry in table.items() if entry.part != "backbone")
    return held, trained, {table[name].part for name, p in parameters.items() if p.requires_grad}


def test_the_optimizer_holds_only_what_trains(world):
    ((held, trained, parts),) = world(1).run(optimizer_and_trained, ALL_TARGETS)
    assert held == trained and parts == {"adapters", "head"}


def test_other_layouts_have_the_same_curve(world, inputs, tmp_path):
    """Without dropout, which tensor ranks draw differently; from TP 2 to PP 2 after step 2."""
    lora = dataclasses.replace(LORA, dropout=0.0)
    world(2).run(train, lora_run(inputs, tmp_path / "plain", lora=lora))
    world(2).run(train, lora_run(inputs, tmp_path / "moved", lora=lora, layout=(2, 1), stop_at=2))
    world(2).run(train, lora_run(inputs, tmp_path / "moved", lora=lora, layout=(1, 2)))
    np.testing.assert_allclose(losses(tmp_path / "moved"), losses(tmp_path / "plain"), rtol=1e-4)


def test_the_dropout_of_a_run_is_on(world, inputs, straight, tmp_path):
    world(2).run(train, lora_run(inputs, tmp_path, lora=dataclasses.replace(LORA, dropout=0.0), stop_at=2))
    assert losses(tmp_path)[0] == losses(straight)[0], "B is still zero"
    assert losses(tmp_path)[1] != losses(straight)[1]


def drops(tp: int, sp: bool) -> dict[str, list[bool]]:
    """Which of 64 ones each adapter of the first layer drops on this rank."""
    case = cases.Case(world=2, tp=tp, sp=sp, targets=ALL_TARGETS, lora_dropout=0.5)
    step, *_ = cases.build_step(case)
    step._reseed(1, 0, 0)
    layer = step.chunks[0].module.decoder.layers[0].train()
    names = ("linear_qkv", "linear_proj")
    return {name: (layer.get_submodule(f"lora_{name}")._drop(torch.ones(64)) == 0).tolist() for name in names}


@pytest.mark.parametrize("sp", [False, True])
def test_tensor_ranks_drop_alike_what_they_both_hold(world, sp):
    first, second = world(2).run(drops, 2, sp)
    assert (first["linear_qkv"] == second["linear_qkv"]) == (not sp)
    assert first["linear_proj"] != second["linear_proj"]
    assert 10 < sum(first["linear_qkv"]) < 54


def trainer_embeddings(config, start) -> torch.Tensor:
    """float32 [len(TEXTS), H], as a run of `config` begins (`start` None) or as the checkpoint has it."""
    from nvembed_mcore.build import build_model, read_architecture
    from nvembed_mcore.checkpoint.store import load_weights
    from nvembed_mcore.data.tokenizer import load_tokenizer
    from nvembed_mcore.evaluation.encode import tokenize
    from nvembed_mcore.parallel.groups import initialize
    from nvembed_mcore.schedule import embed_texts

    groups = initialize(ParallelConfig(timeout_minutes=2))
    chunks = build_model(config, read_architecture(config.model), groups)
    if start:
        load_weights(find_checkpoint(start), [chunk.module for chunk in chunks])
    return embed_texts(chunks, groups, tokenize(load_tokenizer(config.data.tokenizer), TEXTS, "", 32), 200)


def refusal(config) -> str:
    """What building the model of a run says when it does not work."""
    try:
        trainer_embeddings(config, None)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def exported_embeddings(run_dir, output) -> torch.Tensor:
    from nvembed_mcore.checkpoint.export_run import export_run
    from nvembed_mcore.checkpoint.hf_load import load_exported

    export_run(str(run_dir), str(output), dtype="float32", instruction=None)
    return load_exported(output).encode(TEXTS, max_length=32)


def test_a_merged_export_is_the_unmerged_model_and_not_the_base(world, inputs, straight, tmp_path):
    config = lora_run(inputs, tmp_path / "unused")
    (unmerged,) = world(1).run(trainer_embeddings, config, straight)
    (merged,) = world(1).run(exported_embeddings, straight, tmp_path / "export")
    assert (unmerged - merged).abs().max() <= 1e-6
    base = load_file(inputs / "base" / "model.safetensors")
    stored = load_file(tmp_path / "export" / "model.safetensors")
    assert not any("lora" in name for name in stored)
    (weights,) = world(1).run(weights_of, straight)
    for name, layer in (("q_proj", "self_attn"), ("up_proj", "mlp")):
        full, short = f"layers.2.{layer}.{name}.weight", name.partition("_")[0]
        linear = "linear_qkv" if short == "q" else "linear_fc1"
        a, b = (weights[f"decoder.layers.2.lora_{linear}.{part}.{short}"] for part in "ab")
        expected = base[full].double() + 3.0 * b.double() @ a.double()
        assert (base[full] - stored[f"embedding_model.{full}"]).abs().max() > 1e-3
        assert (stored[f"embedding_model.{full}"] - expected).abs().max() <= 1e-6
    shutil.copytree(tmp_path / "export", tmp_path / "unchanged", ignore=shutil.ignore_patterns("SHA256SUMS"))
    tensors = stored | {f"embedding_model.{name}": value for name, value in base.items()}
    save_file(tensors, tmp_path / "unchanged" / "model.safetensors", metadata={"format": "pt"})
    (plain,) = world(1).run(
        trainer_embeddings, lora_run(inputs, "unused", lora=LoraConfig(), init_from=tmp_path / "unchanged"), None
    )
    assert (plain - merged).abs().max() > 1e-2


def test_stages_with_adapters(world, inputs, straight, tmp_path):
    """The next stage goes on with them; one that has others is refused; one begins on a stage that had none."""
    second = lora_run(inputs, tmp_path / "second", init_from=straight, steps=1)
    (before,) = world(1).run(trainer_embeddings, lora_run(inputs, "unused"), straight)
    (after,) = world(1).run(trainer_embeddings, second, None)
    assert torch.equal(before, after)
    for lora in (LoraConfig(), dataclasses.replace(LORA, rank=5)):
        (message,) = world(1).run(refusal, lora_run(inputs, "unused", init_from=straight, lora=lora))
        assert re.match(r"(?s)ConfigError: .*has other adapters.*model.lora.rank: 4 -> [05].*export it", message)
    other_dropout = dataclasses.replace(LORA, dropout=0.0, targets=LORA.targets[::-1])
    (after,) = world(1).run(
        trainer_embeddings, lora_run(inputs, "unused", init_from=straight, lora=other_dropout), None
    )
    assert torch.equal(before, after)
    full = lora_run(inputs, tmp_path / "full", lora=LoraConfig(), steps=1)
    world(2).run(train, full)
    (before,) = world(1).run(trainer_embeddings, full, tmp_path / "full")
    (after,) = world(1).run(trainer_embeddings, lora_run(inputs, "unused", init_from=tmp_path / "full"), None)
    assert torch.equal(before, after), "B is zero, so fresh adapters change nothing"


def export_adapters(run_dir, output) -> None:
    from nvembed_mcore.checkpoint import export_run

    export_run.export_adapters(str(run_dir), str(output), dtype="float32")


@pytest.fixture(scope="module")
def peft_folder(world, inputs, tmp_path_factory):
    """A run with mean pooling, adapters on some projections, and its PEFT folder."""
    root = tmp_path_factory.mktemp("peft")
    lora = dataclasses.replace(LORA, targets=["q", "v", "up"])
    config = lora_run(inputs, root / "run", lora=lora, kind="mean")
    world(2).run(train, config)
    world(1).run(export_adapters, root / "run", root / "adapters")
    return config, root / "adapters"


def bidirectional(base) -> MistralModel:
    """As a user of plain Hugging Face would load it."""
    config = MistralConfig.from_pretrained(base)
    config.is_causal = False
    return MistralModel.from_pretrained(base, config=config).eval()


def mean_embeddings(model, inputs) -> torch.Tensor:
    """float32 [len(TEXTS), H]: the means of a plain model's states, at unit length."""
    from nvembed_mcore.data.prompts import encode_texts
    from nvembed_mcore.data.tokenizer import load_tokenizer

    found = []
    for row in encode_texts(load_tokenizer(inputs / "tokenizer"), TEXTS, "", 32).split():
        pooled = model(input_ids=torch.as_tensor(row.astype(np.int64))[None]).last_hidden_state[0].mean(0)
        found.append(pooled / pooled.norm())
    return torch.stack(found)


@torch.no_grad()
def test_peft_gives_the_embeddings_on_the_plain_base(world, inputs, peft_folder):
    from peft import PeftModel

    config, folder = peft_folder
    (expected,) = world(1).run(trainer_embeddings, config, config.run_dir)
    model = PeftModel.from_pretrained(bidirectional(inputs / "base"), folder).eval()
    assert (mean_embeddings(model, inputs) - expected).abs().max() <= 1e-6
    assert (mean_embeddings(bidirectional(inputs / "base"), inputs) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("of_base", ["", "model.", "embedding_model."])
def test_a_peft_folder_comes_in_again(world, inputs, peft_folder, tmp_path, of_base):
    """Made on a MistralModel, a MistralForCausalLM or an NV-Embed model."""
    config, folder = peft_folder
    shutil.copytree(folder, tmp_path / "adapters", ignore=shutil.ignore_patterns("SHA256SUMS"))
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model."
    renamed = {prefix + of_base + name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "adapters" / "adapter_model.safetensors")
    lora = dataclasses.replace(config.model.lora, init_from=str(tmp_path / "adapters"))
    again = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=lora))
    (expected,) = world(1).run(trainer_embeddings, config, config.run_dir)
    (found,) = world(1).run(trainer_embeddings, again, None)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_what_peft_itself_saved_comes_in(world, inputs, tmp_path):
    import peft

    settings = peft.LoraConfig(r=3, lora_alpha=9, target_modules=["k_proj", "o_proj", "gate_proj"], lora_dropout=0.3)
    torch.manual_seed(5)
    model = peft.get_peft_model(bidirectional(inputs / "base"), settings).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0.0, 0.1)
    model.save_pretrained(tmp_path / "adapters")
    lora = LoraConfig(rank=3, alpha=9.0, targets=["gate", "k", "o"], init_from=str(tmp_path / "adapters"))
    (found,) = world(1).run(trainer_embeddings, lora_run(inputs, "unused", lora=lora, kind="mean"), None)
    assert (found - mean_embeddings(model, inputs)).abs().max() <= 1e-6


def import_base(source, output) -> None:
    from nvembed_mcore.checkpoint.import_run import import_hf

    import_hf(str(source), str(output))


def test_adapters_with_their_head_on_every_form_of_their_base(world, inputs, straight, tmp_path):
    """A Hugging Face folder, and a checkpoint with a head of its own, which the one that was trained replaces."""
    world(1).run(export_adapters, straight, tmp_path / "adapters")
    adapters = dataclasses.replace(LORA, init_from=str(tmp_path / "adapters"))
    config = lora_run(inputs, "unused", lora=adapters)
    (expected,) = world(1).run(trainer_embeddings, lora_run(inputs, "unused"), straight)
    (found,) = world(1).run(trainer_embeddings, config, None)
    assert torch.equal(found, expected)

    with_head = lora_run(inputs, tmp_path / "with_head", lora=dataclasses.replace(LORA, alpha=1e-30), steps=1)
    world(1).run(train, with_head)
    world(1).run(exported_embeddings, tmp_path / "with_head", tmp_path / "exported")  # the base and a head
    for number, base in enumerate((inputs / "base", tmp_path / "exported")):
        world(1).run(import_base, base, tmp_path / f"imported-{number}")
        (found,) = world(1).run(
            trainer_embeddings,
            lora_run(inputs, "unused", lora=adapters, init_from=tmp_path / f"imported-{number}"),
            None,
        )
        assert torch.equal(found, expected)
    (message,) = world(1).run(refusal, lora_run(inputs, "unused", lora=adapters, init_from=straight))
    assert re.match(r"ConfigError: .*straight.* and model.lora.init_from .*adapters both bring adapters", message)


def test_adapters_of_a_backbone_that_was_trained_are_refused_on_its_base(world, inputs, tmp_path):
    """What a PEFT folder is of is told by the weights, not by where the first stage began."""
    world(1).run(train, lora_run(inputs, tmp_path / "full", lora=LoraConfig(), steps=1))
    world(1).run(train, lora_run(inputs, tmp_path / "second", init_from=tmp_path / "full", steps=1))
    world(1).run(export_adapters, tmp_path / "second", tmp_path / "adapters")
    facts = json.loads((tmp_path / "adapters" / "nvembed.json").read_text())
    assert facts["base"]["name"] is None
    adapters = dataclasses.replace(LORA, init_from=str(tmp_path / "adapters"))
    (message,) = world(1).run(refusal, lora_run(inputs, "unused", lora=adapters))
    assert re.match(rf"WeightsError: .*were trained on a base with weights {facts['base']['fingerprint']}", message)
    (found,) = world(1).run(
        trainer_embeddings, lora_run(inputs, "unused", lora=adapters, init_from=tmp_path / "full"), None
    )
    (expected,) = world(1).run(trainer_embeddings, lora_run(inputs, "unused"), tmp_path / "second")
    assert torch.equal(found, expected)


def test_bfloat16_adapters_train(world, inputs, straight, tmp_path):
    config = lora_run(inputs, tmp_path, steps=3)
    world(2).run(train, dataclasses.replace(config, precision=PrecisionConfig(dtype="bfloat16")))
    assert losses(tmp_path)[0] == pytest.approx(losses(straight)[0], rel=0.02)
    assert losses(tmp_path)[2] < losses(tmp_path)[0]
