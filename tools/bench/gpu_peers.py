"""The same job by others: Mistral-7B's shapes, LoRA on all projections, NV-Embed's head, InfoNCE, AdamW, bfloat16.

Everybody gets the same token ids, so tokenising is not timed, and our head as a module: folded, as no peer has it of
its own. Their adapters, head and moments are in bfloat16 (ours have float32 masters), so they move fewer bytes.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_measure import Figures, begin_peak, fastest, peak, release, seconds_of
from gpu_workload import PROMPT, Size, columns_of, make_batches
from torch import Tensor

from nvembed_mcore import device
from nvembed_mcore.config import LossConfig
from nvembed_mcore.data.packing import Text
from nvembed_mcore.model.pooling import build_head

Columns = list[list[Text]]
WINDOW = 4
"""Batches whose texts are dealt anew by length."""


class Head(torch.nn.Module):
    """NV-Embed's head between a module that makes token states and one that takes their mean."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        with torch.device(device.current()):
            self.head = build_head(size.hidden, size.pooling(), size.layers).to(device.default_dtype("auto"))
        torch.nn.init.normal_(self.head.latents, std=0.02)

    def forward(self, features: dict[str, Any], **_: object) -> dict[str, Any]:
        states = features["token_embeddings"]
        features["token_embeddings"] = self.head(states.flatten(0, 1), None).view_as(states)
        return features


def backbone(kind: Callable[..., torch.nn.Module], config: Any, attention: str) -> torch.nn.Module:
    """A Hugging Face backbone with random weights made on the device, that hides no later token."""
    config.is_causal, config.use_cache = False, False
    with torch.device(device.current()):
        model = kind(config, dtype=device.default_dtype("auto"), attn_implementation=attention)
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    return model


def in_half(model: torch.nn.Module) -> torch.nn.Module:
    """All parameters, new adapters too, in one type; rotary tables, which are buffers, stay in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device.default_dtype("auto"))
    return model


def padded(texts: list[Text]) -> dict[str, Tensor]:
    """Token ids and mask, [texts, longest]."""
    shape = (len(texts), max(map(len, texts)))
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.as_tensor(text.token_ids)
        mask[row, : len(text)] = 1
    return dict(input_ids=ids.to(device.current()), attention_mask=mask.to(device.current()))


class SentenceTransformers:
    """Its model, PEFT's adapters, and `MultipleNegativesRankingLoss`, or the cached one."""

    def __init__(self, size: Size, attention: str) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
        from transformers import AutoModel

        self.size = size
        with tempfile.TemporaryDirectory() as folder:
            write_small_model(folder, size)
            self.transformer = Transformer(folder, model_kwargs=dict(attn_implementation=attention))
        self.transformer.model = backbone(AutoModel.from_config, size.hf_config(), attention)
        self.transformer.unpad_inputs = None  # looks at the new model
        pooling = Pooling(size.hidden, "mean", include_prompt=False)
        self.model = SentenceTransformer(modules=[self.transformer, Head(size), pooling], device=str(device.current()))
        lora = size.lora()
        how = dict(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules="all-linear")
        inject_adapter_in_model(LoraConfig(**how), self.transformer.model)
        in_half(self.model).train()
        self.is_flat = self.transformer.can_flatten_inputs
        self.objective = self.losses(None)

    def losses(self, cached_tokens: int | None) -> Any:
        """The plain loss; or the cached one, with mini-batches of so many tokens."""
        from sentence_transformers.sentence_transformer import losses

        scale = 1 / LossConfig().temperature
        if cached_tokens is None:
            return losses.MultipleNegativesRankingLoss(self.model, scale=scale)
        how = dict(mini_batch_num_tokens=cached_tokens)
        return losses.CachedMultipleNegativesRankingLoss(self.model, scale=scale, **how)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def features(self, columns: Columns) -> list[dict[str, Any]]:
        """What its collator would hand to the model: padded columns, or with FlashAttention flat ones."""
        found = [self._flat(texts) if self.is_flat else padded(texts) for texts in columns]
        found[0]["prompt_length"] = PROMPT // self.size.shorter
        return [one | dict(modality="text") for one in found]

    def _flat(self, texts: list[Text]) -> dict[str, Any]:
        found = self.transformer.data_collator([dict(input_ids=text.token_ids.tolist()) for text in texts])
        found.pop("labels", None)
        return {name: value.to(device.current()) if hasattr(value, "to") else value for name, value in found.items()}

    def backward(self, columns: Columns) -> None:
        self.objective(self.features(columns), None).backward()


def write_small_model(folder: str, size: Size) -> None:
    """A folder of the smallest model of this kind: the library opens only folders; its model is replaced then."""
    from tokenizers import Tokenizer, models
    from transformers import MistralConfig, MistralModel, PreTrainedTokenizerFast

    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    config = MistralConfig(**small, num_key_value_heads=1, vocab_size=size.vocabulary, sliding_window=None)
    MistralModel(config).to(device.default_dtype("auto")).save_pretrained(folder)
    words = models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>")  # noqa: S106
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="<unk>", pad_token="</s>")  # noqa: S106
    tokenizer.save_pretrained(folder)


