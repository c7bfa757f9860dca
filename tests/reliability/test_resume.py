"""A run that stops and goes on in the same layout is, bit for bit, the run that nobody stopped (R1).

What is compared after every step is everything that a run goes on with: weights, buffers, the optimizer's own copies,
both moments, step counters and settings of its groups, and what the step logged.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from nvembed_mcore.config import (
    CheckpointConfig,
    DatasetConfig,
    LoraConfig,
    LossConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    StepConfig,
)
from tests.helpers import resumed, runs

STEPS, RANKS = 3, 2
LEARNED = LossConfig(temperature=0.1, learn_temperature=True)
CACHED = StepConfig(way="cached", tokens_per_microbatch=50)
RETAIN = StepConfig(way="retain", tokens_per_microbatch=50)
ADAPTERS = LoraConfig(rank=4, dropout=0.1)


def layout(tp: int = 1, pp: int = 1, chunks: int = 1, **more) -> ParallelConfig:
    return ParallelConfig(tp=tp, pp=pp, chunks_per_stage=chunks, timeout_minutes=2, **more)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The runs' inputs. Attention drops weights, so that every step draws."""
    folder = runs.write_inputs(tmp_path_factory.mktemp("inputs"), with_words=True)
    architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**architecture, "attention_dropout": 0.1}), encoding="utf-8")
    return folder


def configured(inputs, run_dir, *, pooling=None, model=None, optim=None, data=None, **changes) -> RunConfig:
    """A run that saves after every step; changes to its parts."""
    changes = {"steps": STEPS, "checkpoint": CheckpointConfig(every_steps=1, keep=99), **changes}
    config = runs.run_config(inputs, run_dir, **changes)
    model = {**(model or {}), "pooling": dataclasses.replace(config.model.pooling, **(pooling or {}))}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **model),
        optim=dataclasses.replace(config.optim, **(optim or {})),
        data=dataclasses.replace(config.data, **(data or {})),
    )


def check(found: list[resumed.Record], expected: list[resumed.Record]) -> None:
    """Records of a resumed run against those of the straight one; the first one has logged nothing yet."""
    assert len(found) == len(expected)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        other = {name: value for name, value in other.items() if step or not name.startswith("logged")}
        assert one.keys() == other.keys()
        assert [name for name in one if one[name] != other[name]] == [], step


BFLOAT16 = PrecisionConfig(dtype="bfloat16")
# Pairwise: each layout, way of stepping, precision, head and option of the optimizer meets others.
CASES = {
    "many buckets, auto, multi-layer head": dict(
        parallel=layout(overlap_grad_reduce=True, bucket_size=3000),
        step=StepConfig(tokens_per_microbatch=50),
        pooling={"kind": "multi_layer"},
        optim={"ema_decay": 0.9},
    ),
    "bfloat16 beside a float32 temperature, causal": dict(
        precision=BFLOAT16, model={"attention_mask": "causal"}, pooling={"kind": "last"}, loss=LEARNED
    ),
    "tensor and sequence parallel, cached, LoRA": dict(
        parallel=layout(2), model={"lora": ADAPTERS}, step=CACHED, loss=LEARNED
    ),
    "tensor parallel, retain, matryoshka, optimizer not sharded": dict(
        parallel=layout(2, sequence_parallel=False),
        model={"attention_mask": "causal"},
        optim={"distributed": False},
        step=RETAIN,
        loss=LossConfig(temperature=0.1, matryoshka_dims=[8], symmetric=True),
    ),
    "pipeline, bfloat16, optimizer not sharded": dict(
        parallel=layout(1, 2), precision=BFLOAT16, optim={"distributed": False, "ema_decay": 0.9}, loss=LEARNED
    ),
    "interleaved pipeline, LoRA, multi-layer head": dict(
        parallel=layout(1, 2, 2),
        model={"lora": ADAPTERS},
        pooling={"kind": "multi_layer"},
        loss=LEARNED,
        step=StepConfig(tokens_per_microbatch=50),
    ),
    "delayed FP8, cached, LoRA": dict(precision=PrecisionConfig(fp8="delayed"), model={"lora": ADAPTERS}, step=CACHED),
}


LONG_ONES = (
    "bfloat16 beside a float32 temperature, causal",
    "tensor parallel, retain, matryoshka, optimizer not sharded",
)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if case in LONG_ONES else case for case in CASES]
)
def test_goes_on_by_bits(world, inputs, tmp_path, case):
    changes = {"parallel": layout(), **CASES[case]}
    config = configured(inputs, tmp_path, **changes)
    straight = world(RANKS).run(resumed.straight_run, config, saves=[1])
    again = world(RANKS).run(resumed.resumed_runs, config, {1: STEPS})
    for rank in range(RANKS):
        check(again[rank][1], straight[rank])
    last = [one[-1] for one in straight]
    assert resumed.total(last) == resumed.total([one[1][-1] for one in again])
    assert resumed.total(last) != resumed.total([one[-2] for one in straight])


