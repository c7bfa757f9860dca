"""Embeddings and metrics of an exported folder, in one process and without remote code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nvembed_mcore.checkpoint.hf_load import exported_prompt, load_exported
from nvembed_mcore.data.beir import read_beir
from nvembed_mcore.data.prompts import query_prompt
from nvembed_mcore.evaluation.retrieval import relevance_of, score_run, search
from nvembed_mcore.progress import progress


class ExportedEncoder:
    """An exported model as a function from texts to unit vectors.

    Args:
        directory: exported folder.
        instruction: task of the queries in one sentence; None takes the one the model was exported with.
        max_length: longest text in tokens, prompt and special tokens included.
        device: torch device.
    """

    def __init__(self, directory: str, *, instruction: str | None, max_length: int, device: str) -> None:
        self.model = load_exported(directory, device)
        self.prompt = exported_prompt(directory) if instruction is None else query_prompt(instruction)
        self.max_length = max_length

    def __call__(self, texts: Sequence[str], is_query: bool) -> torch.Tensor:
        """float32 [len(texts), D]; queries get the instruction in front."""
        done = 0
        with progress("embed", len(texts), "queries" if is_query else "documents") as shown:

            def count(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: object) -> None:
                nonlocal done
                done += len(inputs[0])
                shown.update(done)

            hook = self.model.register_forward_hook(count)
            try:
                return self.model.encode(list(texts), self.prompt if is_query else "", max_length=self.max_length)
            finally:
                hook.remove()


def evaluate_beir(encoder: Callable[[list[str], bool], torch.Tensor], folder: str | Path) -> dict[str, float]:
    """Retrieval metrics on a BEIR-format test set, by exact search."""
    beir = read_beir(Path(folder))
    queries = encoder(list(beir.queries.values()), True)
    documents = encoder(list(beir.corpus.values()), False)
    _, ranked = search(queries, documents, 100)
    return dict(score_run(ranked, relevance_of(beir)))