class Automodel:
    """NeMo Automodel's bidirectional backbone (Llama's, the same products as Mistral's) and its adapters."""

    def __init__(self, size: Size) -> None:
        from nemo_automodel.components._peft.lora import PeftConfig, apply_lora_to_linear_modules
        from nemo_automodel.components.models.llama_bidirectional import (
            LlamaBidirectionalConfig,
            LlamaBidirectionalModel,
        )

        shapes = size.hf_config().to_dict()
        names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
        config = LlamaBidirectionalConfig(**{name: shapes[name] for name in names.split()})
        self.model = backbone(LlamaBidirectionalModel._from_config, config, "sdpa")
        lora = size.lora()
        how = PeftConfig(match_all_linear=True, dim=lora.rank, alpha=int(lora.alpha), dropout=lora.dropout)
        apply_lora_to_linear_modules(self.model, how)
        self.head = Head(size)
        in_half(self.model).train()

    def parameters(self) -> list[torch.nn.Parameter]:
        every = [*self.model.parameters(), *self.head.parameters()]
        return [parameter for parameter in every if parameter.requires_grad]

    def _embed(self, texts: list[Text]) -> Tensor:
        features = padded(texts)
        states = self.model(**features).last_hidden_state
        mask = features["attention_mask"][..., None]
        states = self.head(dict(token_embeddings=states))["token_embeddings"]
        return F.normalize((states.float() * mask).sum(1) / mask.sum(1), dim=-1)

    def backward(self, columns: Columns) -> None:
        """Queries and passages are a batch each, as its collator makes them."""
        queries, passages = self._embed(columns[0]), self._embed([text for column in columns[1:] for text in column])
        scores = queries @ passages.T / LossConfig().temperature
        F.cross_entropy(scores, torch.arange(len(queries), device=scores.device)).backward()


class Trainer:
    """Whole steps of a side: gradients, clipping, AdamW."""

    def __init__(self, side: SentenceTransformers | Automodel, size: Size) -> None:
        self.side, self.size, self.trained = side, size, side.parameters()
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=True)

    def step(self, columns: Columns) -> None:
        self.optimizer.zero_grad()
        self.side.backward(columns)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()

    def rate(self, queries: int, kind: str, window: int) -> float:
        """Real tokens a second over `window` batches, whose samples are dealt anew by length; 0: one, as it comes."""
        batches = make_batches(self.size, kind, queries, max(1, window))
        dealt = [columns_of(batch) for batch in batches]
        if window:
            samples = [sample for columns in dealt for sample in zip(*columns, strict=True)]
            samples.sort(key=lambda sample: -max(map(len, sample)))
            parts = [samples[begin : begin + queries] for begin in range(0, len(samples), queries)]
            dealt = [[list(column) for column in zip(*part, strict=True)] for part in parts]
        seconds = seconds_of(lambda: [self.step(columns) for columns in dealt], self.size.steps if window < 2 else 1)
        return sum(int(batch.lengths.sum()) for batch in batches) / seconds

    def race(self, figures: Figures, name: str, kind: str, window: int) -> None:
        """The fastest batch that fits, and its figures."""
        peaks: dict[int, int] = {}

        def rate(queries: int) -> float:
            begin_peak()
            found = self.rate(queries, kind, window)
            peaks[queries] = peak()
            return found

        best = fastest(rate, self.size.queries, self.size.most_queries)
        figures.add(
            f"{name}_{kind}",
            tokens_per_second=best.figure,
            queries=best.size,
            out_of_memory_at=best.too_large,
            peak_bytes=peaks.get(best.size),
        )


def plain(figures: Figures, size: Size) -> None:
    """sentence-transformers as it comes: every column padded to its longest text, torch's attention."""
    trainer = Trainer(SentenceTransformers(size, "sdpa"), size)
    for kind in ("msmarco", "longest"):
        trainer.race(figures, "st_plain", kind, window=0)


def best(figures: Figures, size: Size) -> None:
    """sentence-transformers at its best: flat with FlashAttention, otherwise batches by length; plain and cached."""
    attention = "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"
    side = SentenceTransformers(size, attention)
    how = f"{attention}, {'flat' if side.is_flat else 'padded'}, batches by length"
    figures.add(st_best_setting=how, st_flash_attention="installed" if attention != "sdpa" else "not installed")
    trainer = Trainer(side, size)
    trainer.race(figures, "st_best", "msmarco", window=WINDOW)
    release()
    side.objective = side.losses(cached_tokens=size.pack_tokens // 2)
    figures.add(st_cached_tokens_per_second=trainer.rate(size.large_queries, "msmarco", window=1))


def nemo(figures: Figures, size: Size) -> None:
    """NeMo Automodel, batches by length."""
    if importlib.util.find_spec("nemo_automodel") is None:
        figures.add(nemo_msmarco_tokens_per_second="not installed")
        return
    Trainer(Automodel(size), size).race(figures, "nemo", "msmarco", window=WINDOW)
