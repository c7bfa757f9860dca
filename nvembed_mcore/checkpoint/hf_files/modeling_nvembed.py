"""A text embedding model: a Mistral backbone, bidirectional, with a pooling head (NV-Embed, arXiv 2405.17428).

This one file travels with the weights and needs torch and transformers (4.42 to 5.x) only. Parameters are named as in
the published NV-Embed models.

    from transformers import AutoModel
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    vectors = model.encode(["a text"], instruction="Instruct: the task\\nQuery: ")   # float32 [1, D], unit length

Letters: `N` texts, `L` tokens of the longest, `H` hidden size (= `D`), `R` latents, `A` heads of the pooling head, `w`
their width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import MistralConfig, MistralModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import ModelOutput

POOLING_KINDS = ("latent", "self_attention", "mean", "last")


class LatentAttentionConfig(PretrainedConfig):
    """Dimensions of the pooling head; `num_latents_value` counts for `latent` pooling only."""

    model_type = "latent_attention"

    def __init__(
        self,
        num_latents_value: int = 512,
        num_cross_heads: int = 8,
        hidden_dim: int = 4096,
        latent_dim: int = 4096,
        cross_dim_head: int = 4096,
        output_normalize: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_latents_value = num_latents_value
        self.num_cross_heads = num_cross_heads
        self.hidden_dim = hidden_dim
        self.latent_dim = latent_dim
        self.cross_dim_head = cross_dim_head
        self.output_normalize = output_normalize


class NVEmbedConfig(PretrainedConfig):
    """Backbone (`text_config`), pooling (`pooling`, `latent_attention_config`) and mask (`is_causal`) of the model;
    `query_prompt` is the instruction that `encode` should get for the queries it was trained on."""

    model_type = "nvembed"
    sub_configs = {"text_config": MistralConfig, "latent_attention_config": LatentAttentionConfig}

    def __init__(
        self,
        text_config: dict[str, Any] | MistralConfig | None = None,
        latent_attention_config: dict[str, Any] | LatentAttentionConfig | None = None,
        pooling: str = "latent",
        is_causal: bool = False,
        query_prompt: str = "",
        **kwargs: Any,
    ) -> None:
        if pooling not in POOLING_KINDS:
            raise ValueError(f"config.json: pooling is {pooling!r}, this file knows {', '.join(POOLING_KINDS)}")
        if not isinstance(text_config, PretrainedConfig):
            text_config = MistralConfig(**_without_type(text_config))
        if not isinstance(latent_attention_config, PretrainedConfig):
            latent_attention_config = LatentAttentionConfig(**_without_type(latent_attention_config))
        # Set before the parent's __init__, which hands settings such as the attention's implementation to both.
        self.text_config, self.latent_attention_config = text_config, latent_attention_config
        self.hidden_size = kwargs.pop("hidden_size", text_config.hidden_size)
        super().__init__(**kwargs)
        self.pooling, self.is_causal, self.query_prompt = pooling, is_causal, query_prompt


def _without_type(config: dict[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (config or {}).items() if key != "model_type"}


@dataclass
class NVEmbedOutput(ModelOutput):
    """What `NVEmbedModel.forward` returns.

    Attributes:
        sentence_embeddings: float32 [N, H]; only when a `pool_mask` was given, and then the first element.
        last_hidden_state: [N, L, H], states behind the pooling head and before the mean, in the model's dtype.
    """

    sentence_embeddings: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None


class _CrossAttention(nn.Module):
    """Multi-head attention of token states on another set of states; no biases."""

    def __init__(self, config: LatentAttentionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_cross_heads
        inner = config.num_cross_heads * config.cross_dim_head
        self.to_q = nn.Linear(config.hidden_dim, inner, bias=False)
        self.to_kv = nn.Linear(config.latent_dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, config.hidden_dim, bias=False)

    def forward(self, states: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """`states` [b, l, H] on `context` [b, m, H]; `mask` is added to the scores [b, A, l, m]."""
        key, value = self.to_kv(context).chunk(2, dim=-1)
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (self.to_q(states), key, value)
        )
        # Written out, not the fused kernel, so that the softmax is in float32 in every dtype.
        scores = (query @ key.transpose(-1, -2)).float() / math.sqrt(query.size(-1))
        if mask is not None:
            scores = scores + mask
        attended = scores.softmax(dim=-1).to(value.dtype) @ value
        return self.to_out(attended.transpose(1, 2).flatten(-2))


class _GatedGelu(nn.Module):
    """First half times the exact gelu of the second."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        value, gate = states.chunk(2, dim=-1)
        return value * F.gelu(gate)


