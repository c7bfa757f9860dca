"""A text embedding model: a Mistral backbone, bidirectional, with a pooling head (NV-Embed, arXiv 2405.17428).

This one file travels with the weights and needs torch and transformers (4.42 to 5.x) only. Parameters are named as in
the published NV-Embed models; `multi_layer` pooling is that of arXiv 2409.02727.

    from transformers import AutoModel
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    vectors = model.encode(["a text"], instruction="Instruct: the task\\nQuery: ")   # float32 [1, D], unit length

Letters: `N` texts, `L` tokens of the longest, `H` hidden size (`D`), `R` latents, `A` heads of width `w`, `Y` layers.
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

_is_exporting = getattr(torch.compiler, "is_exporting", bool)  # whether a graph is recorded; torch 2.7 can say so
POOLING_KINDS = ("latent", "self_attention", "multi_layer", "mean", "last")


class LatentAttentionConfig(PretrainedConfig):
    """Dimensions of the pooling head; `num_latents_value` counts for `latent` and `multi_layer` pooling only."""

    model_type = "latent_attention"
    num_latents_value = 512
    num_cross_heads = 8
    hidden_dim = latent_dim = cross_dim_head = 4096
    output_normalize = True


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
        last_hidden_state: [N, L, H], states before the mean and behind the pooling head, where it is one of token
            states (`latent`, `self_attention`); in the model's dtype.
    """

    sentence_embeddings: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None


