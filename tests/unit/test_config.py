"""Combinations of fields that cannot work are refused where they are set, with both values."""

import pytest

from nvembed_mcore.config import (
    ConfigError,
    DataConfig,
    DatasetConfig,
    LossConfig,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    StepConfig,
)

FP8_ATTENTION = PrecisionConfig(fp8="delayed", fp8_attention="on")


def run_config(**changes) -> RunConfig:
    data = DataConfig(tokenizer="tokenizer", datasets=[DatasetConfig(path="train.jsonl")])
    return RunConfig(
        run_dir="run", steps=1, batch_size=1, data=data, model=ModelConfig(config="model.json"), **changes
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ParallelConfig(chunks_per_stage=2), ["parallel.chunks_per_stage = 2", "parallel.pp above 1, got 1"]),
        (lambda: ParallelConfig(layers_in_first_stage=1), ["layers_in_first_stage = 1", "parallel.pp above 1, got 1"]),
        (
            lambda: ParallelConfig(pp=2, chunks_per_stage=2, layers_in_last_stage=3),
            ["parallel.layers_in_last_stage", "multiple of chunks_per_stage = 2, got 3"],
        ),
        (lambda: ParallelConfig(pp=2, layers_in_first_stage=0), ["layers_in_first_stage", "at least 1", "got 0"]),
        (lambda: ParallelConfig(cp=0), ["parallel.cp must be at least 1, got 0"]),
        (
            lambda: run_config(parallel=ParallelConfig(cp=2), precision=FP8_ATTENTION),
            ["precision.fp8_attention is 'on'", "parallel.cp is 2"],
        ),
        (lambda: ParallelConfig(bucket_size=9), ["parallel.bucket_size", "overlap_grad_reduce", "9 and False"]),
        (
            lambda: LossConfig(learn_temperature=True, temperature=2.5),
            ["loss.temperature_range", "loss.temperature 2.5", "0.005 to 1.0"],
        ),
        (lambda: LossConfig(matryoshka_dims=[8, 8]), ["loss.matryoshka_dims", "[8, 8]"]),
        (lambda: DatasetConfig(path="a", num_positives=0), ["data.datasets.num_positives", "got 0"]),
        (
            lambda: run_config(parallel=ParallelConfig(pp=2), step=StepConfig(way="retain")),
            ["step.way 'retain'", "parallel.pp is 2"],
        ),
        (
            lambda: run_config(
                loss=LossConfig(false_negative_margin=0.25), step=StepConfig(gradient_exchange="recompute")
            ),
            ["step.gradient_exchange 'recompute'", "loss.false_negative_margin 0.25"],
        ),
    ],
)
def test_what_cannot_work_together(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "layers"),
    [
        ({}, [12]),
        ({"pp": 3}, [4, 4, 4]),
        ({"pp": 2, "layers_in_first_stage": 5}, [5, 7]),
        ({"pp": 4, "layers_in_last_stage": 3}, [3, 3, 3, 3]),
        ({"pp": 4, "layers_in_first_stage": 5, "layers_in_last_stage": 1}, [5, 3, 3, 1]),
        ({"pp": 3, "chunks_per_stage": 2, "layers_in_first_stage": 2, "layers_in_last_stage": 6}, [2, 4, 6]),
        ({"pp": 2, "layers_in_first_stage": 7, "layers_in_last_stage": 5}, [7, 5]),
    ],
)
def test_layers_of_stages(layout, layers):
    assert ParallelConfig(**layout).layers_of_stages(12) == layers


@pytest.mark.parametrize("chunks", [1, 2])
def test_megatron_shares_the_layers_out_alike(chunks):
    """Chunk after chunk over the stages, wherever a number is given."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from nvembed_mcore.model.backend import choose
    from nvembed_mcore.model.mistral import transformer_config
    from tests.helpers.models import tiny_config

    hf_config, backend = tiny_config(num_hidden_layers=16), choose(ModelConfig(config="x"), PrecisionConfig())
    for pp, first, last in ((2, 6, None), (2, None, 6), (2, 6, 10), (4, 2, 2), (4, None, 4), (3, 4, 8)):
        parallel = ParallelConfig(
            pp=pp, chunks_per_stage=chunks, layers_in_first_stage=first, layers_in_last_stage=last
        )
        config, stages, done = transformer_config(hf_config, backend, parallel), parallel.layers_of_stages(16), 0
        for chunk in range(chunks):
            for rank in range(pp):
                where = dict(vp_stage=chunk if chunks > 1 else None, pp_rank=rank)
                number = get_num_layers_to_build(config, **where)
                assert (number, get_transformer_layer_offset(config, **where)) == (stages[rank] // chunks, done)
                done += number


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"tp": 3}, ["parallel.tp = 3", "num_attention_heads = 8"]),
        ({"tp": 4}, ["parallel.tp = 4", "num_key_value_heads = 2"]),
        ({"pp": 3}, ["parallel.pp = 3", "num_hidden_layers = 4"]),
        ({"pp": 3, "layers_in_first_stage": 1}, ["layers_in_first_stage = 1", "leave 3", "2 other", "pp = 3"]),
        ({"pp": 2, "layers_in_first_stage": 1, "layers_in_last_stage": 2}, ["stage = 2 leave 1 of", "the 0 other"]),
        ({"pp": 2, "layers_in_last_stage": 4}, ["layers_in_last_stage = 4 leave 0 of", "num_hidden_layers = 4"]),
        (
            {"pp": 3, "chunks_per_stage": 2, "layers_in_last_stage": 2},
            ["layers_in_last_stage = 2 leave 2 of", "2 other", "chunks_per_stage = 2"],
        ),
    ],
)
def test_layout_that_does_not_divide_the_model(layout, words):
    """Needs no processes: the check stands before anything is built."""
    from nvembed_mcore.model.mistral import check_layout
    from tests.helpers.models import tiny_config

    with pytest.raises(ConfigError) as caught:
        check_layout(tiny_config(), ParallelConfig(**layout))
    assert all(word in str(caught.value) for word in words), str(caught.value)