class _FeedForward(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(hidden, 8 * hidden), _GatedGelu(), nn.Linear(4 * hidden, hidden))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.net(states)


class _NormedBlock(nn.Module):
    """Holds a sub-block with the norms in front of it; the names are those of the published state dict."""

    def __init__(self, fn: nn.Module, hidden: int, context: int | None = None) -> None:
        super().__init__()
        self.fn, self.norm = fn, nn.LayerNorm(hidden)
        if context is not None:
            self.norm_context = nn.LayerNorm(context)


class PoolingHead(nn.Module):
    """Attention of token states on trained latents (`latent`) or on the text's own token states (`self_attention`),
    then a feed-forward block, both with a norm in front and a residual around. Shapes are kept."""

    def __init__(self, config: LatentAttentionConfig, has_latents: bool) -> None:
        super().__init__()
        if has_latents:
            self.latents = nn.Parameter(torch.randn(config.num_latents_value, config.latent_dim))
        attend = _NormedBlock(_CrossAttention(config), config.hidden_dim, config.latent_dim)
        feed_forward = _NormedBlock(_FeedForward(config.hidden_dim), config.hidden_dim)
        self.cross_attend_blocks = nn.ModuleList([attend, feed_forward])
        self.has_latents = has_latents

    def forward(self, states: torch.Tensor, key_mask: torch.Tensor) -> torch.Tensor:
        """`states` [N, L, H]; `key_mask` [N, 1, 1, L] is added to the scores of `self_attention`."""
        attend, feed_forward = self.cross_attend_blocks
        if self.has_latents:
            # One long text for all: latents are the same for each, so keys and values are made once, from [1, R, H].
            context, mask = self.latents[None], None
            flat = attend.norm(states).flatten(0, 1)[None]
            attended = attend.fn(flat, attend.norm_context(context), mask).view_as(states)
        else:
            attended = attend.fn(attend.norm(states), attend.norm_context(states), key_mask)
        states = states + attended
        return states + feed_forward.fn(feed_forward.norm(states))


