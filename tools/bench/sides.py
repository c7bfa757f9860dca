"""The sides of the training-step benchmark, each a process of its own that answers JSON lines.

`Side` starts and asks one; run as a program this file is one. A side sleeps while another is asked, so steps of
several sides can be timed in turns on the same cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from workload import Workload

Pairs = list[tuple[Any, Any]]
"""Queries and documents of a batch, as `nvembed_mcore.data.packing.Text`."""


class Side:
    """A running side: `ours`, `peer` or `loop`, with its settings."""

    def __init__(self, kind: str, workload: Workload, **settings: Any) -> None:
        threads = {name: str(workload.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        offline = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(Path(workload.folder) / "modules")}
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, __file__, kind, json.dumps(dataclasses.asdict(workload)), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads, **offline},
        )
        self._answer()  # it is ready

    def ask(self, command: str, **arguments: Any) -> Any:
        """Call a method of the side and wait for what it returns."""
        self._process.stdin.write(json.dumps([command, arguments]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"error: a side of the benchmark ended with {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Ours:
    """The trainer on one process."""

    def __init__(self, workload: Workload, way: str) -> None:
        from nvembed_mcore.build import build_model, read_architecture
        from nvembed_mcore.optim import build_optimizer
        from nvembed_mcore.parallel.groups import initialize
        from nvembed_mcore.step import ContrastiveStep

        self.workload, self.config = workload, workload.config
        groups = initialize(self.config.parallel)
        self.hf_config = read_architecture(self.config.model)
        self.chunks = build_model(self.config, self.hf_config, groups)
        self.optimizer = build_optimizer(self.config.optim, self.chunks)
        self.apply_step = ContrastiveStep(
            self.chunks,
            self.optimizer,
            groups,
            step=dataclasses.replace(self.config.step, way=way),
            loss=self.config.loss,
            seed=self.config.seed,
        )

    def step(self, number: int, window: Sequence[int]) -> dict[str, float]:
        """One whole step on batch `number`; the schedule's step is `number + 1`."""
        from nvembed_mcore import device
        from nvembed_mcore.metrics import PhaseTimer
        from nvembed_mcore.optim import set_learning_rate
        from nvembed_mcore.train import RELEASE_EVERY_STEPS

        batch = self.workload.source.batch(number)
        begin = time.perf_counter()
        set_learning_rate(self.optimizer, self.workload.learning_rate(number))
        output = self.apply_step(batch, number + 1, PhaseTimer())
        if (number + 1) % RELEASE_EVERY_STEPS == 0:
            device.release_unused_memory()
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "loss": output.loss, "tokens": output.real_tokens}

    def save(self, output: str) -> None:
        """Export the weights."""
        from nvembed_mcore.checkpoint.hf_export import export

        (chunk,) = self.chunks
        export(
            chunk.module.parameters_by_global_name().__getitem__,
            self.hf_config,
            self.config.model.pooling,
            output,
            tokenizer_dir=self.config.data.tokenizer,
            attention_mask=self.config.model.attention_mask,
            max_tokens=self.config.data.max_document_tokens,
            instruction=self.config.data.datasets[0].instruction,
            card_facts={},
        )


