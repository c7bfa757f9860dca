"""A trained model as a function from texts to unit vectors, in as many processes as one likes.

A model takes TP x PP processes; as many replicas of it as there are processes embed texts of their own, without
waiting for each other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from nvembed_mcore import device
from nvembed_mcore.build import build_encoders, read_architecture
from nvembed_mcore.checkpoint import store
from nvembed_mcore.checkpoint.hf_model import open_hf_model
from nvembed_mcore.checkpoint.import_run import describe
from nvembed_mcore.checkpoint.peft import SETTINGS_FILE
from nvembed_mcore.config import LoraConfig, ModelConfig, ParallelConfig, PoolingConfig, PrecisionConfig
from nvembed_mcore.data import prompts
from nvembed_mcore.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from nvembed_mcore.evaluation.encode import tokenize
from nvembed_mcore.model.backend import Fp8
from nvembed_mcore.parallel.groups import every_rank_does, first_rank_does, initialize
from nvembed_mcore.progress import progress
from nvembed_mcore.schedule import Chunks, embed_packs, packs_of_rank, plan_texts

SENTENCE_TRANSFORMERS = "st:"
"""In front of the name or folder of a model that sentence-transformers loads."""


_LIMITS = ("max_document_tokens", "max_query_tokens")


class EmbedderError(ValueError):
    """A model cannot embed as it is asked to; the message names the model, the option and both values."""


class Embedder(Protocol):
    """Embeds texts on one of `num_replicas` replicas of a model.

    Attributes:
        dim: D, the length of an embedding.
        num_replicas, replica: how many replicas there are, and the number of this process's.
        is_writer: whether `embed` gives this process the vectors; one process of each replica is told so.
        tokens, positions: tokens of texts so far, and the positions that were computed for them, pads included.
    """

    dim: int
    num_replicas: int
    replica: int
    is_writer: bool
    tokens: int
    positions: int

    def embed(self, texts: list[str], is_query: bool, instruction: str | None = None) -> np.ndarray | None:
        """Unit vectors, float32 [len(texts), D], for the writer and None for the other processes of the replica, which
        all call this with the same texts. The same texts give the same bits, whatever other replicas there are.

        Args:
            instruction: task of these texts in one sentence, empty for none; None: the model's own.

        Raises:
            ValueError: a text is blank; the message has its index.
        """
        ...

    def facts(self, is_query: bool) -> dict[str, Any]:
        """What embeddings of queries or of documents depend on, as JSON values: weights, tokenizer, prompt, limit."""
        ...

    @property
    def fingerprint(self) -> str:
        """64 hex digits of all its facts."""
        ...


def open_embedder(
    model: str,
    *,
    instruction: str | None = None,
    max_length: int | None = None,
    parallel: ParallelConfig | None = None,
    token_budget: int = 16384,
    tokenizer: str | None = None,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    trust_remote_code: bool = False,
    fp8: Fp8 = "off",
) -> Embedder:
    """Open a model on every rank; joins the processes and lays out their groups.

    Args:
        model: a run or checkpoint folder of ours; a Hugging Face folder of ours, of NV-Embed or of a Mistral base
            model (whose states are averaged); or `st:` and what sentence-transformers loads, a folder or the name of a
            model, perhaps with `@` and the 40 hex digits of a revision.
        instruction: task of the queries in one sentence; None takes what the model was trained or exported with.
        max_length: longest text in tokens, prompt and special tokens included; None takes the model's own limits.
        parallel: the layout; None: each process holds a whole model.
        token_budget: tokens of one pack, or of one padded batch of sentence-transformers.
        tokenizer: folder of the tokenizer; None takes the model's own.
        query_prompt, document_prompt: what stands in front, for `st:` only; None: that of `instruction`, or what the
            model has.
        trust_remote_code: let sentence-transformers run code that lies beside the model, for `st:` only; what is not a
            folder needs a revision then.
        fp8: how the linears of the layers round, not for `st:`. With `tensorwise` the texts of a pack share scales.

    Raises:
        EmbedderError: an option does not suit the model.
        ConfigError, WeightsError, CheckpointError, TokenizerError: the folder, its tokenizer or the layout cannot be
            used.
    """
    if token_budget < 1:
        raise EmbedderError(f"a pack must have at least 1 token, got --tokens-per-pack {token_budget}")
    how: dict[str, Any] = dict(
        instruction=instruction,
        max_length=max_length,
        parallel=parallel or ParallelConfig(),
        token_budget=token_budget,
    )
    sentence_options: dict[str, Any] = dict(
        query_prompt=query_prompt, document_prompt=document_prompt, trust_remote_code=trust_remote_code
    )
    _check_fp8(model, fp8)
    if model.startswith(SENTENCE_TRANSFORMERS):
        from nvembed_mcore.evaluation.sentence_embedder import SentenceEmbedder

        if tokenizer is not None:
            raise EmbedderError(f"{model} brings its own tokenizer; got --tokenizer {tokenizer}")
        return SentenceEmbedder(model.removeprefix(SENTENCE_TRANSFORMERS), **how, **sentence_options)
    for name, value in sentence_options.items():
        if value not in (None, False):
            raise EmbedderError(
                f"--{name.replace('_', '-')} is for models of sentence-transformers (st:...), and {model} is not one; "
                f"it takes an --instruction"
            )
    return PackedEmbedder(model, **how, tokenizer=tokenizer, fp8=fp8)


def _check_fp8(model: str, fp8: Fp8) -> None:
    if fp8 == "delayed":
        raise EmbedderError("--fp8 delayed scales by earlier steps of a training, and here are none; use tensorwise")
    if fp8 != "off" and model.startswith(SENTENCE_TRANSFORMERS):
        raise EmbedderError(f"--fp8 is for models that Megatron computes, and {model} is not one; got {fp8}")


class PackedEmbedder:
    """A model of ours, or that of a Hugging Face folder, as the trainer computes it: packed, by Megatron, in the
    data type of training. No gradients and no optimizer. An `Embedder`."""

    def __init__(
        self,
        model: str,
        *,
        instruction: str | None,
        max_length: int | None,
        parallel: ParallelConfig,
        token_budget: int,
        tokenizer: str | None,
        fp8: Fp8,
    ) -> None:
        """See `open_embedder`."""
        self._groups = initialize(parallel)
        facts, weights = first_rank_does(lambda: _describe(model))
        every_rank_does(lambda: self._load_tokenizer(model, facts, tokenizer))
        instruction = store.instruction_of(facts) if instruction is None else instruction
        data = facts["config"]["data"]
        limits = {name: data[name] if max_length is None else max_length for name in _LIMITS}
        self._how = {False: ("", limits["max_document_tokens"]), True: (instruction, limits["max_query_tokens"])}
        for how in self._how.values():
            prompts.check_room(self._tokenizer, *how)
        config = _model_config(model, facts)
        hf_config = read_architecture(config)
        precision = PrecisionConfig(dtype=facts["config"]["precision"]["dtype"], fp8=fp8)
        self._chunks: Chunks = build_encoders(config, hf_config, parallel, self._groups, precision=precision)
        for chunk in self._chunks:
            chunk.eval().requires_grad_(False)
        self._token_budget = token_budget
        self._facts = {
            "weights": weights,
            "precision": str(device.default_dtype(precision.dtype)).removeprefix("torch."),
            "tokenizer": self._tokenizer_fingerprint,
        } | ({"fp8": fp8} if fp8 != "off" else {})
        self.dim = hf_config.hidden_size
        self.num_replicas, self.replica = self._groups.dp_size, self._groups.dp_rank
        self.is_writer = self._groups.is_last_stage and self._groups.tp_rank == self._groups.cp_rank == 0
        self.tokens = self.positions = 0

    def _load_tokenizer(self, model: str, facts: dict[str, Any], given: str | None) -> None:
        """The model's tokenizer, which must be the one that it was trained with."""
        folder = given or facts["config"]["data"]["tokenizer"]
        if folder is None:
            raise EmbedderError(f"{model} knows no tokenizer; give its folder with --tokenizer")
        if not given and not Path(folder).is_dir():
            raise EmbedderError(f"the tokenizer of {model} is no more at {folder}; give it with --tokenizer")
        self._tokenizer = load_tokenizer(folder)
        has, had = tokenizer_fingerprint(self._tokenizer), facts["tokenizer"]
        self._tokenizer_fingerprint = has
        if had not in (None, has):
            raise EmbedderError(
                f"the tokenizer in {folder} is not the one of {model}: its fingerprint is {has}, the model had {had}"
            )
        size = facts["hf_config"]["vocab_size"]
        if len(self._tokenizer) > size:
            raise EmbedderError(
                f"the tokenizer in {folder} has {len(self._tokenizer)} ids, vocab_size of {model} is {size}"
            )

    def embed(self, texts: list[str], is_query: bool, instruction: str | None = None) -> np.ndarray | None:
        """See `Embedder.embed`."""
        own, limit = self._how[is_query]
        instruction = own if instruction is None else instruction
        rows = tokenize(self._tokenizer, texts, instruction, limit)
        plan = plan_texts([len(row) for row in rows], self._chunks, self._groups, self._token_budget, num_ranks=1)
        packs = packs_of_rank(rows, plan, self._chunks, self._groups, rank=0)
        with progress("embed", len(packs), "packs") as shown:
            embeddings = embed_packs(self._chunks, packs, lambda index, chunk: shown.update(index))
        self.tokens += sum(len(row) for row in rows)
        self.positions += sum(pack.padded_tokens for pack in packs)
        if not self.is_writer:
            return None
        found = np.empty((len(rows), self.dim), np.float32)
        found[plan.owned()[0]] = torch.cat(embeddings).cpu().numpy()
        return found

    def facts(self, is_query: bool) -> dict[str, Any]:
        """See `Embedder.facts`."""
        instruction, limit = self._how[is_query]
        return self._facts | {"prompt": prompts.query_prompt(instruction), "max_tokens": limit}

    @property
    def fingerprint(self) -> str:
        """See `Embedder.fingerprint`."""
        return fingerprint_of(self)


