"""The quick start: real data, two stages of training, export, evaluation, and proof that this is Megatron.

`run.sh` calls it inside .venv. Each step is a documented command that you could type; the commands are printed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import yaml
from measure import Held, Scores, dense_rankings, example_searches, fused, untrained_export
from proofs import kill_and_resume, same_gradient_in_another_layout
from rich.console import Console
from rich.table import Table

from nvembed_mcore.evaluation.lexical import bm25_rank
from nvembed_mcore.evaluation.plots import plot_run
from nvembed_mcore.log import read_metrics

HERE = Path(__file__).parent
PROCESSES = 2
console = Console(highlight=False, soft_wrap=True)

PLAN = """\
What happens now, on {cores} CPU cores, in about 12 minutes:
  1. data       parse the installed Python packages into a code search set, check it   ~1 minute
  2. stage 1    train a small Mistral from random weights on {processes} processes      ~5 minutes
  3. mining     let that model find hard negatives among all documents           ~1 minute
  4. stage 2    go on with retrieval and classification, no in-batch negatives;
                once with mined negatives, once with code of the same file       ~2 minutes
  5. export     write a Hugging Face folder, evaluate it beside BM25             ~1 minute
  6. proofs     another layout gives the same gradient; kill -9 loses nothing    ~1 minute
Everything is written to {output}."""


def main() -> None:
    """Run all steps; ends with a table and `summary.json`."""
    options, overrides = _options()
    output = Path(options.output)
    began = time.monotonic()
    if (output / "summary.json").exists() or (output / "stage1").exists():
        sys.exit(f"error: {output} holds an earlier quick start; remove it or choose another folder with --output")
    logging.getLogger("bm25s").setLevel(logging.ERROR)
    console.print(PLAN.format(cores=psutil.cpu_count(), processes=PROCESSES, output=output))
    with PeakMemory() as memory:
        _command("nvembed", "data", "tokenizer", str(output / "tokenizer"))
        docs = ["data", "python-docs", str(output / "data"), "--tokenizer", str(output / "tokenizer")]
        sizes = ["--held-out", str(options.held_out), "--negatives", "2", "--packages", *options.packages]
        _command("nvembed", *docs, *sizes)
        configs = [_stage_config(number, output, options) for number in (1, 2)]
        _check(output)
        stages = [_train(configs[0], overrides)]
        _mine(stages[0], output)
        _command("nvembed", "data", "plan", *map(str, configs))
        stages.append(_train(configs[1], overrides))
        neighbours = _train(_with_neighbours(configs[1], output), overrides)
        export_dir = output / "export"
        _command("nvembed", "export-hf", str(stages[1]), str(export_dir))
        scores = _evaluate(output, stages, neighbours, export_dir)
        if not options.skip_proofs:
            _heading("This is Megatron-Core")
            console.print(same_gradient_in_another_layout(output / "proofs", output / "stage1" / "config.yaml"))
            console.print(kill_and_resume(output / "proofs", output / "stage1" / "config.yaml"))
    _finish(output, stages, export_dir, scores, time.monotonic() - began, memory.peak_bytes)


def _options() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/quickstart", help="folder for everything (default runs/quickstart)")
    parser.add_argument("--stage1-steps", type=int, help="optimizer steps of stage 1 (default: that of stage1.yaml)")
    parser.add_argument("--stage2-steps", type=int, help="optimizer steps of stage 2 (default: that of stage2.yaml)")
    parser.add_argument("--held-out", type=int, default=3000, help="held-out queries (default 3000)")
    packages = ["stdlib", "numpy", "torch", "transformers"]
    parser.add_argument("--packages", nargs="+", default=packages, help="installed packages to learn from")
    parser.add_argument("--skip-proofs", action="store_true", help="leave out step 6")
    options, rest = parser.parse_known_args()
    if wrong := [word for word in rest[::2] if not word.startswith("--parallel.")]:
        parser.error(f"unknown option {wrong[0]}; only those that begin with --parallel. go on to the training runs")
    return options, rest


def _stage_config(number: int, output: Path, options: argparse.Namespace) -> Path:
    """The stage's YAML file with `--output` and the number of steps put in; written beside the run."""
    text = (HERE / f"stage{number}.yaml").read_text(encoding="utf-8").replace("runs/quickstart", str(output))
    config = yaml.safe_load(text)
    if steps := getattr(options, f"stage{number}_steps"):
        config["steps"] = steps
        config["optim"]["warmup_steps"] = min(config["optim"]["warmup_steps"], steps)
    path = output / f"stage{number}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def _train(config: Path, overrides: Sequence[str]) -> Path:
    _heading(f"Training {config.stem}")
    torchrun = ["torchrun", "--nproc-per-node", str(PROCESSES), "-m", "nvembed_mcore"]
    _command(*torchrun, "train", str(config), *overrides)
    return config.with_suffix("")


def _check(output: Path) -> None:
    """What is in the data of both stages, and whether the held-out set is in it."""
    sets = [str(output / "data" / name) for name in ("train.jsonl", "stage2_topics.jsonl")]
    limits = ["--tokenizer", str(output / "tokenizer"), "--max-query-tokens", "64", "--max-document-tokens", "128"]
    against = ["--against", str(output / "data" / "heldout"), "--report", str(output / "check.html")]
    _command("nvembed", "data", "check", "--data", *sets, *limits, *against)


