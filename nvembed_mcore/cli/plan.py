"""`nvembed plan CONFIG.yaml ... --gpus 8,64`: which layouts a run fits into, what they take, and what it costs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from nvembed_mcore.cli.plan_dry_run import dry_run, numbers
from nvembed_mcore.cli.results import Tables, add_json, give
from nvembed_mcore.cli.run_config import read_run_config
from nvembed_mcore.config import ConfigError, RunConfig
from nvembed_mcore.progress import progress
from nvembed_mcore.scaling.architecture import Architecture
from nvembed_mcore.scaling.hardware import cluster

if TYPE_CHECKING:
    from nvembed_mcore.scaling.hardware import Cluster
    from nvembed_mcore.scaling.lengths import Lengths
    from nvembed_mcore.scaling.plan_report import Stage
    from nvembed_mcore.scaling.workload import Workload

_USAGE = "nvembed plan CONFIG.yaml [CONFIG.yaml ...] --gpus N[,N ...] [--device NAME] [options] [--field value ...]"
_DESCRIPTION = """\
Say, without a GPU and without torch, which layouts of a cluster a training run fits into, how long a step takes in
each, and what the whole run costs. Several configurations are the stages of one recipe: their costs are added.

For each number of GPUs the layouts that fit are listed, the fastest first:
  TP PP CP DP     tensor-, pipeline-, context- and data-parallel size
  stages          layers of the first, a middle and the last stage, x chunks where stages are interleaved
  way, budget     step.way and step.tokens_per_microbatch
  s/step, low-high  seconds of an optimizer step, and a range for nine in ten, by the spread of the fitted constants
  tok/s/GPU       real tokens, without padding, a second and GPU
  MFU             model FLOPs (nothing that is computed twice) over the data sheet's bfloat16 peak
  GB              memory of the fullest rank
  GPU hours, $    of all `steps`, without evaluation, saves and failures