def fingerprint_of(embedder: Embedder) -> str:
    """SHA-256 of what an embedder says of its queries and its documents."""
    facts = [embedder.facts(True), embedder.facts(False)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _describe(model: str) -> tuple[dict[str, Any], str]:
    """The facts of a folder in the form of a run's, and its weights' fingerprint."""
    found = store.find_checkpoint(model)
    if found:
        return found.facts, store.fingerprint(found)
    path = Path(model)
    if not (path / "config.json").is_file():
        if (path / SETTINGS_FILE).is_file():
            raise EmbedderError(
                f"{model} holds low-rank adapters only. Give the run folder that trained them, or an export that has "
                f"them merged (nvembed export-hf RUN OUTPUT)"
            )
        raise EmbedderError(
            f"{model} is neither a run or checkpoint folder with a complete checkpoint nor a Hugging Face folder with "
            f"a config.json; a model of sentence-transformers is named st:{model}"
        )
    opened = open_hf_model(path)
    return describe(opened), opened.fingerprint()


def _model_config(model: str, facts: dict[str, Any]) -> ModelConfig:
    """The model of a folder as the configuration that builds it."""
    saved = facts["config"]["model"]
    lora = LoraConfig(**(saved.get("lora") or {}))
    return ModelConfig(
        init_from=model,
        attention_mask=saved["attention_mask"],
        pooling=PoolingConfig(**saved["pooling"]),
        lora=dataclasses.replace(lora, init_from=None),  # the checkpoint has the adapters
    )
