"""An optimizer in the shape of Apex's, and runs that change their optimizer on the way."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch

from nvembed_mcore.config import CheckpointConfig
from tests.helpers.cases import Case, build_step
from tests.helpers.plain import training_batch


class StandIn(torch.optim.Optimizer):
    """AdamW as Apex has it: two moments a parameter, the count of steps in the group and from the first step on, and
    groups without parameters, as the sharded optimizer gives a rank, passed over and not counted.
    """

    def __init__(
        self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0
    ):
        assert adam_w_mode and bias_correction
        rest = dict(bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, dict(lr=lr, **rest))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros(2, *parameter.shape).unbind()
                state["exp_avg"].mul_(first).add_(parameter.grad, alpha=1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
                mean, square = (
                    state[name] / (1 - beta ** group["step"]) for name, beta in zip(state, group["betas"], strict=True)
                )
                update = mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * parameter
                parameter.sub_(update, alpha=group["lr"])


def weights_after(case: Case, adams: list[str], folder: Path) -> list[torch.Tensor]:
    """This rank's weights after a step by each of the optimizers, which go on from one another's checkpoints.

    Args:
        adams: `Apex` (the stand-in, where there is no Apex), `TransformerEngine` or `torch`.
    """
    from nvembed_mcore import apex_kernels, optim
    from nvembed_mcore.checkpoint import folders, store
    from nvembed_mcore.checkpoint.saver import Saver
    from nvembed_mcore.metrics import PhaseTimer

    of_apex = (lambda: StandIn) if apex_kernels.why_no_fused_adam() else apex_kernels.fused_adam
    before, step = None, None
    for number, adam in enumerate(adams, 1):
        if adam != before:
            with (
                mock.patch.object(optim, "choose_adam", lambda adam=adam: (adam, "")),
                mock.patch.object(optim, "fused_adam", of_apex),
            ):
                next_step, groups, *_ = build_step(case)
            (inner,) = (one.optimizer for one in next_step.optimizer.chained_optimizers)
            assert type(inner).__module__.split(".")[0] == _module_of(adam, of_apex()), type(inner)
            saver = Saver(CheckpointConfig(keep=2), folder, groups)
            saver.prepare(next_step.chunks, None)
            if step:
                saver.save(number - 1, step.chunks, step.optimizer, {})
                path = folders.folder_of(folder) / folders.name_of(number - 1)
                saved = store.Checkpoint(path, number - 1, {"config": {}})
                store.load_checkpoint(saved, next_step.chunks, next_step.optimizer)
            step, before = next_step, adam
        step(training_batch(case.queries, number), number, PhaseTimer())
    assert {group["step"] for group in inner.param_groups if group["params"]} == {len(adams)}
    return [parameter.detach().cpu().clone() for chunk in step.chunks for parameter in chunk.module.parameters()]


def _module_of(adam: str, of_apex: type) -> str:
    return {"torch": "nvembed_mcore", "TransformerEngine": "transformer_engine"}.get(
        adam, of_apex.__module__.split(".")[0]
    )


def largest_difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Over the largest weight of each parameter."""
    return max(
        float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, expected, strict=True)
    )


def changing_optimizers(case: Case, ways: list[list[str]], folder: Path) -> list[float]:
    """How far each way is from torch's optimizer all along; one step each."""
    straight = weights_after(case, ["torch"] * len(ways[0]), folder / "straight")
    return [
        largest_difference(weights_after(case, way, folder / f"{number}"), straight) for number, way in enumerate(ways)
    ]
