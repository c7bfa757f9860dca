"""Any model of sentence-transformers as an `Embedder`: each process holds one."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nvembed_mcore import device
from nvembed_mcore.checkpoint.hf_folder import read_json
from nvembed_mcore.checkpoint.hf_model import check_implementations
from nvembed_mcore.config import ConfigError, ParallelConfig
from nvembed_mcore.data import prompts
from nvembed_mcore.data.tokenizer import tokenizer_fingerprint
from nvembed_mcore.evaluation.embedders import EmbedderError, fingerprint_of
from nvembed_mcore.parallel.groups import every_rank_does, initialize
from nvembed_mcore.paths import member

_SAMPLE = 4096
PINNED = re.compile(r"(.+)@([0-9a-f]{40})")


class SentenceEmbedder:
    """A model that sentence-transformers loads. An `Embedder`."""

    def __init__(
        self,
        model: str,
        *,
        instruction: str | None,
        max_length: int | None,
        parallel: ParallelConfig,
        token_budget: int,
        query_prompt: str | None,
        document_prompt: str | None,
        trust_remote_code: bool,
    ) -> None:
        """See `open_embedder`. Prompts that the model brings are used where no option gives others."""
        if (parallel.tp, parallel.pp) != (1, 1):
            raise ConfigError(
                f"st:{model} is whole in each process: --tp and --pp must be 1, got {parallel.tp} and {parallel.pp}"
            )
        pinned = None if Path(model).is_dir() else PINNED.fullmatch(model)
        self._name, revision = pinned.groups() if pinned else (model, None)
        self._code = None
        if trust_remote_code:
            self._code = "of the folder" if Path(model).is_dir() else revision
            if self._code is None:
                raise EmbedderError(
                    f"st:{model} --trust-remote-code would run any code that the hub has by then: name a revision "
                    f"that you have read, as st:{model}@ and its 40 hex digits"
                )
        groups = initialize(parallel)
        every_rank_does(lambda: self._load(revision, trust_remote_code, max_length))
        own = self._model.prompts or {}
        if query_prompt is None:
            query_prompt = own.get("query") or "" if instruction is None else prompts.query_prompt(instruction)
        self._prompts = {
            True: query_prompt,
            False: (own.get("document") or "") if document_prompt is None else document_prompt,
        }
        self._batch_size = max(1, token_budget // (self._model.max_seq_length or 512))
        self._weights = _fingerprint(self._model)
        self._model[0].register_forward_pre_hook(self._count)
        self.dim = self._model.get_embedding_dimension()
        self.num_replicas, self.replica, self.is_writer = groups.dp_size, groups.dp_rank, True
        self.tokens = self.positions = 0

    def _load(self, revision: str | None, trust_remote_code: bool, max_length: int | None) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise EmbedderError(
                f"st:{self._name} needs sentence-transformers: pip install nvembed_mcore[eval]"
            ) from error
        where = {"device": str(device.current()), "trust_remote_code": trust_remote_code, "revision": revision}
        try:
            if not trust_remote_code:
                check_code(self._name, revision)
            self._model = SentenceTransformer(self._name, **where).eval()
        except Exception as error:  # of transformers, the hub or the model's own code: anything
            raise EmbedderError(f"sentence-transformers cannot load {self._name}: {error}") from error
        if max_length is None:
            return
        if max_length < 3:
            raise EmbedderError(f"texts need room for 3 tokens at least, got --max-length {max_length}")
        config = getattr(getattr(self._model[0], "auto_model", None), "config", None)
        positions = getattr(config, "max_position_embeddings", None) or max_length
        if max_length > positions:
            raise EmbedderError(f"st:{self._name} knows {positions} positions, got --max-length {max_length}")
        self._model.max_seq_length = max_length

    def _count(self, module: torch.nn.Module, inputs: tuple[dict[str, Any], ...]) -> None:
        """Sees each padded batch on its way into the model."""
        features = inputs[0]
        if "input_ids" in features:
            size = features["input_ids"].numel()
            self.positions += size
            mask = features.get("attention_mask")
            self.tokens += size if mask is None else int(mask.sum())

    def embed(self, texts: list[str], is_query: bool, instruction: str | None = None) -> np.ndarray:
        """See `Embedder.embed`."""
        prompts.check_not_blank(texts)
        if not texts:
            return np.empty((0, self.dim), np.float32)
        found = self._model.encode(
            texts,
            prompt=self._prompts[is_query] if instruction is None else prompts.query_prompt(instruction),
            batch_size=self._batch_size,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return np.asarray(found, np.float32)

    def facts(self, is_query: bool) -> dict[str, Any]:
        """See `Embedder.facts`."""
        return {
            "weights": self._weights,
            "precision": str(next(self._model.parameters()).dtype).removeprefix("torch."),
            "prompt": self._prompts[is_query],
            "max_tokens": self._model.max_seq_length,
            "remote_code": self._code,
        }

    @property
    def fingerprint(self) -> str:
        """See `Embedder.fingerprint`."""
        return fingerprint_of(self)


def check_code(name: str, revision: str | None) -> None:
    """Refuse a model that names code which sentence-transformers before 6, or transformers before 5.3, would run
    although nobody trusts it: classes in `modules.json`, and what `check_implementations` finds.

    Raises:
        ValueError: it says which file names what.
    """
    from sentence_transformers.util import load_file_path

    file = load_file_path(name, "modules.json", revision=revision)
    modules = json.loads(Path(file).read_text(encoding="utf-8")) if file else []
    for module in modules:
        if not str(module["type"]).startswith("sentence_transformers."):
            raise ValueError(f"{file} names {module['type']!r}, a class of its own: --trust-remote-code would run it")
        if module["path"]:
            member(Path(file).parent, module["path"], Path(file))
    for place in {"", *(module["path"] for module in modules)}:
        settings = load_file_path(name, "config.json", subfolder=place, revision=revision)
        if settings:
            check_implementations(read_json(Path(settings)), Path(settings))


def _fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 of the modules with their settings, of the tokenizer, and of the first numbers of each tensor."""
    digest = hashlib.sha256(str(model).encode())
    if getattr(model.tokenizer, "is_fast", False):
        digest.update(tokenizer_fingerprint(model.tokenizer).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        numbers = tensor.detach().flatten()[:_SAMPLE].cpu().contiguous()
        digest.update(memoryview(numbers.view(torch.uint8).numpy()))
    return digest.hexdigest()
