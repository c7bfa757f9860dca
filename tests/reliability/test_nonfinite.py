"""A loss or a gradient that is not a number: nothing is updated, on any rank, and the samples are written down."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path
from unittest import mock

import pytest
import torch

from nvembed_mcore.checkpoint.store import find_checkpoint
from nvembed_mcore.config import CheckpointConfig, LossConfig, ParallelConfig, PrecisionConfig, RunConfig
from nvembed_mcore.exits import Exit, exit_of
from nvembed_mcore.log import read_metrics
from nvembed_mcore.nonfinite import NonFiniteLossError
from nvembed_mcore.status import read_status
from tests.helpers import runs
from tests.helpers.cases import Case, build_step
from tests.helpers.grid import ALL_TARGETS
from tests.helpers.plain import training_batch

LEARNED = {"learn_temperature": True}
CASES = [
    Case(world=2, way="single", overlap=True, loss=LEARNED),
    Case(world=2, way="retain", budget=120, distributed=False, clip=0.0),
    Case(world=2, way="cached", budget=120, targets=ALL_TARGETS),
    Case(world=2, tp=2, sp=True, way="cached", budget=200, distributed=False),
    Case(world=2, pp=2, chunks=2, way="cached", budget=200, distributed=False, targets=("q", "v"), kind="mean"),
]


def poison(where: str, value: float, is_here: bool, chunk: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
    """Spoil the first text of every pack of this rank: its embedding, or the gradient that comes back for it."""

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        factor = torch.ones(len(tensor), 1, dtype=tensor.dtype)
        factor[:1] = value
        return tensor * factor

    def hook(_module, _inputs, output: torch.Tensor) -> torch.Tensor:
        if where == "forward":
            return spoil(output)
        if output.requires_grad:
            output.register_hook(spoil)
        return output

    return chunk.register_forward_hook(hook if is_here else lambda _module, _inputs, _output: None)


def state_of(chunks, optimizer) -> str:
    """SHA-256 of this rank's weights, master weights, moments and step counters."""
    digest = hashlib.sha256()

    def add(tensor: torch.Tensor) -> None:
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy())

    for chunk in chunks:
        for parameter in chunk.module.parameters():
            add(parameter)
    for one in optimizer.chained_optimizers:
        for group in one.param_groups:
            digest.update(repr((group["step"], len(group["params"]))).encode())
            for parameter in group["params"]:
                add(parameter)
                for name, moment in sorted(one.optimizer.state[parameter].items()):
                    digest.update(name.encode())
                    add(moment)
    return digest.hexdigest()


HOWS = (("forward", math.nan), ("forward", math.inf), ("backward", math.nan))


def poisoned_steps(case: Case) -> list[dict]:
    """A good step, one that is poisoned on the last rank in each way, and the good one again beside a run without."""
    from nvembed_mcore.metrics import PhaseTimer
    from nvembed_mcore.schedule import plan_texts

    step, groups, *_ = build_step(case)
    is_here = groups.is_last_stage and groups.dp_rank == groups.dp_size - 1
    first, second = (training_batch(case.queries, number) for number in (1, 2))
    step(first, 1, PhaseTimer())
    before, found = state_of(step.chunks, step.optimizer), []
    for where, value in HOWS:
        handle = poison(where, value, is_here, step.chunks[-1].module)
        with pytest.raises(NonFiniteLossError) as caught:
            step(second, 2, PhaseTimer())
        handle.remove()
        found.append((state_of(step.chunks, step.optimizer), caught.value))
    output = step(second, 2, PhaseTimer())
    again = state_of(step.chunks, step.optimizer)

    twin, *_ = build_step(case)
    twin(first, 1, PhaseTimer())
    expected = twin(second, 2, PhaseTimer())
    packs = plan_texts(second.lengths, step.chunks, groups, case.budget).packs[-1]
    texts = {int(pack[0]) for pack in packs if len(pack)}
    owner = [*range(second.num_queries), *second.passage_query.tolist()]
    return [
        {
            "unchanged": before == after != again,
            "as if nothing was": output == expected and again == state_of(twin.chunks, twin.optimizer),
            "message": str(error),
            "finding": dataclasses.asdict(error.finding),
            "poisoned": sorted({owner[text] for text in texts}),
        }
        for after, error in found
    ]


def many_poisoned_steps(cases: list[Case]) -> list[list[dict]]:
    return [poisoned_steps(case) for case in cases]


@pytest.fixture(scope="module")
def poisoned(world) -> dict[Case, list[list[dict]]]:
    """By case and rank, what came of each kind of poison; one job a layout."""
    found = {}
    for layout in dict.fromkeys(case.layout for case in CASES):
        alike = [case for case in CASES if case.layout == layout]
        found.update(zip(alike, zip(*world(2).run(many_poisoned_steps, alike), strict=True), strict=True))
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_updated_and_all_ranks_say_the_same(poisoned, case):
    for by_kind in poisoned[case]:
        assert all(found["unchanged"] and found["as if nothing was"] for found in by_kind), by_kind
    for forward, infinite, backward in poisoned[case]:
        assert forward["finding"]["suspects"] == infinite["finding"]["suspects"] == forward["poisoned"]
        assert backward["finding"]["suspects"] == [] and math.isfinite(backward["finding"]["loss"])
        assert forward["message"].startswith("step 2: the loss is nan, the norm of its gradient nan; no weight was ")
        assert "begins in the backward pass" in backward["message"]
    first, second = poisoned[case]
    assert [found["message"] for found in first] == [found["message"] for found in second]


