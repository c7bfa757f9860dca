"""`nvembed evaluate MODEL --mteb TASK...`: tasks of MTEB, alone or under torchrun."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from nvembed_mcore.cli.encode import is_first_rank
from nvembed_mcore.cli.results import give
from nvembed_mcore.progress import progress

_TASKS = (
    "tasks of MTEB by name, a benchmark of it ('MTEB(eng, v2)'), or `english` for the 56 tasks of NV-Embed's table 1; "
    "mteb downloads their data"
)
_INSTRUCTIONS = (
    "what stands before the texts of each task: `paper` (table 13), `published` (beside the weights of v2; the "
    "default), a YAML file of your own, or `none`: as the model was trained"
)


def add(command: argparse.ArgumentParser, data: argparse.Action) -> None:
    """Declare the options; with `--mteb` there is no `data`."""

    class Tasks(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            data.required = False
            setattr(namespace, self.dest, values)

    options = command.add_argument_group("MTEB")
    options.add_argument("--mteb", nargs="+", metavar="TASK", action=Tasks, help=_TASKS)
    options.add_argument("--instructions", metavar="TABLE", help=_INSTRUCTIONS)
    options.add_argument("--output", metavar="DIR", help="results/ is made in here (default: the current folder)")
    options.add_argument("--name", metavar="ORG/MODEL", help="of the model in the results; default: from its folder")
    options.add_argument("--overwrite", action="store_true", default=None, help="run tasks again that have a result")
    options.add_argument("--tokenizer", metavar="DIR", help="where the model's tokenizer lies; default: as recorded")
    options.add_argument("--tokens-per-pack", type=int, metavar="N", help="token budget of a pass (default 16384)")
    options.add_argument("--tp", type=int, metavar="N", help="tensor-parallel size (default 1)")
    options.add_argument("--pp", type=int, metavar="N", help="pipeline-parallel size (default 1)")


def check(arguments: argparse.Namespace) -> None:
    """Refuse options that would do nothing.

    Raises:
        ConfigError: it names them.
    """
    from nvembed_mcore.config import ConfigError

    if arguments.mteb is None:
        for name in ("instructions", "output", "name", "overwrite", "tokenizer", "tokens_per_pack", "tp", "pp"):
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)} is for --mteb TASK...")
        return
    if arguments.data is not None:
        raise ConfigError(
            f"evaluate takes DATA or --mteb, and got both: {arguments.data} and --mteb {' '.join(arguments.mteb)}"
        )
    if arguments.device is not None:
        raise ConfigError(f"--device {arguments.device} is for DATA: --mteb takes the GPUs where there are any")
    if arguments.instruction is not None and arguments.instructions != "none":
        raise ConfigError(
            f"--instruction {arguments.instruction!r} is for --instructions none: with a table each task has its own"
        )


def run(arguments: argparse.Namespace) -> None:
    """Every rank runs mteb's tasks; rank 0 prints the scores."""
    from nvembed_mcore.config import ParallelConfig
    from nvembed_mcore.evaluation.embedders import open_embedder
    from nvembed_mcore.evaluation.mteb.instructions import load_instructions
    from nvembed_mcore.evaluation.mteb.run import NO_INSTRUCTIONS, check_tasks, evaluate_mteb, name_of_model
    from nvembed_mcore.parallel.groups import first_rank_does, initialize

    source = arguments.instructions or "published"
    table = None if source == NO_INSTRUCTIONS else load_instructions(source)
    parallel = ParallelConfig(tp=arguments.tp or 1, pp=arguments.pp or 1)
    initialize(parallel)
    first_rank_does(lambda: len(check_tasks(arguments.mteb, table)))  # a large model takes minutes to open
    tokens_per_pack = 16384 if arguments.tokens_per_pack is None else arguments.tokens_per_pack
    embedder = open_embedder(
        arguments.model,
        instruction=arguments.instruction,
        max_length=arguments.max_length,
        parallel=parallel,
        token_budget=tokens_per_pack,
        tokenizer=arguments.tokenizer,
        fp8=arguments.fp8,
    )
    with progress("evaluate", None, "tasks") as shown:
        scores = evaluate_mteb(
            embedder,
            arguments.mteb,
            name=arguments.name or name_of_model(arguments.model),
            instructions=table,
            folder=arguments.output or ".",
            overwrite=bool(arguments.overwrite),
            tokens_per_pack=tokens_per_pack,
            progress=lambda done, total, status: shown.update(done, status, total=total),
        )
    if not is_first_rank():
        return
    from nvembed_mcore.evaluation.mteb.table import rows_of, text_of
    from nvembed_mcore.evaluation.mteb.tasks import english_tasks

    def show() -> None:
        english = {task.metadata.name: task.metadata.type for task in english_tasks()}
        print(text_of(rows_of(scores, english)))

    give([asdict(one) for one in scores], arguments.json, show)
