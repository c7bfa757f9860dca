"""Train what the comparison needs, once: a finished part is read from its `result.json`."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nvembed_mcore.cli import main as nvembed_main
from nvembed_mcore.evaluation.embedders import Embedder, open_embedder
from nvembed_mcore.log import read_metrics
from nvembed_mcore.parallel.groups import shutdown
from tools.bench import quality_recipes as recipes
from tools.bench.quality_measure import IDENTIFY, Embed, Tasks, held_out_topics

ROOT = Path(__file__).parent.parent.parent
AT_ONCE = 512

Result = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """Folders of a study.

    Attributes:
        output: where runs and results go.
        quickstart: `tokenizer` and `data` of the quick start.
    """

    output: Path
    quickstart: Path

    @property
    def data(self) -> Path:
        return self.quickstart / "data"

    @property
    def mistral(self) -> dict[str, Any]:
        return json.loads((ROOT / "examples" / "quickstart" / "mistral.json").read_text(encoding="utf-8"))

    @cached_property
    def tasks(self) -> Tasks:
        """The held-out tasks; topics are found once for a study."""
        path = self.output / "held_out_topics.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(held_out_topics(self.data), indent=0) + "\n", encoding="utf-8")
        return Tasks(self.data, json.loads(path.read_text(encoding="utf-8")))

    def identity(self, parts: Any) -> str:
        """See `quality_recipes.identity`."""
        return recipes.identity(parts, {"OUTPUT": self.output, "QUICKSTART": self.quickstart}, self.data)


def done(folder: Path, identity: str) -> Result | None:
    """What a finished part measured, or None.

    Raises:
        ValueError: it is that of another configuration or of other data.
    """
    path = folder / "result.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text(encoding="utf-8"))
    if result["identity"] != identity:
        raise ValueError(
            f"{path} is of a configuration {result['identity']}, this study's would be {identity}; remove its folder "
            "or give another OUTPUT"
        )
    return result


def keep(folder: Path, result: Result, identity: str) -> Result:
    """Write a part's result, whole or not at all."""
    new = folder / "result.json.new"
    new.write_text(json.dumps(result | {"identity": identity}) + "\n", encoding="utf-8")
    new.replace(folder / "result.json")
    return result


def nvembed(*words: str) -> None:
    """A command of the trainer, in this process; its failure ends the program."""
    print(f"$ nvembed {' '.join(words)}", flush=True)
    if status := nvembed_main([*words]):
        sys.exit(status)


@contextmanager
def embedding_with(model: str) -> Iterator[Embed]:
    """The `Embed` of a run folder, by the trainer's own passes."""
    opened: dict[str, Embedder] = {}

    def embed(texts: list[str], instruction: str) -> np.ndarray:
        # Documents have none, so any embedder does.
        key = instruction or next(iter(opened), IDENTIFY)
        if key not in opened:
            opened[key] = open_embedder(model, instruction=key)
        parts = [texts[at : at + AT_ONCE] for at in range(0, len(texts), AT_ONCE)]
        return np.concatenate([opened[key].embed(part, bool(instruction)) for part in parts])

    try:
        yield embed
    finally:
        shutdown()


def recipe_identity(recipe: recipes.Recipe, study: Study) -> str:
    """Of the configuration of all its stages."""
    trees = recipes.trees(recipe, _folder(recipe, study), study.quickstart)
    return study.identity([trees, recipes.architecture(study.mistral, recipes.LAYERS)])


def train_recipe(recipe: recipes.Recipe, study: Study) -> Result:
    """All stages of a recipe, each measured; or the result that is there."""
    folder, identity = _folder(recipe, study), recipe_identity(recipe, study)
    if (found := done(folder, identity)) is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    architecture = recipes.architecture(study.mistral, recipes.LAYERS)
    (folder / "architecture.json").write_text(json.dumps(architecture, indent=1) + "\n", encoding="utf-8")
    stages = []
    for tree in recipes.trees(recipe, folder, study.quickstart):
        begin = time.process_time()
        run = train(tree, folder)
        seconds = time.process_time() - begin
        with embedding_with(str(run)) as embed:
            stages.append(study.tasks.measure(embed) | {"seconds": seconds, "tokens": tokens_of(run)})
    for tree in recipes.trees(recipe, folder, study.quickstart):
        shutil.rmtree(Path(tree["run_dir"]) / "checkpoints")
    print(f"{recipe.name}: {_shown(stages[-1])}", flush=True)
    return keep(folder, {"stages": stages}, identity)


def found_recipe(recipe: recipes.Recipe, study: Study) -> Result | None:
    """The result of a recipe that is finished."""
    return done(_folder(recipe, study), recipe_identity(recipe, study))


def train(tree: dict[str, Any], folder: Path, *more: str) -> Path:
    """`nvembed train` on a configuration; the run's folder."""
    run = Path(tree["run_dir"])
    config = folder / f"{run.name}.yaml"
    # JSON is YAML.
    config.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    nvembed("train", str(config), *more)
    return run


def steps_of(run: Path) -> list[dict[str, float]]:
    """A run's lines of training."""
    return [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def tokens_of(run: Path) -> int:
    """Tokens of texts that a run trained on."""
    return int(sum(line["real_tokens"] for line in steps_of(run)))


def _folder(recipe: recipes.Recipe, study: Study) -> Path:
    return study.output / "recipes" / recipe.name


def _shown(measures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in measures.items())


def all_of(wanted: Sequence[Any], find: Callable[[Any], Result | None]) -> dict[Any, Result]:
    """Of what was planned, what is finished."""
    return {one: result for one in wanted if (result := find(one)) is not None}