class _Exported:
    """What both padded sides share: AdamW as ours, and batches padded to the longest text of each column."""

    def __init__(self, workload: Workload, grouped: bool, sort: bool) -> None:
        """Args: grouped: batches of a window are dealt by length. sort: pairs of a batch stand in order of length."""
        self.workload, self.grouped, self.sort = workload, grouped, sort

    def _ready(self, network: Any) -> None:
        """`network` is the Hugging Face model that is trained and saved."""
        import torch

        self.network = network.float().train()
        optim = self.workload.config.optim
        matrices = [parameter for parameter in network.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in network.parameters() if parameter.dim() <= 1]
        groups = [dict(params=matrices, weight_decay=optim.weight_decay), dict(params=vectors, weight_decay=0.0)]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=optim.eps, fused=True)

    def _features(self, pairs: Pairs) -> list[dict[str, Any]]:
        import torch

        columns = []
        for texts in zip(*pairs, strict=True):
            lengths = np.array([len(text) for text in texts])
            ids = np.zeros((len(texts), lengths.max()), np.int64)
            for row, text in zip(ids, texts, strict=True):
                row[: len(text)] = text.token_ids
            mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
            prompt = dict(prompt_length=texts[0].pooled_from) if texts[0].pooled_from else {}
            columns.append(dict(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)) | prompt)
        return columns

    def step(self, number: int, window: Sequence[int]) -> dict[str, float]:
        """One whole step on batch `number`, or on the batch of that place in `window` dealt by length."""
        import torch

        workload = self.workload
        pairs = workload.grouped_pairs(window, window.index(number)) if self.grouped else workload.pairs(number)
        if self.sort:
            pairs = sorted(pairs, key=lambda pair: -len(pair[1]))
        features = self._features(pairs)
        begin = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = workload.learning_rate(number)
        self.optimizer.zero_grad()
        loss = self.loss(features)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), workload.config.optim.clip_norm)
        self.optimizer.step()
        value = loss.item()
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "loss": value, "tokens": sum(len(text) for pair in pairs for text in pair)}

    def save(self, output: str) -> None:
        """The initial export with this side's weights in place of its own."""
        from safetensors.torch import save_file

        shutil.copytree(self.workload.initial, output)
        save_file(self.network.state_dict(), Path(output) / "model.safetensors", metadata={"format": "pt"})


class Peer(_Exported):
    """sentence-transformers: its model around the export, and its own losses."""

    def __init__(self, workload: Workload, cached: bool, grouped: bool = False, sort: bool = False) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import (
            CachedMultipleNegativesRankingLoss,
            MultipleNegativesRankingLoss,
        )

        super().__init__(workload, grouped, sort)
        model = SentenceTransformer(str(workload.initial), trust_remote_code=True, device="cpu").train()
        make = CachedMultipleNegativesRankingLoss if cached else MultipleNegativesRankingLoss
        self.objective = make(model, scale=1 / workload.config.loss.temperature)
        self._ready(model[0].model)

    def loss(self, features: list[dict[str, Any]]) -> Any:
        return self.objective(features, None)

    def mini_batch(self, size: int | None, tokens: int | None) -> None:
        """Set the cached loss's mini-batches: so many texts, or as many as have so many tokens."""
        if size is not None:
            self.objective.mini_batch_size = size
        self.objective.mini_batch_num_tokens = tokens


class Loop(_Exported):
    """A padded loop over the exported model without any training library."""

    def __init__(self, workload: Workload) -> None:
        from transformers import AutoModel

        super().__init__(workload, grouped=False, sort=False)
        self._ready(AutoModel.from_pretrained(workload.initial, trust_remote_code=True, dtype="float32"))

    def loss(self, features: list[dict[str, Any]]) -> Any:
        import torch

        queries, documents = (self._embed(**column) for column in features)
        scores = queries @ documents.T / self.workload.config.loss.temperature
        return torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)))

    def _embed(self, input_ids: Any, attention_mask: Any, prompt_length: int = 0) -> Any:
        pool_mask = attention_mask.clone()
        pool_mask[:, :prompt_length] = 0
        return self.network(input_ids, attention_mask, pool_mask).sentence_embeddings


def memory() -> int:
    """Bytes: the high-water mark of this process's resident set."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def serve(kind: str, workload: Workload, settings: dict[str, Any]) -> None:
    """Answer one line of JSON to each line of standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    import torch

    torch.set_num_threads(workload.threads)
    side = {"ours": Ours, "peer": Peer, "loop": Loop}[kind](workload, **settings)
    commands: dict[str, Callable] = {"memory": memory}

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    answer("ready")
    for line in sys.stdin:
        command, arguments = json.loads(line)
        answer(commands.get(command, getattr(side, command, None))(**arguments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["ours", "peer", "loop"])
    parser.add_argument("workload", type=json.loads)
    parser.add_argument("settings", type=json.loads)
    arguments = parser.parse_args()
    serve(arguments.kind, Workload(**arguments.workload), arguments.settings)


if __name__ == "__main__":
    main()