def _mine(run: Path, output: Path) -> None:
    """Hard negatives for stage 2 by the model of stage 1, as many as the records had."""
    _heading("Mining hard negatives")
    records, mined = output / "data" / "train.jsonl", output / "mined"
    torchrun = ["torchrun", "--nproc-per-node", str(PROCESSES), "-m", "nvembed_mcore"]
    _command(*torchrun, "mine", str(run), str(records), str(mined), "--negatives", "2")


def _with_neighbours(config: Path, output: Path) -> Path:
    """Stage 2 with the negatives that the records came with: other code of the same file."""
    tree = yaml.safe_load(config.read_text(encoding="utf-8"))
    tree["run_dir"] = str(output / "stage2_neighbours")
    tree["data"]["datasets"][0]["path"] = str(output / "data" / "train.jsonl")
    path = output / "stage2_neighbours.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path


def _command(*words: str) -> None:
    """Show a command, run it, and end with its status when it fails."""
    console.print(f"\n[bold]$ {' '.join(words)}[/bold]")
    # One thread a process in the training runs, which are as many as there are cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if words[0] == "torchrun" else None
    status = subprocess.run(words, env=environment).returncode  # noqa: S603
    if status:
        sys.exit(status)


def _heading(text: str) -> None:
    console.print(f"\n[bold cyan]{text}[/bold cyan]")


def _evaluate(output: Path, stages: list[Path], neighbours: Path, export_dir: Path) -> dict[str, Scores]:
    """All rows of the final table; shows a few searches before and after on the way."""
    _heading("Evaluating")
    held, hidden = Held(output / "data" / "heldout"), Held(output / "data" / "heldout_hidden_names")
    before = _evaluations(stages[0])
    scores = {"untrained": before[0], "stage1": before[-1], "stage2": _evaluations(stages[1])[-1]}
    scores["stage2, negatives of the same file"] = _evaluations(neighbours)[-1]
    lexical, lexical_hidden = (bm25_rank(one.documents, one.queries, 100) for one in (held, hidden))
    dense, dense_hidden = dense_rankings(export_dir, held.queries, held.documents, hidden.documents)
    scores["bm25"] = held.score(lexical)
    scores["bm25 + stage2"] = held.score(fused(lexical, dense))
    scores["stage2, names hidden"] = hidden.score(dense_hidden)
    scores["bm25, names hidden"] = hidden.score(lexical_hidden)
    scores["bm25 + stage2, names hidden"] = hidden.score(fused(lexical_hidden, dense_hidden))
    untrained = untrained_export(stages[0], output / "untrained")
    console.print(example_searches(held, untrained, dense))
    return scores


def _evaluations(run: Path) -> list[Scores]:
    lines = read_metrics(run / "metrics.jsonl")
    return [{name: line[name] for name in line if name != "step"} for line in lines if "loss" not in line]


def _finish(
    output: Path, stages: list[Path], export_dir: Path, scores: dict[str, Scores], seconds: float, peak_bytes: int
) -> None:
    """The plot, the table, the three lines of Python, and `summary.json`."""
    metrics = [run / "metrics.jsonl" for run in stages]
    plot_run(metrics, output / "training.png", {"BM25": scores["bm25"]["ndcg_at_10"]})
    table = Table(title="Held-out code search")
    columns = {
        "ndcg_at_10": "nDCG@10",
        "recall_at_10": "recall@10",
        "recall_at_100": "recall@100",
        "mrr_at_10": "MRR@10",
    }
    for heading in ("", *columns.values()):
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in scores.items():
        table.add_row(name, *(f"{row[column]:.3f}" for column in columns))
    console.print(table)
    mined, given = (scores[name]["ndcg_at_10"] for name in ("stage2", "stage2, negatives of the same file"))
    console.print(
        f"Stage 2 with mined hard negatives instead of code of the same file: "
        f"nDCG@10 {mined:.4f} instead of {given:.4f}."
    )
    steps = [line for path in metrics for line in read_metrics(path) if "loss" in line]
    real, padded = (sum(line[name] for line in steps) for name in ("real_tokens", "padded_tokens"))
    summary = {
        **scores,
        "seconds": round(seconds, 1),
        "peak_memory_gb": round(peak_bytes / 1e9, 2),
        "tokens_per_second": round(real / sum(line["seconds"] for line in steps)),
        "pad_fraction": 1 - real / padded,
        "export_dir": str(export_dir),
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    console.print(
        f"{seconds / 60:.1f} minutes, {summary['peak_memory_gb']} GB at most, "
        f"{summary['tokens_per_second']:,} real tokens a second. Curves: {output / 'training.png'}\n\n"
        f"Use it:\n"
        f"  from sentence_transformers import SentenceTransformer\n"
        f"  model = SentenceTransformer('{export_dir}', trust_remote_code=True)\n"
        f"  model.encode('read a file line by line', prompt_name='query')\n\n"
        f"Try it:\n  nvembed search {export_dir} .venv/lib/python3*/site-packages/numpy/lib 'remove duplicate values'"
    )


class PeakMemory:
    """Largest memory of this process and all its children together, sampled once a second.

    A page that several processes share (libraries; the weights of a forked checkpoint writer) counts once.
    """

    def __enter__(self) -> PeakMemory:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(1.0):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:
                    continue  # it ended between the two calls
            self.peak_bytes = max(self.peak_bytes, total)


if __name__ == "__main__":
    main()