def step_with(weights: float) -> dict:
    """A step whose weights are spoiled before it: all of the final norm, or one text's token."""
    from nvembed_mcore.metrics import PhaseTimer

    step, groups, _, parameters = build_step(Case(world=2, distributed=False))
    batch = training_batch(7, 1)
    with torch.no_grad():
        parameters["decoder.final_layernorm.weight"].fill_(weights)
    with pytest.raises(NonFiniteLossError) as caught:
        step(batch, 1, PhaseTimer())
    return dataclasses.asdict(caught.value.finding) | {"verdict": caught.value.finding.verdict}


def test_weights_and_setup_are_told_from_samples(world):
    for finding in world(2).run(step_with, math.nan):
        assert finding["bad_weights"] and finding["all_texts"]
        assert finding["verdict"].startswith("Some weights are not finite already")
    # Finite weights whose products are not.
    for finding in world(2).run(step_with, 1e38):
        assert not finding["bad_weights"] and finding["all_texts"]
        assert finding["verdict"].startswith("All texts have embeddings that are not finite: look at the weights")


def train_poisoned(config: RunConfig, at_step: int) -> dict | None:
    """A run whose step `at_step` is poisoned on the last data-parallel rank; what its error says."""
    from nvembed_mcore.step import ContrastiveStep
    from nvembed_mcore.train import train

    honest, states = ContrastiveStep.__call__, []

    def step(self, batch, number, timer):
        is_here = number == at_step and self.groups.dp_rank == self.groups.dp_size - 1
        handle = poison("forward", math.nan, is_here, self.chunks[-1].module)
        states.append(state_of(self.chunks, self.optimizer))
        try:
            return honest(self, batch, number, timer)
        except NonFiniteLossError:
            states.append(state_of(self.chunks, self.optimizer))
            raise
        finally:
            handle.remove()

    with mock.patch.object(ContrastiveStep, "__call__", step):
        try:
            train(config)
        except NonFiniteLossError as error:
            return {"message": str(error), "status": exit_of(error), "unchanged": states[-1] == states[-2]}
    return None


def test_a_run_writes_the_samples_and_its_checkpoint_stays(world, tmp_path):
    """bfloat16 weights beside a float32 temperature: two optimizers in a chain."""
    inputs = runs.write_inputs(tmp_path / "inputs", with_words=True)
    config = runs.run_config(inputs, tmp_path / "run", parallel=ParallelConfig(timeout_minutes=2), steps=4)
    config = dataclasses.replace(
        config,
        precision=PrecisionConfig(dtype="bfloat16"),
        loss=LossConfig(temperature=0.1, learn_temperature=True),
        eval=dataclasses.replace(config.eval, path=None),
        checkpoint=CheckpointConfig(every_steps=1),
    )
    first, second = world(2).run(train_poisoned, config, 3)
    assert first == second and first["unchanged"] and first["status"] == Exit.NON_FINITE == 65
    file = tmp_path / "run" / "nonfinite-step-00000003.json"
    assert first["message"].startswith("step 3: the loss is nan, the norm of its gradient nan; no weight was changed ")
    assert first["message"].endswith(f". The samples of this batch are in {file}")
    content = json.loads(file.read_text())
    assert (content["step"], content["loss"], content["grad_norm"]) == (3, "nan", "nan")
    assert content["verdict"] in first["message"]
    assert len(content["samples"]) == config.batch_size
    for sample in content["samples"]:
        assert sample["data"] == str(inputs / "train.jsonl") and Path(sample["store"]).is_dir()
        assert sample["query"] == runs.record(sample["record"])["query"]
    assert 0 < sum(sample["suspect"] for sample in content["samples"]) < config.batch_size
    assert not [path for path in file.parent.iterdir() if path.name.startswith(".writing")]
    # The newest checkpoint is of the step before, and the run goes on from it once the poison is gone.
    assert find_checkpoint(config.run_dir).step == 2
    assert world(2).run(train_poisoned, config, 0) == [None, None]
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_checkpoint_that_is_still_being_written_is_kept(world, tmp_path):
    inputs = runs.write_inputs(tmp_path / "inputs")
    config = runs.run_config(
        inputs, tmp_path / "run", steps=4, checkpoint=CheckpointConfig(every_steps=1, async_save=True)
    )
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, path=None))
    for found in world(2).run(train_poisoned_in_a_slow_save, config, 2):
        assert found["status"] == Exit.NON_FINITE
    status = read_status(config.run_dir)
    assert find_checkpoint(config.run_dir).step == status.checkpoint_step == 1
    assert json.loads((tmp_path / "run/logs/0001/first-failure.json").read_text())["operation"] == "step 2"


def train_poisoned_in_a_slow_save(config: RunConfig, at_step: int) -> dict | None:
    """As `train_poisoned`, while the step before is still being written."""
    with mock.patch.dict(os.environ, {"NVEMBED_FAULT": "sleep=1@before_shard"}):
        return train_poisoned(config, at_step)


def test_a_report_that_cannot_be_written_does_not_hide_the_error(world, tmp_path):
    inputs = runs.write_inputs(tmp_path / "inputs", with_words=True)
    config = runs.run_config(inputs, tmp_path / "run", steps=1)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, path=None))
    (tmp_path / "run" / "nonfinite-step-00000001.json").mkdir(parents=True)
    (found,) = world(1).run(train_poisoned, config, 1)
    assert found["status"] == Exit.NON_FINITE
    assert ". The samples of this batch could not be written to " in found["message"]
    assert "Is a directory" in found["message"]
