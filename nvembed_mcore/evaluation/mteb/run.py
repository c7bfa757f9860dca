"""MTEB by all processes together: rank 0 runs mteb, and every replica of the model embeds a share of the texts.

Results are files of mteb in its layout, `results/<model>/<revision>/<task>.json`, so that its own tools read them. A
task whose file is there is not run again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import yaml

from nvembed_mcore.evaluation.embedders import SENTENCE_TRANSFORMERS, Embedder
from nvembed_mcore.evaluation.mteb.instructions import Instructions, MtebError, Sides
from nvembed_mcore.evaluation.mteb.share import Request, assemble, characters_per_block, embed_share
from nvembed_mcore.parallel.groups import Ask, first_rank_leads

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.results import TaskResult

NO_INSTRUCTIONS = "none"
_USED = "instructions.yaml"  # mteb takes every .json there for a result

Progress = Callable[[int, int, str], None]
"""Called with the number of finished tasks, of all tasks, and what is going on."""


@dataclass(frozen=True)
class Score:
    """A task's main score in per cent; `kind` is mteb's type of the task."""

    task: str
    kind: str
    score: float


def name_of_model(model: str) -> str:
    """`organisation/model` for mteb: the last two parts of a folder's path, or the name of a model of a hub."""
    name = model.removeprefix(SENTENCE_TRANSFORMERS)
    if model != name and not Path(name).is_dir():
        return name.partition("@")[0] if "/" in name else f"sentence-transformers/{name}"
    parts = Path(name).resolve().parts[-2:]
    return "/".join(part.strip("/") or "root" for part in parts)


def evaluate_mteb(
    embedder: Embedder,
    tasks: list[str | AbsTask],
    *,
    name: str,
    instructions: Instructions | None,
    folder: str | Path = ".",
    overwrite: bool = False,
    tokens_per_pack: int = 16384,
    progress: Progress | None = None,
) -> list[Score]:
    """Run tasks of MTEB; every rank calls this, with the same arguments.

    Args:
        tasks: as `tasks.find_tasks` takes them; only rank 0 looks at them.
        name: of the model in the results, as `organisation/model`.
        instructions: as `instructions.load_instructions` reads them; None: queries and documents as the model was
            trained on them.
        folder: `results/` is made in here.
        overwrite: run tasks again that have a result.
        tokens_per_pack: the token budget of the embedder's packs.
        progress: called on rank 0.

    Returns:
        The scores in the order of the tasks, on every rank.

    Raises:
        MtebError: mteb is missing; a task is unknown, has no instruction, or its data cannot be loaded; or results are
            there that were made with other instructions.
    """
    if "/" not in name:
        raise MtebError(f"the model's name must be organisation/model, got --name {name}")
    run = _Run(embedder, instructions, tokens_per_pack, progress or (lambda done, total, status: None))
    return first_rank_leads(lambda ask: run.lead(ask, tasks, name, Path(folder), overwrite), run.serve)


def check_tasks(tasks: list[str | AbsTask], instructions: Instructions | None) -> list[AbsTask]:
    """The tasks that names stand for, before a model is opened.

    Raises:
        MtebError: mteb is missing, or a task is unknown or has no instruction.
    """
    for package in ("mteb", "sentence_transformers"):  # mteb imports the other one for any model
        if importlib.util.find_spec(package) is None:
            raise MtebError(f"--mteb needs {package}, which is not installed: pip install nvembed_mcore[eval]")
    from nvembed_mcore.evaluation.mteb.tasks import find_tasks, parts_of

    found = find_tasks(tasks)
    if instructions is not None:
        for part in (part for task in found for part in parts_of(task)):
            instructions.of(part.metadata.name, part.metadata.type)
    return found


def revision_of(embedder: Embedder, table: Instructions | None) -> str:
    """Folder of the results of one model with one table: what embeddings depend on but for a task's instruction."""
    facts = [embedder.facts(True), embedder.facts(False)]
    if table is not None:
        facts = [one | {"prompt": "of the task"} for one in facts]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return f"{digest[:12]}-{NO_INSTRUCTIONS if table is None else table.name}"