class _CrossAttention(nn.Module):
    """Multi-head attention of one set of states on another; no biases."""

    def __init__(self, config: LatentAttentionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_cross_heads
        inner = config.num_cross_heads * config.cross_dim_head
        self.to_q = nn.Linear(config.hidden_dim, inner, bias=False)
        self.to_kv = nn.Linear(config.latent_dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, config.hidden_dim, bias=False)

    def forward(self, states: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`states` [b or 1, l, H] on `context` [b or 1, m, H]; `mask` is added to the scores [b, A, l, m]."""
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


def _hide(attention_mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is added to scores so that nobody sees padding: [N, 1, 1, L]."""
    return (1.0 - attention_mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min


def _weighted_sum(states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`states` [N, L, H] by `weights` [N, L]: float32 [N, H]."""
    return (states.float() * weights[..., None]).sum(dim=1)


def _check_room(pooled: torch.Tensor) -> None:
    """`pooled` [N]: the number of pooled positions of each text; a recorded graph cannot look at it."""
    if not _is_exporting() and (rows := (pooled <= 0).nonzero().flatten().tolist()):
        raise ValueError(f"rows {rows} have nothing to pool: is the instruction longer than the limit of tokens?")


def _blocks(config: LatentAttentionConfig) -> nn.ModuleList:
    attend = _NormedBlock(_CrossAttention(config), config.hidden_dim, config.latent_dim)
    return nn.ModuleList([attend, _NormedBlock(_FeedForward(config.hidden_dim), config.hidden_dim)])


class PoolingHead(nn.Module):
    """Attention of token states on trained latents, or on each other (`self_attention`), then feed-forward, each with
    a norm in front and a residual around. Shapes are kept."""

    def __init__(self, config: LatentAttentionConfig, has_latents: bool) -> None:
        super().__init__()
        self.has_latents = has_latents
        if has_latents:
            self.latents = nn.Parameter(torch.randn(config.num_latents_value, config.latent_dim))
        self.cross_attend_blocks = _blocks(config)
        self._kept: tuple[list[torch.Tensor], list[Any], torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None = None

    def forward(self, states: torch.Tensor, key_mask: torch.Tensor) -> torch.Tensor:
        """`states` [N, L, H]; `key_mask` [N, 1, 1, L] is added to the scores of `self_attention`."""
        attend, feed_forward = self.cross_attend_blocks
        normed = attend.norm(states)
        if not self.has_latents:
            attended = attend.fn(normed, attend.norm_context(states), key_mask)
        elif self._can_fold():
            into, out_of = self._folded(normed.dtype)
            logits = (normed @ into).unflatten(-1, (attend.fn.num_heads, -1))
            attended = logits.float().softmax(dim=-1).to(normed.dtype).flatten(-2) @ out_of
        else:
            self._kept = None
            attended = attend.fn(normed, attend.norm_context(self.latents[None]))
        states = states + attended
        return states + feed_forward.fn(feed_forward.norm(states))

    def _can_fold(self) -> bool:
        """Whether the projections are what they seem: not wrapped by an adapter, quantised or kept elsewhere."""
        return all(type(x) is nn.Linear and not x.weight.is_meta for x in self.cross_attend_blocks[0].fn.children())

    def _folded(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """`_fold`, made once for all forward passes without gradients, until a parameter changes. Writing to `.data`
        does not count as a change in torch; it shows in a sample of each one's numbers, up to 4096 or some more."""
        if _is_exporting() and self._kept is not None:  # from a pass before: constants of the graph
            return self._kept[3]
        attend = self.cross_attend_blocks[0]
        weights = [self.latents, *attend.norm_context.parameters(), *attend.fn.parameters()]
        has_gradient = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
        if has_gradient or any(weight.is_inference() for weight in weights):  # the latter do not count their changes
            self._kept = None
            return self._fold(dtype)
        state = [(id(x), x._version, x.data_ptr(), x.dtype, x.device, dtype) for x in weights]
        with torch.inference_mode(False), torch.no_grad():  # tensors that later passes with gradients can use too
            sample = torch.cat([x.flatten()[:: x.numel() // 4096 | 1] for x in weights])  # an odd step: all columns
            if self._kept is None or self._kept[1] != state or not torch.equal(self._kept[2], sample):
                self._kept = weights, state, sample, self._fold(dtype)
        return self._kept[3]

    def _fold(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The cross attention on latents, which no text changes, as two matrices [H, A * R] and [A * R, H].

        Scores of a head: `(Wq x) . (Wk c) / sqrt(w)` = `x . (Wq^T Wk c) / sqrt(w)`; its output: `Wo V^T p`. Made in
        float32 and rounded once, one head after the other: the float32 copies are those of one head.
        """
        fn, norm = self.cross_attend_blocks[0].fn, self.cross_attend_blocks[0].norm_context
        into, out_of = [], []
        with torch.autocast(self.latents.device.type, enabled=False):
            weight, bias = norm.weight.float(), norm.bias.float()
            context = F.layer_norm(self.latents.float(), norm.normalized_shape, weight, bias, norm.eps)
            to_k, to_v = fn.to_kv.weight.chunk(2)
            parts = [x.chunk(fn.num_heads) for x in (fn.to_q.weight, to_k, to_v)]
            for query, key, value, out in zip(*parts, fn.to_out.weight.chunk(fn.num_heads, dim=1), strict=True):
                keys = context @ key.float().T / math.sqrt(len(query))
                into.append((keys @ query.float()).T.to(dtype))
                out_of.append((context @ value.float().T @ out.float().T).to(dtype))
        return torch.cat(into, dim=1), torch.cat(out_of)


class MultiLayerHead(nn.Module):
    """Trained latents attend to one state of each layer, then a feed-forward block; mean over the latents."""

    def __init__(self, config: LatentAttentionConfig, num_layers: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(config.num_latents_value, config.latent_dim))
        self.layer_embedding = nn.Embedding(num_layers, config.hidden_dim)
        self.cross_attend_blocks = _blocks(config)

    def forward(self, summaries: torch.Tensor) -> torch.Tensor:
        """One state a layer, [N, Y, H], to one state a text, float32 [N, H]."""
        attend, feed_forward = self.cross_attend_blocks
        context = attend.norm_context(summaries.to(self.latents.dtype) + self.layer_embedding.weight)
        states = self.latents + attend.fn(attend.norm(self.latents)[None], context)
        return (states + feed_forward.fn(feed_forward.norm(states))).float().mean(dim=1)


class NVEmbedModel(PreTrainedModel):
    """The embedding model. `encode` takes strings; `forward` takes token ids."""

    config_class = NVEmbedConfig
    base_model_prefix = ""
    _no_split_modules = ["MistralDecoderLayer", "PoolingHead", "MultiLayerHead"]
    _supports_sdpa = _supports_flash_attn = _supports_flash_attn_2 = True  # the last before transformers 4.54

    def __init__(self, config: NVEmbedConfig) -> None:
        super().__init__(config)
        config.text_config._attn_implementation = config._attn_implementation  # version 4 does not hand it down
        self.embedding_model = MistralModel(config.text_config)
        for layer in self.embedding_model.layers:
            layer.self_attn.is_causal = config.is_causal  # what flash attention goes by
        if config.pooling in ("latent", "self_attention"):
            self.latent_attention_model = PoolingHead(config.latent_attention_config, config.pooling == "latent")
        elif config.pooling == "multi_layer":
            num_layers = config.text_config.num_hidden_layers
            self.latent_attention_model = MultiLayerHead(config.latent_attention_config, num_layers)
        self._tokenizer: PreTrainedTokenizerFast | None = None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings."""
        return self.embedding_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of token embeddings."""
        self.embedding_model.embed_tokens = value

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pool_mask: torch.Tensor | None = None,
        return_dict: bool = True,
        prompt_length: int | torch.Tensor | None = None,
    ) -> NVEmbedOutput | tuple[torch.Tensor, ...]:
        """States of all tokens and, with a `pool_mask`, embeddings of the texts.

        Args:
            input_ids: int64 [N, L], padded on the right.
            attention_mask: [N, L], 1 for a token and 0 for padding; null means no padding.
            pool_mask: [N, L], 1 at the positions that are pooled, at least one a text. Null: `last_hidden_state` only,
                which is what sentence-transformers pools by itself.
            return_dict: false returns a tuple of the fields that are set.
            prompt_length: tokens in front of each text that sentence-transformers, which says so from version 5 on,
                will not pool; they are only counted here. At least one token must stand between them and `</s>`.

        Raises:
            ValueError: nothing of a text is left to be pooled.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if prompt_length is not None:
            _check_room(attention_mask.sum(dim=1) - prompt_length - 1)  # </s> alone is no text
        is_deep = self.config.pooling == "multi_layer" and pool_mask is not None
        settings = {"use_cache": False, "output_hidden_states": is_deep}
        output = self.embedding_model(input_ids=input_ids, attention_mask=self._mask(attention_mask), **settings)
        states = output[0]
        if self.config.pooling in ("latent", "self_attention"):
            states = self.latent_attention_model(states, _hide(attention_mask, torch.float32))
        result = NVEmbedOutput(last_hidden_state=states)
        if pool_mask is not None:
            weights = self._weights(pool_mask)
            layers = [_weighted_sum(layer, weights) for layer in (output.hidden_states[1:] if is_deep else [states])]
            vectors = self.latent_attention_model(torch.stack(layers, dim=1)) if is_deep else layers[0]
            is_unit = self.config.latent_attention_config.output_normalize
            vectors = F.normalize(vectors, dim=-1) if is_unit else vectors
            result = NVEmbedOutput(sentence_embeddings=vectors, last_hidden_state=states)
        return result if return_dict else result.to_tuple()

    def _mask(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """The backbone's mask. A causal model makes its own from [N, L], and flash attention goes by [N, L] and its
        layers' `is_causal`; otherwise [N, 1, L, L], which every version takes as it is: each token sees each token."""
        if self.config.is_causal or "flash" in self.embedding_model.config._attn_implementation:
            return attention_mask
        hidden = _hide(attention_mask, self.embedding_model.embed_tokens.weight.dtype)
        return hidden.expand(-1, 1, attention_mask.size(1), -1)

    def _weights(self, pool_mask: torch.Tensor) -> torch.Tensor:
        """Weight of each position in the mean over the pooled ones, or in the choice of the last: float32 [N, L]."""
        _check_room(pool_mask.sum(dim=1))
        weights = pool_mask.float()
        if self.config.pooling == "last" or (self.config.pooling == "multi_layer" and self.config.is_causal):
            position = torch.arange(pool_mask.size(1), device=pool_mask.device)
            weights = (position == (position * (pool_mask > 0)).argmax(dim=1, keepdim=True)).float()
        return weights / weights.sum(dim=1, keepdim=True)

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
            num_workers: not used; the published NV-Embed has it.

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
        result = torch.empty(len(ids), self.config.hidden_size, device=device, dtype=torch.float32)
        longest_first = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        was_training = self.training
        self.eval()
        for start in range(0, len(ids), batch_size):
            rows = longest_first[start : start + batch_size]
            lengths = torch.tensor([len(ids[i]) for i in rows])
            padded = pad_sequence([torch.tensor(ids[i]) for i in rows], batch_first=True)  # with 0: it is never seen
            position = torch.arange(padded.size(1))
            attention_mask = (position < lengths[:, None]).long()
            inputs = (padded, attention_mask, attention_mask * (position >= len(prefix)))
            result[rows] = self(*(tensor.to(device) for tensor in inputs)).sentence_embeddings
        self.train(was_training)
        return result.cpu().numpy() if return_numpy else result

    def _prefix(self, instruction: str, max_length: int) -> list[int]:
        """`<s>` and the pieces of the instruction, which are not pooled; nothing without an instruction."""
        # A space at the end becomes part of the text's first piece. What stands for it must not count.
        prefix = self.tokenizer(instruction.rstrip(" "))["input_ids"][:-1] if instruction else []
        if (taken := max(len(prefix), 1)) + 2 > max_length:
            who = f"<s> and the instruction take {taken} tokens"
            raise ValueError(f"max_length = {max_length} leaves no room for text and </s>: {who}")
        return prefix
