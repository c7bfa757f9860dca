"""The gradient of one training step in one layout, written by Hugging Face name. Run with torchrun, or alone.

torchrun --nproc-per-node 4 examples/quickstart/one_step.py CONFIG.yaml OUTPUT_DIR --tp 2 --pp 2
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

import torch
import yaml
from jsonargparse import ArgumentParser
from safetensors.torch import save_file

from nvembed_mcore import train
from nvembed_mcore.build import build_model, read_architecture
from nvembed_mcore.config import EvalConfig, OptimConfig, ParallelConfig, RunConfig, StepConfig
from nvembed_mcore.metrics import PhaseTimer
from nvembed_mcore.optim import build_optimizer
from nvembed_mcore.parallel.groups import initialize, shutdown
from nvembed_mcore.step import ContrastiveStep


def main() -> None:
    """Each rank writes the gradients of its own shards; `proofs.py` joins and compares them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="config.yaml of a run")
    parser.add_argument("output", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = _read(arguments.config, ParallelConfig(tp=arguments.tp, pp=arguments.pp))
    groups = initialize(config.parallel)
    hf_config = read_architecture(config.model)
    data = train.open_data(config, hf_config)
    chunks = build_model(config, hf_config, groups)
    step = ContrastiveStep(
        chunks, build_optimizer(config.optim, chunks), groups, step=config.step, loss=config.loss, seed=config.seed
    )
    output = step(data.source.batch(0), 1, PhaseTimer())
    gradients = {
        name: parameter.main_grad.clone()
        for chunk in chunks
        for name, parameter in chunk.module.parameters_by_global_name().items()
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    facts = {"tp": str(groups.tp_rank), "pp": str(groups.pp_rank), "loss": repr(output.loss)}
    save_file(gradients, arguments.output / f"rank-{groups.rank}.safetensors", metadata=facts)
    shutdown()


def _read(path: str, parallel: ParallelConfig) -> RunConfig:
    """The run's configuration in this layout: packs small enough to need several, gradients whole and unclipped."""
    parser = ArgumentParser()
    parser.add_class_arguments(RunConfig)
    tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    config = RunConfig(**parser.instantiate(parser.parse_object(tree)).as_dict())
    return dataclasses.replace(
        config,
        batch_size=24,
        parallel=parallel,
        step=StepConfig(way="cached", tokens_per_microbatch=1024),
        optim=OptimConfig(clip_norm=0.0, distributed=False),
        eval=EvalConfig(),
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
