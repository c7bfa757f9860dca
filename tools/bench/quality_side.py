"""One model trained twice: by this trainer and by sentence-transformers' own, on the same records in the same order.

Both load the same folder of random weights, an export in the format `mean`: a plain `MistralModel`, so no code of ours
runs on the other side. `SentenceTransformerTrainer` tokenises, batches, pools and steps by itself; it is given the
records in our order, the prompt, the limits and the numbers of the recipe. Two things of it are replaced: the sampler,
by one that takes rows as they come, and the schedule, which in transformers is one step behind ours (there the first
step has rate 0, here the last one).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from examples.quickstart.measure import export_untrained
from nvembed_mcore.cli.run_config import read_run_config
from nvembed_mcore.config import RunConfig
from nvembed_mcore.data.blend import choose_negatives
from nvembed_mcore.data.prompts import query_prompt
from nvembed_mcore.data.tokenizer import load_tokenizer
from nvembed_mcore.optim import learning_rate
from nvembed_mcore.train import batch_source, build_stores
from tools.bench import quality_recipes as recipes
from tools.bench.quality_measure import Embed, Tasks
from tools.bench.quality_runs import Result, Study, done, keep, nvembed, steps_of, tokens_of, train

SMALL_PACKS = ("--step.way", "cached", "--step.tokens_per_microbatch", "1024")
"""The same arithmetic in another order of summing: what it changes is what rounding changes."""
LAYERS, RATE = 1, 6e-3
COLUMNS = ("anchor", "positive", "negative")


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """A model and a recipe that both trainers follow.

    Attributes:
        seed: of the weights and of the order.
        steps: of the schedule.
        batch: records in a step, each with one hard negative.
        cached_steps: so many steps are also taken with both cached losses; 0: none.
    """

    seed: int = 1
    steps: int = 240
    batch: int = 64
    cached_steps: int = 0

    @property
    def name(self) -> str:
        return f"seed{self.seed}"

    def tree(self, folder: Path, study: Study) -> dict[str, Any]:
        """Our configuration. What MultipleNegativesRankingLoss has no word for is off: it masks no document."""
        (retrieval,) = recipes.datasets("retrieval", study.quickstart)
        return {
            "run_dir": str(folder / "ours"),
            "seed": self.seed,
            "steps": self.steps,
            "batch_size": self.batch,
            "data": recipes.data_tree(study.quickstart, study.output / "tokens")
            | {"max_document_tokens": recipes.MAX_QUERY_TOKENS, "datasets": [retrieval | {"num_negatives": 1}]},
            "model": {"init_from": str(folder / "initial"), "pooling": {"kind": "mean"}},
            "step": {"tokens_per_microbatch": 8192},
            "loss": {"temperature": recipes.TEMPERATURE, "mask_same_document": False},
            "optim": {"lr": RATE, "warmup_steps": max(1, round(recipes.WARMUP * self.steps))},
            "checkpoint": {"every_steps": self.steps},
            "parallel": {"timeout_minutes": 1e6},
            "log": {"tensorboard": False, "progress": False},
        }


def found_pairing(pairing: Pairing, study: Study) -> Result | None:
    """The result of a pairing that is finished."""
    return done(_folder(pairing, study), _identity(pairing, study))


def train_both(pairing: Pairing, study: Study) -> Result:
    """Losses, gradient norms, seconds and held-out quality of both, or the result that is there."""
    folder, identity = _folder(pairing, study), _identity(pairing, study)
    if (found := done(folder, identity)) is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    tree, initial = pairing.tree(folder, study), folder / "initial"
    if not initial.exists():
        _write_initial(tree, folder, study)
    (folder / "ours.yaml").write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    config = read_run_config([str(folder / "ours.yaml")])
    rows = records_in_order(config)
    result = {"peer": train_peer(config, rows, initial, folder / "peer")}
    result |= {"ours": _train_ours(tree, folder), "repacked": _train_ours(tree, folder, *SMALL_PACKS)}
    if pairing.cached_steps:
        stop = dict(cached=True, stop_at=pairing.cached_steps)
        result["peer_cached"] = train_peer(config, rows, initial, folder / "peer_cached", **stop)
    result["changed"] = {name: _change(folder, "ours", name) for name in ("peer", "repacked")}
    tasks = Tasks(study.data, {})
    result["quality"] = {
        name: tasks.measure(embedding_by_peer(folder / name)) for name in ("initial", "ours", "peer", "repacked")
    }
    print(f"{pairing.name}: {result['quality']}", flush=True)
    return keep(folder, result, identity)


def _identity(pairing: Pairing, study: Study) -> str:
    tree = pairing.tree(_folder(pairing, study), study)
    return study.identity([tree, pairing.cached_steps, SMALL_PACKS, recipes.architecture(study.mistral, LAYERS)])


def _folder(pairing: Pairing, study: Study) -> Path:
    return study.output / "side" / pairing.name


def _write_initial(tree: dict[str, Any], folder: Path, study: Study) -> None:
    """The folder that both begin with."""
    architecture = folder / "architecture.json"
    architecture.write_text(json.dumps(recipes.architecture(study.mistral, LAYERS), indent=1) + "\n", encoding="utf-8")
    model = {"config": str(architecture), "pooling": {"kind": "mean"}, "attention_mask": "bidirectional"}
    export_untrained(tree | {"model": model}, folder / "initial", "mean")


def records_in_order(config: RunConfig) -> list[tuple[str, ...]]:
    """Query, document and hard negative of each record in the order in which our batches have them."""
    (dataset,) = config.data.datasets
    records = [json.loads(line) for line in Path(dataset.path).read_text(encoding="utf-8").splitlines()]
    tokenizer = load_tokenizer(config.data.tokenizer)
    source = batch_source(config, build_stores(config.data, tokenizer, with_scores=False))
    rows = []
    for step in range(config.steps):
        for drawn in source.blend.samples(step):
            record = records[source.record_of(drawn)]
            (negative,) = choose_negatives(len(record["neg"]), 1, seed=config.seed, stage=config.stage, sample=drawn)
            rows.append((record["query"], record["pos"][0], record["neg"][negative]))
    return rows


def _train_ours(tree: dict[str, Any], folder: Path, *more: str) -> Result:
    """A run of `nvembed train`, exported beside it."""
    name = "repacked" if more else "ours"
    begin = time.process_time()
    run = train(tree | {"run_dir": str(folder / f"{name}_run")}, folder, *more)
    seconds = time.process_time() - begin
    if not (folder / name).exists():
        nvembed("export-hf", str(run), str(folder / name), "--format", "mean")
    lines = steps_of(run)
    found = {"losses": [line["loss"] for line in lines], "norms": [line["grad_norm"] for line in lines]}
    return found | {"seconds": seconds, "tokens": tokens_of(run)}


def train_peer(
    config: RunConfig,
    rows: Sequence[tuple[str, ...]],
    initial: Path,
    output: Path,
    *,
    cached: bool = False,
    stop_at: int | None = None,
) -> Result:
    """`SentenceTransformerTrainer` on the rows as they come, with the numbers of our configuration; saves the model.

    Args:
        rows: as `records_in_order` gives them.
        cached: CachedMultipleNegativesRankingLoss instead of MultipleNegativesRankingLoss.
        stop_at: end after so many steps of the schedule.
    """
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses

    model = SentenceTransformer(str(initial), device="cpu")
    kind = losses.CachedMultipleNegativesRankingLoss if cached else losses.MultipleNegativesRankingLoss
    trainer = _trainer(config, stop_at)(
        model=model,
        args=_arguments(config, output, model.prompts["query"]),
        train_dataset=Dataset.from_dict(dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))),
        loss=kind(model, scale=1 / config.loss.temperature),
    )
    # It prints each step's line.
    trainer.remove_callback(next(type(one) for one in trainer.callback_handler.callbacks if "Printer" in str(one)))
    begin = time.process_time()
    trainer.train()
    seconds = time.process_time() - begin
    norms = [float(line["grad_norm"]) for line in trainer.state.log_history if "grad_norm" in line]
    model.save(str(output), create_model_card=False)
    return {"losses": trainer.losses, "norms": norms, "seconds": seconds}


def _arguments(config: RunConfig, output: Path, prompt: str) -> Any:
    from sentence_transformers import SentenceTransformerTrainingArguments
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from torch.utils.data import SequentialSampler

    def in_order(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> DefaultBatchSampler:
        return DefaultBatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)

    return SentenceTransformerTrainingArguments(
        output_dir=str(output),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.optim.lr,
        weight_decay=config.optim.weight_decay,
        adam_beta1=config.optim.betas[0],
        adam_beta2=config.optim.betas[1],
        adam_epsilon=config.optim.eps,
        max_grad_norm=config.optim.clip_norm,
        prompts={COLUMNS[0]: prompt},
        batch_sampler=in_order,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )


def _trainer(config: RunConfig, stop_at: int | None) -> type:
    """Its trainer with our schedule; keeps the losses, of which its log has four digits."""
    from sentence_transformers import SentenceTransformerTrainer

    class Recorded(SentenceTransformerTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if not hasattr(self, "losses"):
                self.losses: list[float] = []
            loss = super().compute_loss(*args, **kwargs)
            self.losses.append(loss.item())
            self.control.should_training_stop = len(self.losses) == stop_at
            return loss

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            def share(step: int) -> float:
                return learning_rate(config.optim, min(step + 1, config.steps), config.steps) / config.optim.lr

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, share)
            return self.lr_scheduler

    return Recorded


def embedding_by_peer(folder: Path) -> Embed:
    """The `Embed` of an exported or saved folder, by sentence-transformers, whoever trained it."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")

    def embed(texts: list[str], instruction: str) -> np.ndarray:
        prompt = query_prompt(instruction)
        return model.encode(texts, prompt=prompt, batch_size=128, normalize_embeddings=True, show_progress_bar=False)

    return embed


def _change(folder: Path, one: str, other: str) -> float:
    """How far the weights of two end apart, as a part of the way that training took one."""
    begin, first, second = (load_file(folder / name / "model.safetensors") for name in ("initial", one, other))
    if not begin.keys() == first.keys() == second.keys():
        raise ValueError(f"{folder / one} and {folder / other} hold other weights than {folder / 'initial'}")
    apart = sum((first[name] - second[name]).square().sum() for name in begin)
    way = sum((first[name] - begin[name]).square().sum() for name in begin)
    return float((apart / way).sqrt())
