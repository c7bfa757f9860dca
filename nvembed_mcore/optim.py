"""Megatron's optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

import importlib
import math
from typing import Literal

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch.optim.adamw import adamw

from nvembed_mcore import device
from nvembed_mcore.apex_kernels import fused_adam, why_no_fused_adam
from nvembed_mcore.config import OptimConfig
from nvembed_mcore.model.backend import why_no_transformer_engine


class FusedAdam(torch.optim.Optimizer):
    """torch's fused AdamW in the shape of Apex's: moments in the state, the step in the group.

    torch's own Adam counts steps for each parameter; checkpoints, like Apex and TransformerEngine, have one count a
    group (checkpoint/optimizer_state.py).
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **_: object,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=0))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                    self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
            if parameters:
                self._update(group, parameters)
            group["step"] += 1

    def _update(self, group: dict, parameters: list[torch.Tensor]) -> None:
        steps = [torch.tensor(float(group["step"]), device=p.device) for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters],
            [self.state[p]["exp_avg"] for p in parameters],
            [self.state[p]["exp_avg_sq"] for p in parameters],
            [],
            steps,
            fused=True,
            foreach=False,
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )


def choose_adam() -> tuple[Literal["TransformerEngine", "Apex", "torch"], str]:
    """Whose fused AdamW updates the weights here, and why. The state is the same: any of them goes on from any."""
    if not device.has_cuda():
        return "torch", "there is no CUDA device"
    why_not = why_no_transformer_engine()
    if not why_not:
        return "TransformerEngine", "it can be imported"
    if not why_no_fused_adam():
        return "Apex", f"TransformerEngine: {why_not}"
    return "torch", f"TransformerEngine: {why_not}; Apex: {why_no_fused_adam()}"


def _give_megatron_its_adam() -> None:
    """Let Megatron take what `choose_adam` says: by itself it takes what can be imported, kernels and device or not,
    and torch's own Adam otherwise.
    """
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    name, _ = choose_adam()
    if name == "TransformerEngine":
        kind = importlib.import_module("transformer_engine.pytorch.optimizers").FusedAdam
    else:
        kind = fused_adam() if name == "Apex" else FusedAdam
    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = kind, False
    distrib_optimizer.Adam, distrib_optimizer.HAVE_APEX_OR_TE = kind, True
    # All three count steps as Apex does.
    distrib_optimizer.USING_APEX_OPTIMIZER = True


def build_optimizer(config: OptimConfig, chunks: list[DistributedDataParallel]) -> ChainedOptimizer:
    """Adam with decoupled weight decay on everything but vectors (norms, biases), and clipping by the global norm."""
    _give_megatron_its_adam()
    dtype = chunks[0].module.config.params_dtype
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.betas[0],
            adam_beta2=config.betas[1],
            adam_eps=config.eps,
            # With 0 Megatron would not compute the norm either, which the metrics show.
            clip_grad=config.clip_norm or math.inf,
            use_distributed_optimizer=config.distributed,
            overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
        ),
        chunks,
    )
    for group in optimizer.param_groups:
        # Megatron leaves this to its scheduler, which we do not use.
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    return optimizer


@torch.no_grad()
def gradient_norm(optimizer: ChainedOptimizer) -> float:
    """Norm of the whole gradient, the same on every rank that shares it; changes no weight, moment or step.

    This and `update` are `ChainedOptimizer.step` of Megatron in two: it looks at the norm only to clip, and a norm
    that is not a number would go into every weight.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


@torch.no_grad()
def update(optimizer: ChainedOptimizer, norm: float) -> None:
    """Clip the gradients of which `gradient_norm` found the finite `norm`, and take the step."""
    for one in optimizer.chained_optimizers:
        # A pipeline stage without trained weights has none, nor has a rank without a share of the state.
        if not one.is_stub_optimizer and one.get_parameters():
            clip_grad_by_total_norm_fp32(one.get_parameters(), one.config.clip_grad, norm)
    optimizer.step_with_ready_grads()


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step `step` (counted from 1) of `num_steps`: linear warm-up, then linear decay."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    rest = (num_steps - step) / max(1, num_steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * rest


def set_learning_rate(optimizer: ChainedOptimizer, value: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value