class _Run:
    """What one process does."""

    def __init__(
        self, embedder: Embedder, table: Instructions | None, tokens_per_pack: int, progress: Progress
    ) -> None:
        self._embedder, self._table, self._progress = embedder, table, progress
        self._characters = characters_per_block(tokens_per_pack)
        self._task, self._texts, self._done, self._total = "", 0, 0, 0

    def serve(self, request: Request) -> tuple[list[int], np.ndarray] | None:
        """Every rank's part of a request."""
        return embed_share(self._embedder, request, self._characters, self._count)

    def _count(self, texts: int) -> None:
        """This replica embedded so many more texts of the task; the others about as many."""
        self._texts += texts * self._embedder.num_replicas
        self._progress(self._done, self._total, f"{self._task}, about {self._texts:,} texts")

    def lead(self, ask: Ask, wanted: list[str | AbsTask], name: str, folder: Path, overwrite: bool) -> list[Score]:
        """What rank 0 does."""
        tasks = check_tasks(wanted, self._table)
        self._open(ask, name, folder, overwrite)
        datasets.disable_progress_bars()  # of each step in the preparation of data
        from nvembed_mcore.evaluation.mteb.tasks import parts_of

        parts = {part.metadata.name: part for task in tasks for part in parts_of(task)}
        self._check_results(list(parts.values()))
        results: dict[str, TaskResult] = {}
        self._total = len(parts)
        for self._done, (self._task, part) in enumerate(parts.items()):
            self._texts = 0
            self._progress(self._done, self._total, self._task)
            results[self._task] = self._one(part)
            done = f"{self._task}: {_score(part, results[self._task]).score:.2f}"
            self._progress(self._done + 1, self._total, done)
        for task in tasks:
            if task.metadata.name not in results:
                own = [results[part.metadata.name] for part in parts_of(task)]
                results[task.metadata.name] = task.combine_task_results(own)
                self._cache.save_to_cache(results[task.metadata.name], self._meta)
        return [_score(task, results[task.metadata.name]) for task in tasks]

    def _open(self, ask: Ask, name: str, folder: Path, overwrite: bool) -> None:
        import mteb

        from nvembed_mcore.evaluation.mteb.encoder import Encoder, describe_model

        embedder, table = self._embedder, self._table
        limit = max(embedder.facts(is_query)["max_tokens"] or 0 for is_query in (True, False)) or None
        self._meta = describe_model(name, revision_of(embedder, table), embedder.dim, limit, table is not None)
        self._encoder = Encoder(lambda request: assemble(ask(request), embedder.dim), table, self._meta)
        self._cache, self._overwrite = mteb.ResultCache(folder), overwrite

    def _one(self, task: AbsTask) -> TaskResult:
        """The result of a task, from its file if there is one."""
        import mteb

        found = self._cache.load_task_result(task.metadata.name, self._meta)
        if found is not None and not self._overwrite and not found.get_missing_evaluations(task):
            return found
        if not task.data_loaded:
            try:
                task.load_data()
            except Exception as error:  # of a hub, of the network or of the task's own code: anything
                raise MtebError(
                    f"mteb could not load the data of {self._task}: {error}. It downloads what is not in its cache"
                ) from error
        if found is None:
            self._remember(task)  # a task of several languages may be cut off with some of them done
        mteb.evaluate(
            self._encoder,
            task,
            co2_tracker=False,
            cache=self._cache,
            overwrite_strategy="always" if self._overwrite else "only-missing",
            encode_kwargs={"batch_size": 256, "show_progress_bar": False},
            show_progress_bar=False,
        )
        task.unload_data()
        self._remember(task)
        return self._cache.load_task_result(self._task, self._meta)  # rounded, as it will be read the next time

    # The instructions that results were made with.

    def _check_results(self, tasks: list[AbsTask]) -> None:
        """Raise a `MtebError` for results that were made with another instruction."""
        if self._table is None:
            return
        used = self._used()
        for task in tasks:
            name = task.metadata.name
            now, before = _instruction_of(task, self._table), used.get(name)
            has_result = self._cache.load_task_result(name, self._meta) is not None
            if has_result and not self._overwrite and before not in (None, asdict(now)):
                raise MtebError(
                    f"{self._folder / f'{name}.json'} was made with the instruction {before}, now it is "
                    f"{asdict(now)}: give --overwrite, or another --output"
                )

    def _remember(self, task: AbsTask) -> None:
        if self._table is None:
            return
        used = self._used() | {task.metadata.name: asdict(_instruction_of(task, self._table))}
        self._folder.mkdir(parents=True, exist_ok=True)
        aside = self._folder / f".writing-{_USED}"
        aside.write_text(yaml.safe_dump(used, allow_unicode=True, width=1000), encoding="utf-8")
        os.replace(aside, self._folder / _USED)

    def _used(self) -> dict[str, Any]:
        file = self._folder / _USED
        return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}

    @property
    def _folder(self) -> Path:
        return self._cache.get_task_result_path("any", self._meta).parent


def _instruction_of(task: AbsTask, table: Instructions) -> Sides:
    return table.of(task.metadata.name, task.metadata.type)


def _score(task: AbsTask, result: TaskResult) -> Score:
    return Score(task.metadata.name, task.metadata.type, 100 * float(result.get_score()))