class NVEmbedModel(PreTrainedModel):
    """The embedding model. `encode` takes strings; `forward` takes token ids."""

    config_class = NVEmbedConfig
    base_model_prefix = ""
    _no_split_modules = ["MistralDecoderLayer", "PoolingHead"]
    _supports_sdpa = True

    def __init__(self, config: NVEmbedConfig) -> None:
        super().__init__(config)
        self.embedding_model = MistralModel(config.text_config)
        if config.pooling in ("latent", "self_attention"):
            self.latent_attention_model = PoolingHead(config.latent_attention_config, config.pooling == "latent")
        self._tokenizer: PreTrainedTokenizerFast | None = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings."""
        return self.embedding_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of token embeddings."""
        self.embedding_model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pool_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> NVEmbedOutput | tuple[torch.Tensor, ...]:
        """States of all tokens and, with a `pool_mask`, embeddings of the texts.

        Args:
            input_ids: int64 [N, L], padded on the right.
            attention_mask: [N, L], 1 for a token and 0 for padding; null means no padding.
            pool_mask: [N, L], 1 at the positions that are pooled, at least one a text. Null: `last_hidden_state` only,
                which is what sentence-transformers pools by itself.
            return_dict: false returns a tuple of the fields that are set.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        dtype = self.get_input_embeddings().weight.dtype
        hidden_from = (1.0 - attention_mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min  # [N, 1, 1, L]
        # A mask with four dimensions is taken as it is by every version of MistralModel: each token sees each token.
        mask = attention_mask if self.config.is_causal else hidden_from.expand(-1, 1, input_ids.size(1), -1)
        states = self.embedding_model(input_ids=input_ids, attention_mask=mask, use_cache=False)[0]
        if self.config.pooling in ("latent", "self_attention"):
            states = self.latent_attention_model(states, hidden_from.float())
        embeddings = None if pool_mask is None else self._pool(states, pool_mask)
        output = NVEmbedOutput(sentence_embeddings=embeddings, last_hidden_state=states)
        return output if return_dict else output.to_tuple()

    def _pool(self, states: torch.Tensor, pool_mask: torch.Tensor) -> torch.Tensor:
        """Mean over the pooled positions, or the last of them: float32 [N, H], unit length."""
        weights = pool_mask.float()
        if self.config.pooling == "last":
            position = torch.arange(pool_mask.size(1), device=pool_mask.device)
            last = (position * (pool_mask > 0)).argmax(dim=1, keepdim=True)
            weights = (position == last).float()
        pooled = (states.float() * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True)
        return F.normalize(pooled, dim=-1) if self.config.latent_attention_config.output_normalize else pooled

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer in the folder that the model came from; it puts `<s>` in front and `</s>` behind."""
        if self._tokenizer is None:
            self._tokenizer = PreTrainedTokenizerFast.from_pretrained(self.config._name_or_path)
        return self._tokenizer

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[str],
        instruction: str = "",
        max_length: int = 4096,
        batch_size: int = 32,
        return_numpy: bool = False,
        num_workers: int = 0,
    ) -> Any:
        """Embeddings of texts: float32 [N, H] of unit length on the model's device, in the order of `prompts`.

        Args:
            prompts: texts. `<s>` and `</s>` are added here, and a text that is cut keeps its `</s>`.
            instruction: put in front of every text as it is, for instance `"Instruct: the task\\nQuery: "`; its tokens
                are attended to and not pooled. Leave it empty for documents.
            max_length: most tokens of instruction and text together, special tokens included.
            batch_size: texts in one forward pass; texts of similar length go together.
            return_numpy: give a numpy array.
            num_workers: accepted because the published NV-Embed has it; tokenising is fast enough without.

        Raises:
            TypeError: `prompts` is one string.
            ValueError: `max_length` leaves no room for text behind the instruction, or the tokenizer joins the two.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of strings, got one string")
        prefix = self._prefix(instruction, max_length)
        texts = [instruction + text for text in prompts]
        ids = self.tokenizer(texts, truncation=True, max_length=max_length)["input_ids"] if texts else []
        for text, row in zip(prompts, ids, strict=True):
            if row[: len(prefix)] != prefix:
                raise ValueError(f"the tokenizer does not keep {instruction!r} apart from the text {text!r}")
        device = self.get_input_embeddings().weight.device
        result = torch.empty(len(ids), self.config.hidden_size, dtype=torch.float32, device=device)
        longest_first = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        was_training = self.training
        self.eval()
        for start in range(0, len(ids), batch_size):
            rows = longest_first[start : start + batch_size]
            lengths = torch.tensor([len(ids[i]) for i in rows])
            padded = pad_sequence([torch.tensor(ids[i]) for i in rows], batch_first=True)  # with 0: it is never seen
            position = torch.arange(padded.size(1))
            attention_mask = (position < lengths[:, None]).long()
            pool_mask = attention_mask * (position >= len(prefix))
            inputs = (tensor.to(device) for tensor in (padded, attention_mask, pool_mask))
            result[rows] = self(*inputs).sentence_embeddings
        self.train(was_training)
        return result.cpu().numpy() if return_numpy else result

    def _prefix(self, instruction: str, max_length: int) -> list[int]:
        """`<s>` and the pieces of the instruction, which are not pooled; nothing without an instruction."""
        # A space at the end becomes part of the text's first piece. What stands for it must not count.
        prefix = self.tokenizer(instruction.rstrip(" "))["input_ids"][:-1] if instruction else []
        if max(len(prefix), 1) + 2 > max_length:
            raise ValueError(
                f"max_length = {max_length} leaves no room for text and </s>: <s> and the instruction take "
                f"{max(len(prefix), 1)} tokens"
            )
        return prefix
