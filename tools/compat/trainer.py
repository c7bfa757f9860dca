"""Tiny exports of random weights, and what the trainer's own encoder says of texts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import MistralConfig

from nvembed_mcore.checkpoint.hf_export import export
from nvembed_mcore.checkpoint.hf_import import RandomWeights, load_weights
from nvembed_mcore.checkpoint.hf_model import open_hf_model
from nvembed_mcore.checkpoint.names import local_shard, name_table
from nvembed_mcore.config import ModelConfig, ParallelConfig, PoolingConfig, PrecisionConfig
from nvembed_mcore.data.tokenizer import load_tokenizer, write_mistral_tokenizer
from nvembed_mcore.evaluation.encode import tokenize
from nvembed_mcore.model.encoder import Encoder, wrap_data_parallel
from nvembed_mcore.parallel.groups import initialize
from nvembed_mcore.schedule import embed_texts

KINDS = ("latent", "self_attention", "multi_layer", "mean", "last")
LIMIT = 64
INITIALIZER_RANGE, SHARPNESS = 0.05, 3.0
INSTRUCTION = "Given a question, retrieve passages that answer the question"


def make_exports(folder: Path) -> list[Path]:
    """One export of each kind of pooling in the format `nv-embed`, a causal one, and one in the format `mean`."""
    write_mistral_tokenizer(folder / "tokenizer")
    wanted = [(kind, "nv-embed", "bidirectional") for kind in KINDS]
    wanted += [
        ("last", "nv-embed", "causal"),
        ("multi_layer", "nv-embed", "causal"),
        ("mean", "mean", "bidirectional"),
    ]
    made = []
    for kind, form, mask in wanted:
        made.append(folder / "-".join([form, kind] + ([mask] if mask == "causal" else [])))
        _export(made[-1], kind, form, mask, folder / "tokenizer")
    return made


def _export(output: Path, kind: str, form: str, mask: str, tokenizer: Path) -> None:
    config = MistralConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,  # hidden_size / heads: 4.42 knows no other
        vocab_size=32000,
        max_position_embeddings=512,
    )
    pooling = PoolingConfig(kind=kind, num_latents=24, num_heads=4, head_width=32)
    entries = {entry.name: entry for entry in name_table(config, pooling)}
    random = RandomWeights(entries.values(), 5, INITIALIZER_RANGE, pooling)
    generator = torch.Generator().manual_seed(7)

    def read(name: str) -> torch.Tensor:
        tensor = random.read(name, random.shapes[name])
        if "norm" in name:  # drawn as ones and zeros, with which a norm applied to the wrong states would not show
            return tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
        # Sharp attention in the head: with even weights a wrong head would not show.
        return tensor * SHARPNESS if ".to_q." in name or ".to_kv." in name else tensor

    tensors = {name: read(name) for name in sorted(random.shapes)}
    export(
        lambda name: local_shard(entries[name], tensors.__getitem__, 0, 1),
        config,
        pooling,
        output,
        tokenizer_dir=tokenizer,
        attention_mask=mask,
        format=form,
        max_tokens=LIMIT,
        instruction=INSTRUCTION,
        card_facts={},
    )


class Trainer:
    """The trainer's encoder with the weights of an export: one process, float32, packed texts.

    Args:
        folder: an export of either format.
        tokenizer: folder of the tokenizer that it was trained with; None takes the export's.
    """

    def __init__(self, folder: Path, tokenizer: Path | None) -> None:
        self.found, self.folder, parallel = open_hf_model(folder), folder, ParallelConfig()
        is_causal = json.loads((folder / "config.json").read_text(encoding="utf-8"))["is_causal"]
        mask = "causal" if is_causal else "bidirectional"
        model = ModelConfig(config=str(folder), attention_mask=mask, pooling=self.found.pooling)
        self.groups = initialize(parallel)
        precision = PrecisionConfig(dtype="float32")
        self.encoder = Encoder(self.found.hf_config, model, parallel, self.groups, precision=precision)
        self.tokenizer = load_tokenizer(tokenizer or folder)
        self.chunks = wrap_data_parallel([self.encoder], parallel, distributed_optimizer=False)

    @torch.no_grad()
    def load(self, dtype: str) -> None:
        """Take the export's weights, rounded to `dtype` and used in float32.

        Raises:
            WeightsError: they are not those that `config.json` describes.
            ValueError: the pooling head is missing.
        """
        parameters = self.encoder.parameters_by_global_name()
        missing = load_weights(self.found.folder, self.found.entries(), parameters, 0, 1)
        if missing:
            raise ValueError(f"{self.folder} lacks the {len(missing)} tensors of the pooling head")
        for parameter in parameters.values():
            parameter.copy_(parameter.to(getattr(torch, dtype)))

    @torch.no_grad()
    def embed(self, texts: list[str], instruction: str, limit: int) -> torch.Tensor:
        """float32 [N, H]; every text is tokenised, cut and pooled as in training."""
        rows = tokenize(self.tokenizer, texts, instruction, limit)
        return embed_texts(self.chunks, self.groups, rows, 512)