The line `as configured` is the layout that the configuration itself describes."""
_EPILOG = """\
Constants of the time model are fitted to published step times (tools/scaling/validate.py), not to runs of this
trainer: measure before you buy. Fields of a configuration may be given as in `nvembed train`: --batch_size 1024."""
LEAST_WIDTH = 100
"""Columns of the tables, even on a narrower screen: a broken line still has every figure, a cut one has not."""


def add(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "plan",
        help="say which layouts of a cluster fit, and what a run costs",
        usage=_USAGE,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=_numbers, required=True, metavar="N[,N ...]", help="numbers of GPUs")
    parser.add_argument(
        "--device", type=str.lower, default="h200", help="a100, h100, h200 (default), b200, or cpu for gloo on cores"
    )
    parser.add_argument("--price", type=_price, metavar="DOLLARS", help="of one GPU for an hour")
    parser.add_argument(
        "--top", type=_at_least_one, default=5, metavar="N", help="layouts listed of each kind (default 5)"
    )
    parser.add_argument("--explain", action="store_true", help="show where each second of the fastest layout goes")
    parser.add_argument(
        "--lengths",
        metavar="FILE",
        help='instead of the run\'s own data: a JSON file {"query": {tokens: texts, ...}, "document": {...}}, or a '
        "name in scaling/lengths.yaml (default: token stores, else data files, else lengths of MS MARCO)",
    )
    parser.add_argument(
        "--architecture",
        metavar="FILE",
        help="config.json of the backbone, where model.init_from is not here (Mistral-7B: "
        "examples/recipes/mistral_7b_v0_1.json)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="instead build some ranks of the configuration's own layout on this machine, with nothing allocated; "
        "what cannot work ends with the error and the status of `train`",
    )
    parser.add_argument(
        "--ranks",
        type=numbers,
        metavar="R[,R ...]",
        help="with --dry-run: which ranks (default: the first of each pipeline stage, and the last of all)",
    )
    add_json(parser, "everything, all layouts included,")
    parser.set_defaults(run=_run, takes_fields=True)


def _run(options: argparse.Namespace, fields: Sequence[str] = ()) -> None:
    """
    Raises:
        ConfigError: a file, a field, a device or a number of GPUs cannot work.
    """
    files = list(takewhile(lambda word: not word.startswith("-"), fields))
    if not files:
        raise ConfigError(f"give a configuration before its fields: {_USAGE}")
    configs = [read_run_config([file, *fields[len(files) :]]) for file in files]
    machine = cluster(options.device)
    if options.ranks and not options.dry_run:
        raise ConfigError("--ranks chooses what --dry-run builds, and that is not given")
    if options.dry_run:
        if len(configs) > 1:
            raise ConfigError(f"--dry-run builds one configuration, got {', '.join(files)}")
        return dry_run(*configs, options)
    stages = _stages(files, configs, machine, options)
    from nvembed_mcore.scaling.plan_report import as_json

    found = as_json(stages, options.device, options.price)
    give(found, options.json, lambda: _print(stages, machine, options))
    return None


def _stages(
    files: Sequence[str], configs: Sequence[RunConfig], machine: Cluster, options: argparse.Namespace
) -> list[Stage]:
    from nvembed_mcore.scaling.plan import plan as plan_stage
    from nvembed_mcore.scaling.plan_report import Stage

    stages = []
    with progress("plan", len(configs) * len(options.gpus), "sizes") as shown:
        for file, config in zip(files, configs, strict=True):
            workload, plans = _workload(config, options), []
            for gpus in options.gpus:
                plans.append(plan_stage(workload, config, gpus, machine, options.top))
                shown.update(len(stages) * len(options.gpus) + len(plans))
            stages.append(Stage(file, workload, plans))
    return stages


def _print(stages: Sequence[Stage], machine: Cluster, options: argparse.Namespace) -> None:
    from nvembed_mcore.scaling.plan_report import sums

    console = Tables(150)
    console.width = max(console.width, LEAST_WIDTH)
    for stage in stages:
        _print_stage(console, stage, machine, options)
    if len(stages) > 1:
        console.print(sums(stages, options.price))


def _numbers(text: str) -> list[int]:
    return [_at_least_one(word) for word in text.split(",")]


def _at_least_one(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not 0 <= price < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of dollars, 0 or more, got {text!r}")
    return price


def _workload(config: RunConfig, options: argparse.Namespace) -> Workload:
    from nvembed_mcore.scaling.plan import few_steps
    from nvembed_mcore.scaling.workload import Workload

    architecture = read_architecture(config, options.architecture)
    device_type = "cpu" if options.device == "cpu" else "cuda"
    return few_steps(Workload.of(config, architecture, _lengths(config, options), device_type))


def _lengths(config: RunConfig, options: argparse.Namespace) -> Lengths:
    from nvembed_mcore.scaling.lengths import sample_lengths

    return sample_lengths(config, options.lengths)


def read_architecture(config: RunConfig, given: str | None) -> Architecture:
    """The backbone's sizes, from `--architecture` or from where the configuration says.

    Raises:
        ConfigError: there is no config.json; the message says what helps.
    """
    if given is not None:
        return Architecture.read(given)
    source = config.model.config or config.model.init_from
    if not Path(source).is_file() and not (Path(source) / "config.json").is_file():
        field = "config" if config.model.config else "init_from"
        raise ConfigError(
            f"model.{field} is {source}, where no config.json is. Give the backbone's with --architecture; "
            f"Mistral-7B's is examples/recipes/mistral_7b_v0_1.json"
        )
    return Architecture.read(source)


def _print_stage(console: Tables, stage: Stage, machine: Cluster, options: argparse.Namespace) -> None:
    from nvembed_mcore.scaling import plan_report
    from nvembed_mcore.scaling.explain import FLOPS, figures_used
    from nvembed_mcore.scaling.predict import model_flops

    workload = stage.workload
    print(f"{stage.file}: {workload.tokens_per_step:,.0f} tokens a step, {workload.steps:,} steps")
    print(f"  lengths of texts: {workload.source}")
    for plan in stage.plans:
        console.print(plan_report.layouts(plan, workload, options.price, options.top))
        for line in plan_report.refusals(plan, options.top):
            print(line)
        if plan.fitting:
            print(f"  the fastest: {plan_report.options_of(plan.fitting[0].layout)}")
            if options.explain:
                console.print(plan_report.terms(plan.fitting[0]))
                console.print(plan_report.memory(plan.fitting[0]))
                if plan.gpus > 1:
                    console.print(plan_report.traffic(plan.fitting[0], workload, machine))
    if options.explain:
        print(FLOPS)
        print(f"Here {model_flops(workload) / 1e12:,.4g} TFLOP a step. With")
        print("\n".join(f"  {line}" for line in figures_used(workload, machine)))