def histories(records: list[resumed.Record]) -> list[dict[str, str]]:
    """What ranks remember of FP8."""
    return [{name: value for name, value in one.items() if ".fp8." in name} for one in records]


def test_fp8_histories_load_into_any_layout_or_begin_empty(world, inputs, tmp_path):
    fp8 = [PrecisionConfig(dtype="float32", fp8=recipe) for recipe in ("delayed", "off")]
    config = configured(inputs, tmp_path / "delayed", parallel=layout(), precision=fp8[0], step=RETAIN)
    straight = world(RANKS).run(resumed.straight_run, config, saves=[1])
    saved, after = (histories([one[step] for one in straight]) for step in (0, 1))
    assert saved[0] == saved[1] != after[0] == after[1] and len(saved[0]) == 2 * 4 * 4
    split = dataclasses.replace(config, parallel=layout(2))
    again = world(RANKS).run(resumed.resumed_runs, split, {1: 2})
    assert histories([one[1][0] for one in again]) == saved
    # Without FP8 they are left; and a run that had none begins with empty ones.
    world(RANKS).run(resumed.resumed_runs, dataclasses.replace(config, precision=fp8[1]), {1: 2})
    without = configured(inputs, tmp_path / "off", parallel=layout(), precision=fp8[1], step=RETAIN)
    world(RANKS).run(resumed.straight_run, without, saves=[1])
    (empty, first), _ = (
        one[1]
        for one in world(RANKS).run(resumed.resumed_runs, dataclasses.replace(without, precision=fp8[0]), {1: 2})
    )
    ones = {resumed.digest(torch.ones(3)), resumed.digest(torch.zeros(1024, 3))}
    assert {*histories([empty])[0].values()} == ones and not ones & {*histories([first])[0].values()}


LONG = 7
"""Steps of nine records over forty: the pass ends inside the fifth."""


@pytest.fixture(scope="module")
def long_run(world, inputs, tmp_path_factory):
    """Adapters with dropout and a learned temperature, `cached` with several packs a rank, two data sets of which one
    ends several times; the test set is scored between the steps, and every step is saved asynchronously."""
    path = str(inputs / "train.jsonl")
    datasets = [
        DatasetConfig(path=path, instruction="Find it", num_negatives=2, weight=2.0),
        DatasetConfig(path=path, instruction="Match it", num_negatives=1, max_records=7),
    ]
    config = configured(
        inputs,
        tmp_path_factory.mktemp("long"),
        parallel=layout(),
        steps=LONG,
        model={"lora": ADAPTERS},
        data={"datasets": datasets},
        step=CACHED,
        loss=LEARNED,
        checkpoint=CheckpointConfig(every_steps=1, keep=99, async_save=True),
    )
    steps = range(1, LONG + 1)
    return config, world(RANKS).run(resumed.straight_run, config, saves=steps, evaluates=True)


def test_goes_on_by_bits_after_any_step(world, long_run):
    """Also at the end of a pass; with an evaluation after each step or none, and from batches that were read ahead."""
    config, straight = long_run
    assert len({one["logged temperature"] for one in straight[0]}) == LONG
    assert int(straight[0][0]["logged microbatches"]) > 1
    points = {point: min(point + 1, LONG) for point in range(1, LONG + 1)} | {2: LONG}
    again = world(RANKS).run(resumed.resumed_runs, config, points, before=resumed.read_ahead)
    for rank in range(RANKS):
        for point, last in points.items():
            check(again[rank][point], straight[rank][point - 1 : last])


def test_what_is_not_restored_would_be_seen(world, long_run):
    config, straight = long_run
    for spoil in (resumed.new_temperature, resumed.other_dropout, resumed.new_moments, resumed.new_step_counter):
        again = world(RANKS).run(resumed.resumed_runs, config, {3: 4}, before=spoil)
        after, expected = again[0][3][1], straight[0][3]
        with pytest.raises(AssertionError):
            check([after], [expected])
        is_loss = spoil in (resumed.new_temperature, resumed.other_dropout)
        assert (after["logged loss"] != expected["logged loss"]) == is_loss


def test_another_number_of_threads_is_another_rounding(world, long_run):
    """So it belongs to the layout: what was stored is the same, what is computed from it is not, by bits."""
    config, straight = long_run
    found, after = world(RANKS).run(resumed.resumed_runs, config, {3: 4}, threads=2)[0][3]
    check([found], straight[0][2:3])
    losses = [float.fromhex(one["logged loss"]) for one in (after, straight[0][3])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
