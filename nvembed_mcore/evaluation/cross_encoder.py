"""A cross-encoder of sentence-transformers: a model that reads query and document together and gives a score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from nvembed_mcore import device
from nvembed_mcore.config import ParallelConfig
from nvembed_mcore.evaluation.embedders import EmbedderError
from nvembed_mcore.evaluation.sentence_embedder import PINNED, check_code
from nvembed_mcore.parallel.groups import every_rank_does, initialize

CROSS_ENCODER = "ce:"
"""In front of the name or folder of a cross-encoder."""
_DEFAULT_LENGTH = 512


class CrossEncoderScorer:
    """Scores pairs of texts; each process holds the whole model."""

    def __init__(self, name: str, *, max_length: int | None = None, token_budget: int = 16384) -> None:
        """Load it on every rank; joins the processes.

        Args:
            name: a folder, or the name of a model, perhaps with `@` and the 40 hex digits of a revision.
            max_length: longest pair in tokens; None: the model's own limit.
            token_budget: tokens of one padded batch.

        Raises:
            EmbedderError: sentence-transformers cannot load it, it would run code of its own, or it gives a pair more
                than one score.
        """
        pinned = None if Path(name).is_dir() else PINNED.fullmatch(name)
        self._name, revision = pinned.groups() if pinned else (name, None)
        initialize(ParallelConfig())
        every_rank_does(lambda: self._load(revision, max_length))
        longest = max_length or getattr(self._model.config, "max_position_embeddings", _DEFAULT_LENGTH)
        self._batch_size = max(1, token_budget // longest)

    def _load(self, revision: str | None, max_length: int | None) -> None:
        try:
            from sentence_transformers import CrossEncoder
        except ImportError as error:
            raise EmbedderError(
                f"{CROSS_ENCODER}{self._name} needs sentence-transformers: pip install nvembed_mcore[eval]"
            ) from error
        where = {"device": str(device.current()), "revision": revision, "trust_remote_code": False}
        try:
            check_code(self._name, revision)
            self._model = CrossEncoder(self._name, max_length=max_length, **where)
        except Exception as error:  # of transformers or the hub: anything
            raise EmbedderError(f"sentence-transformers cannot load {self._name}: {error}") from error
        labels = self._model.config.num_labels
        if labels != 1:
            raise EmbedderError(f"{CROSS_ENCODER}{self._name} gives a pair {labels} scores; a teacher gives 1")

    def scores(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Of each (query, document) the model's logit, float32 [pairs]: without a sigmoid, whatever the model has."""
        if not pairs:
            return np.empty(0, np.float32)
        how = dict(batch_size=self._batch_size, show_progress_bar=False, activation_fn=torch.nn.Identity())
        return np.asarray(self._model.predict(list(pairs), **how), np.float32)
