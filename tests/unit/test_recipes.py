"""Every YAML file under examples/ is a valid run, and the NV-Embed recipes have the paper's values (tables 11, 12)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from nvembed_mcore.config import DatasetConfig, RunConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = EXAMPLES / "recipes"


def read(path: Path) -> RunConfig:
    """As the command line reads it; an unknown key or a wrong type ends the test."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig)
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    return RunConfig(**parser.instantiate(parser.parse_object(tree)).as_dict())


@pytest.fixture(scope="module")
def stages() -> tuple[RunConfig, RunConfig]:
    return read(RECIPES / "nv_embed_stage1.yaml"), read(RECIPES / "nv_embed_stage2.yaml")


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_examples_are_valid_runs(path):
    config = read(path)
    assert config.stage in (1, 2)
    assert config.optim.warmup_steps < config.steps
    assert len({dataset.path for dataset in config.data.datasets}) == len(config.data.datasets)


def test_the_paper_s_values(stages):
    for config, steps, rate in zip(stages, (20_000, 18_000), (2e-5, 1.5e-5), strict=True):
        assert (config.steps, config.optim.lr) == (steps, rate)
        assert config.batch_size == 128
        assert (config.optim.warmup_steps, config.optim.weight_decay) == (50, 0.03)
        assert (config.data.max_query_tokens, config.data.max_document_tokens) == (512, 512)
        assert (config.model.attention_mask, config.model.precision) == ("bidirectional", "bfloat16")
        pooling = config.model.pooling
        assert (pooling.kind, pooling.num_latents, pooling.num_heads) == ("latent", 512, 8)
        lora = config.model.lora
        assert (lora.rank, lora.alpha, lora.dropout) == (16, 32.0, 0.1)
        assert {dataset.num_negatives for dataset in config.data.datasets} == {7}


def test_what_the_paper_leaves_open_is_the_same_in_both_stages(stages):
    first, second = stages
    for name in ("loss", "parallel", "step", "checkpoint", "seed"):
        assert getattr(first, name) == getattr(second, name)
    for name in ("betas", "eps", "clip_norm", "min_lr"):
        assert getattr(first.optim, name) == getattr(second.optim, name)
    assert first.loss.temperature == 0.02
    assert first.optim.min_lr == 0.0


def test_stage_2_goes_on_from_stage_1(stages):
    first, second = stages
    assert first.model.init_from == "checkpoints/Mistral-7B-v0.1"
    assert second.model.init_from == first.run_dir != second.run_dir
    assert (first.stage, second.stage) == (1, 2)
    assert first.model.pooling == second.model.pooling and first.model.lora == second.model.lora
    assert first.data.tokenizer == second.data.tokenizer


def test_the_blends(stages):
    first, second = (config.data.datasets for config in stages)
    assert Counter(one.task for one in first) == {"retrieval": 16}
    assert Counter(one.task for one in second) == {
        "retrieval": 16,
        "sts": 3,
        "classification": 12,
        "clustering": 11,
    }
    assert all(one.instruction for one in (*first, *second))
    assert all(one.uses_in_batch_negatives for one in first)
    assert not any(one.uses_in_batch_negatives for one in second)
    assert {one.task for one in second if one.instructs_documents} == {"sts"}
    assert [_text(one) for one in first] == [_text(one) for one in second if one.task == "retrieval"]


def _text(dataset: DatasetConfig) -> tuple[str, str]:
    return dataset.path, dataset.instruction
